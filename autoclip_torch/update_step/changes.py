"""The change of the weights in one step: measure it, and write a part of it.

A change is measured as `w_old - w_new`. A clipped row becomes `w_old - s * change`,
which is exactly `w_old` for s = 0, also for a weight of -0.0.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from autoclip_core.clipper.units import Units
from autoclip_torch.gradients import cpu
from autoclip_torch.gradients.layout import (
    align_unit_scales,
    apply_scale_,
    as_real,
    count_piece_rows,
    is_cut_by_first_axis,
    with_axis,
)
from autoclip_torch.rows.rows import ParameterRows, Rows


@dataclass(frozen=True)
class Change:
    """A parameter before and after a step."""

    entry: ParameterRows
    old: Tensor
    new: Tensor
    """The parameter itself, without its history of operations."""

    def subtract(self) -> Tensor:
        """Return `w_old - w_new`, of half-precision weights in float32."""
        if self.old.dtype in (torch.bfloat16, torch.float16):
            return self.old.float() - self.new.float()
        return self.old - self.new


def cut_by_size(changes: Iterable[Change]) -> list[Change]:
    """Return the changes, long ones in parts, so that differences take little memory.

    A part of a parameter has a part of its rows, or belongs to the same row.
    """
    return [part for change in changes for part in _cut(change)]


def _cut(change: Change) -> Iterator[Change]:
    entry, old, new = change.entry, change.old, change.new
    if entry.units is None:
        old, new = _flatten(old), _flatten(new)
    elif not is_cut_by_first_axis(entry.units, new):
        yield change
        return
    if not new.ndim or (step := count_piece_rows(new)) >= new.shape[0]:
        yield change
        return
    for start in range(0, new.shape[0], step):
        part = slice(start, start + step)
        rows = entry
        if entry.units is not None:
            stop = min(start + step, new.shape[0])
            rows = replace(entry, start=entry.start + start, stop=entry.start + stop)
        yield Change(rows, old[part], new[part])


def _flatten(tensor: Tensor) -> Tensor:
    return tensor.view(-1) if tensor.is_contiguous() else tensor


def measure_on_cpu(rows: Rows, changes: list[Change]) -> Any:
    """Return the norm of the change of each row as a NumPy array."""
    pieces = cut_by_size(changes)
    piece_rows = replace(rows, by_parameter=[piece.entry for piece in pieces])
    return cpu.measure_norms(piece_rows, (piece.subtract() for piece in pieces))


def scale_on_cpu_(changes: list[Change], scales: Any) -> None:
    """Write the scaled changes, except those whose rows all have scale 1."""
    if (scales == 1).all():
        return
    for change in changes:
        entry = change.entry
        if (scales[entry.start : entry.stop] != 1).any():
            for piece in cut_by_size([change]):
                rows = slice(piece.entry.start, piece.entry.stop)
                write_(piece, torch.from_numpy(scales[rows]))


def write_(change: Change, scales: Tensor) -> None:
    """Write `w_old - s * change`, or the present weights if s = 1; nothing is read.

    Args:
      change: a parameter before and after the step.
      scales: float32, one per row of the parameter.
    """
    difference = change.subtract()
    units = change.entry.units
    new, aligned = _align(change.new, scales, units)
    old, _ = _align(change.old, scales, units)
    removed, _ = _align(difference, scales, units)
    apply_scale_(removed, aligned)
    new.copy_(torch.where(aligned == 1, new, old - removed))


def _align(
    values: Tensor, scales: Tensor, units: Units | None
) -> tuple[Tensor, Tensor]:
    """Return real elements and their scales, in shapes that broadcast."""
    if units is None:
        return with_axis(as_real(values)), scales[:1]
    return align_unit_scales(values, scales, units)
