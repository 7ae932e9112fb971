"""The change of one parameter in a step, in any layout, and a part of it written.

A change is measured as `w_old - w_new`. A clipped row becomes `w_old - s * change`,
which is exactly `w_old` for s = 0, also for a weight of -0.0.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from autoclip_torch.gradients.dtensor import align_local_scales, get_local, is_sharded
from autoclip_torch.gradients.layout import (
    apply_scale_,
    as_real,
    count_piece_rows,
    get_stored,
    is_cut_by_first_axis,
    with_axis,
)
from autoclip_torch.rows.rows import ParameterRows

_NARROW = (torch.bfloat16, torch.float16)


class Change(NamedTuple):
    """The elements of a parameter that a step may change.

    Of a sparse gradient, these are its rows: both tensors are then sparse.
    """

    entry: ParameterRows
    old: Tensor
    """Before the step."""
    new: Tensor
    """After the step: a view of the parameter, or a copy of its rows."""

    @property
    def weights(self) -> Tensor:
        """The weights before the step, of which `old` has only the touched rows."""
        return self.entry.parameter.detach() if self.old.is_sparse else self.old

    @property
    def size(self) -> int:
        """The number of elements that a step may change."""
        return get_stored(self.new).numel()


def subtract(changes: Sequence[Change]) -> list[Tensor]:
    """Return `w_old - w_new` of each change in few launches; half precision widened."""
    if any(change.new.is_sparse or is_sharded(change.new) for change in changes):
        return [_subtract_one(change) for change in changes]
    old = [_widen(change.old) for change in changes]
    new = [_widen(change.new) for change in changes]
    return list(torch._foreach_sub(old, new)) if changes else []


def _subtract_one(change: Change) -> Tensor:
    _, old, new = change
    if not new.is_sparse:
        return _widen(old) - _widen(new)
    values = _widen(old._values()) - _widen(new._values())
    return make_sparse(new._indices(), values, new.shape)


def make_sparse(indices: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    """Return a coalesced sparse tensor; its indices are known to be valid."""
    return torch.sparse_coo_tensor(
        indices, values, shape, is_coalesced=True, check_invariants=False
    )


def _widen(tensor: Tensor) -> Tensor:
    """Return half-precision numbers in float32, where their difference is exact."""
    return tensor.float() if tensor.dtype in _NARROW else tensor


def batch_by_size(changes: Iterable[Change], most: int) -> Iterator[list[Change]]:
    """Yield the changes in lists of at most `most` elements, or of one change."""
    batch: list[Change] = []
    size = 0
    for change in changes:
        size += change.size
        if batch and size > most:
            yield batch
            batch, size = [], change.size
        batch.append(change)
    yield batch


def cut_by_size(changes: Iterable[Change], most: int) -> Iterator[Change]:
    """Yield the changes, those of more than `most` elements in parts.

    A part of a parameter has a part of its rows, or belongs to the same row.
    """
    for change in changes:
        entry, old, new = change
        if change.size <= most or new.is_sparse:
            yield change
            continue
        if entry.units is None and new.is_contiguous():
            old, new = old.view(-1), new.view(-1)
        elif entry.units is None or not is_cut_by_first_axis(entry.units, new):
            yield change
            continue
        step = count_piece_rows(new, most)
        pairs = zip(torch.split(old, step), torch.split(new, step), strict=True)
        start = entry.start
        for old_part, new_part in pairs:
            rows = entry
            if entry.units is not None:
                rows = replace(entry, start=start, stop=start + len(new_part))
                start = rows.stop
            yield Change(rows, old_part, new_part)


def write_(change: Change, scales: Tensor) -> None:
    """Write `w_old - s * change`, or the present weights if s = 1; nothing is read.

    Args:
      change: a parameter before and after the step.
      scales: float32, one per row of the parameter.
    """
    new, aligned = _align(change.new, scales, change)
    old, _ = _align(change.old, scales, change)
    wide = _widen(old)
    removed = wide - _widen(new)
    apply_scale_(removed, aligned)
    new.copy_(torch.where(aligned == 1, new, wide - removed))


def _align(tensor: Tensor, scales: Tensor, change: Change) -> tuple[Tensor, Tensor]:
    """Return real elements and their scales, in shapes that broadcast."""
    units, local = change.entry.units, get_local(tensor)
    scales = scales.to(local.device)
    if units is None:
        return with_axis(as_real(local)), scales[:1]
    return align_local_scales(tensor, scales, units)
