"""Copies of the weights before a step."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Optimizer, SparseAdam

from autoclip_torch.gradients.layout import get_stored
from autoclip_torch.gradients.sharded import get_local

from .changes import make_sparse


class Weights(NamedTuple):
    """The elements of a parameter that a step may change.

    Of a sparse gradient, these are its rows: both tensors are then sparse.
    """

    parameter: Tensor
    old: Tensor
    """Before the step."""
    new: Tensor
    """After the step: a view of the parameter, or a copy of its rows."""


class Copies:
    """The weights before the present step. The memory is used again in the next step.

    Parameters without a gradient are not copied. Of a parameter with a sparse gradient
    only its rows are copied, if the optimizer changes no other row.
    """

    def __init__(self) -> None:
        """Start without a copy."""
        self._buffers: dict[int, Tensor] = {}
        self._old: list[tuple[Tensor, Tensor]] = []
        self._weights: dict[int, Weights] = {}

    @torch.no_grad()
    def take(
        self, parameters: Iterable[Tensor], optimizer: Optimizer, has_closure: bool
    ) -> None:
        """Copy the weights before a step.

        Args:
          parameters: the clipped parameters.
          optimizer: it has not stepped yet.
          has_closure: whether a closure computes the gradients later. Every parameter
            that requires a gradient is then copied.
        """
        self._old, self._weights = [], {}
        sources = []
        for parameter in parameters:
            if has_closure:
                is_stepped = parameter.requires_grad
            else:
                is_stepped = parameter.grad is not None
            if not is_stepped:
                continue
            gradient = None if has_closure else parameter.grad
            if gradient is not None and _leaves_rows(gradient, optimizer):
                self._old.append((parameter, _copy_rows(parameter, gradient)))
            else:
                sources.append(parameter)
                self._old.append((parameter, self._find_buffer(parameter)))
        copies = [old for _, old in self._old if not old.is_sparse]
        _copy_all_(copies, sources)

    @torch.no_grad()
    def compare(self) -> None:
        """Find the weights after the step.

        The rows of a sparse gradient are restored until `close`, so that the parameter
        has its old norm.
        """
        for parameter, old in self._old:
            new = parameter.detach()
            if old.is_sparse:
                new = _copy_rows(parameter, old)
                _write_rows_(parameter, old)
            self._weights[id(parameter)] = Weights(parameter, old, new)

    def get(self, parameter: Tensor) -> Weights | None:
        """Return the weights before and after the step, or None if it has no update."""
        return self._weights.get(id(parameter))

    def list_all(self) -> list[Weights]:
        """Return the weights of all parameters that have an update."""
        return list(self._weights.values())

    @torch.no_grad()
    def restore_(self) -> None:
        """Undo the whole update."""
        weights = self._weights.values()
        _copy_all_([each.new for each in weights], [each.old for each in weights])

    @torch.no_grad()
    def close(self) -> None:
        """End the step. The memory stays."""
        for parameter, old, new in self._weights.values():
            if old.is_sparse:
                _write_rows_(parameter, new)
        self._old, self._weights = [], {}

    def keep_only(self, parameters: Iterable[Tensor]) -> None:
        """Free the memory of all other parameters."""
        ids = set(map(id, parameters))
        self._buffers = {key: each for key, each in self._buffers.items() if key in ids}

    def _find_buffer(self, parameter: Tensor) -> Tensor:
        """Return the memory for a copy; a parameter that was converted gets another."""
        weights = parameter.detach()
        buffer = self._buffers.get(id(parameter))
        if buffer is None or not _is_alike(buffer, weights):
            buffer = torch.empty_like(weights)
            self._buffers[id(parameter)] = buffer
        return buffer

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Copy this object without the weights: no step is in progress."""
        return type(self), ()


def _is_alike(buffer: Tensor, weights: Tensor) -> bool:
    layout = (buffer.shape, buffer.dtype, buffer.device, buffer.stride())
    return layout == (weights.shape, weights.dtype, weights.device, weights.stride())


def _copy_all_(targets: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
    """Copy the elements of each tensor, on this rank, in few launches."""
    to = [get_stored(get_local(target)) for target in targets]
    if to:
        elements = [get_stored(get_local(source.detach())) for source in sources]
        torch._foreach_copy_(to, elements)


def _leaves_rows(gradient: Tensor, optimizer: Optimizer) -> bool:
    """Return whether a step changes only those rows that a sparse gradient has."""
    if not gradient.is_sparse or gradient.sparse_dim() != 1:
        return False
    if type(optimizer) is SGD:
        return not any(group["momentum"] for group in optimizer.param_groups)
    return type(optimizer) in (SparseAdam, Adagrad)


def _copy_rows(parameter: Tensor, gradient: Tensor) -> Tensor:
    """Return the rows of a parameter that a sparse gradient has, as a sparse tensor."""
    indices = gradient.coalesce().indices()
    rows = parameter.detach()[indices[0]]
    return make_sparse(indices, rows, parameter.shape)


def _write_rows_(parameter: Tensor, rows: Tensor) -> None:
    """Write the rows of a sparse tensor into a parameter."""
    parameter.detach().index_copy_(0, rows._indices()[0], rows._values())
