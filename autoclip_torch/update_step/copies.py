"""Copies of the weights before a step."""

from collections.abc import Iterable

import torch
from torch import Tensor

from autoclip_torch.rows.rows import ParameterRows


class Copies:
    """The weights before the present step. The memory is used again in the next step.

    Parameters without a gradient are not copied.
    """

    def __init__(self) -> None:
        """Start without a copy."""
        self._buffers: dict[int, Tensor] = {}
        self._present: dict[int, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def take(self, entries: Iterable[ParameterRows], has_closure: bool) -> None:
        """Copy the weights.

        Args:
          entries: the parameters.
          has_closure: whether a closure computes the gradients later. Every parameter
            that requires a gradient is then copied.
        """
        parameters = [e.parameter for e in entries if _is_stepped(e, has_closure)]
        self._present = {id(p): (p, self._find_buffer(p)) for p in parameters}
        if self._present:
            weights, copies = zip(*self._present.values(), strict=True)
            torch._foreach_copy_(copies, [w.detach() for w in weights])

    @torch.no_grad()
    def restore_(self) -> None:
        """Write all copies back."""
        if self._present:
            weights, copies = zip(*self._present.values(), strict=True)
            torch._foreach_copy_([w.detach() for w in weights], copies)

    def clear(self) -> None:
        """End the step. The memory stays."""
        self._present = {}

    def get(self, parameter: Tensor) -> Tensor | None:
        """Return the weights of a parameter before the step, or None without a copy."""
        pair = self._present.get(id(parameter))
        return None if pair is None else pair[1]

    def _find_buffer(self, parameter: Tensor) -> Tensor:
        """Return the memory for a copy; a parameter that was converted gets another."""
        buffer = self._buffers.get(id(parameter))
        if buffer is None or not _is_alike(buffer, parameter):
            buffer = torch.empty_like(parameter.detach())
            self._buffers[id(parameter)] = buffer
        return buffer

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Copy this object without the weights: no step is in progress."""
        return type(self), ()


def _is_stepped(entry: ParameterRows, has_closure: bool) -> bool:
    parameter = entry.parameter
    return parameter.requires_grad if has_closure else parameter.grad is not None


def _is_alike(buffer: Tensor, parameter: Tensor) -> bool:
    return (
        buffer.shape == parameter.shape
        and buffer.dtype == parameter.dtype
        and buffer.device == parameter.device
        and buffer.stride() == parameter.stride()
    )
