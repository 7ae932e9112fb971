"""Copies of the weights before a step."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Optimizer, SparseAdam

from autoclip_torch.gradients.dtensor import get_local
from autoclip_torch.gradients.layout import get_stored
from autoclip_torch.rows.rows import ParameterRows

from .changes import Change, make_sparse


class Copies:
    """The weights before the present step. The memory is used again in the next step.

    Parameters without a gradient are not copied. Of a parameter with a sparse gradient
    only its rows are copied, if the optimizer changes no other row.
    """

    def __init__(self) -> None:
        self._buffers: dict[int, Tensor] = {}
        self._old: dict[int, Tensor] = {}

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
        self._old = {}
        sources, copies = [], []
        for parameter in parameters:
            gradient = None if has_closure else parameter.grad
            if gradient is None and not (has_closure and parameter.requires_grad):
                continue
            if gradient is not None and _leaves_rows(gradient, optimizer):
                self._old[id(parameter)] = _copy_rows(parameter, gradient)
                continue
            sources.append(parameter.detach())
            copies.append(self._find_buffer(parameter, sources[-1]))
            self._old[id(parameter)] = copies[-1]
        _copy_all_(copies, sources)

    @torch.no_grad()
    def compare(self, entries: Sequence[ParameterRows]) -> dict[int, Change]:
        """Return the copied parameters, before and after the step, by their id.

        The rows of a sparse gradient are restored until `finish_`, so that the
        parameter has its old norm.
        """
        changes = {}
        for entry in entries:
            old = self._old.pop(id(entry.parameter), None)
            if old is None or entry.start == entry.stop:
                continue
            new = entry.parameter.detach()
            if old.is_sparse:
                new = _copy_rows(new, old)
                _write_rows_(entry.parameter, old)
            changes[id(entry.parameter)] = Change(entry, old, new)
        return changes

    def keep_only(self, parameters: Iterable[Tensor]) -> None:
        """Free the memory of all other parameters."""
        ids = set(map(id, parameters))
        self._buffers = {key: each for key, each in self._buffers.items() if key in ids}

    def _find_buffer(self, parameter: Tensor, weights: Tensor) -> Tensor:
        """Return the memory for a copy; a parameter that was converted gets another."""
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


@torch.no_grad()
def restore_(changes: Iterable[Change]) -> None:
    """Undo the whole update."""
    _copy_all_([change.new for change in changes], [change.old for change in changes])


@torch.no_grad()
def finish_(changes: Iterable[Change]) -> None:
    """Write the rows of sparse gradients, which were restored to be measured."""
    for change in changes:
        if change.new.is_sparse:
            _write_rows_(change.entry.parameter, change.new)


def _copy_all_(targets: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
    """Copy the elements of each tensor, on this rank, in few launches."""
    to = [get_stored(get_local(target)) for target in targets]
    if to:
        elements = [get_stored(get_local(source)) for source in sources]
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
