"""Measure and scale changes on the CPU, with little memory in addition to the copy.

A long parameter is measured in pieces: the difference of a piece is written into a
buffer that stays in the cache. The weights before the step are then in the cache too.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoclip_torch.gradients import cpu, squares
from autoclip_torch.gradients.layout import RowNorms
from autoclip_torch.rows.rows import Rows

from .changes import Change, cut_by_size, subtract_in_batches, write_

_PIECE = 2**18
"""The elements of a difference that is in memory, or of several short differences."""

_Array = np.ndarray[Any, Any]


def measure(
    rows: Rows, changes: list[Change], weights: Sequence[list[Tensor]]
) -> list[RowNorms]:
    """Return the norms of the changes, and those of the weights if these are given.

    Args:
      rows, changes, weights: as in `engine.measure`.
    """
    long = [] if rows.norm == "max" else list(filter(_is_long, changes))
    norms, in_pieces = _measure_long(rows, long, 1 + len(weights))
    others = [change for change in changes if id(change.entry) not in in_pieces]
    of_changes = np.hypot(norms[0], _measure_others(rows, others))
    changed = {id(change.entry): change.new for change in changes}
    present = [changed.get(id(entry)) for entry in rows.by_parameter]
    measured = [RowNorms(of_changes, cpu.find_observed(rows, present))]
    for norms_of_long, old in zip(norms[1:], weights, strict=True):
        pairs = zip(rows.by_parameter, old, strict=True)
        rest = [None if id(entry) in in_pieces else each for entry, each in pairs]
        of_weights = np.hypot(norms_of_long, cpu.measure_norms(rows, rest))
        measured.append(RowNorms(of_weights, cpu.find_observed(rows, old)))
    return measured


def _measure_long(
    rows: Rows, changes: list[Change], count: int
) -> tuple[_Array, set[int]]:
    """Return the norms of rows, and the ids of the entries that are part of them.

    The norms are those of the changes and, if `count` is 2, below them those of the
    weights before the step. An entry whose squares do not fit into float32 is left out.
    """
    sums, in_pieces = np.zeros((count, len(rows.names))), set()
    buffer = torch.empty(_PIECE if changes else 0)
    for change in changes:
        sums_of_change = _sum_squares(change, buffer, count)
        if all(map(squares.is_exact, sums_of_change)):
            sums[:, change.entry.start] += sums_of_change
            in_pieces.add(id(change.entry))
    return np.sqrt(sums), in_pieces


def _sum_squares(change: Change, buffer: Tensor, count: int) -> list[float]:
    """Return the sums of squares of a change, and of the weights before the step."""
    sums = [0.0] * count
    both = change.old.view(-1), change.new.view(-1)
    pieces = [torch.split(each, _PIECE) for each in both]
    with np.errstate(all="ignore"):  # the sum shows whether it is finite
        for old, new in zip(*pieces, strict=True):
            difference = torch.sub(old, new, out=buffer[: len(old)])
            for index, piece in enumerate((difference, old)[:count]):
                sums[index] += squares.sum_piece(piece)
    return sums


def _is_long(change: Change) -> bool:
    """Return whether a change is read in pieces. Short ones are read many at a time."""
    return (
        _is_plain_row(change)
        and change.new.dtype == torch.float32
        and change.new.is_contiguous()
        and not squares.is_short(change.new, None)
    )


def _is_plain_row(change: Change) -> bool:
    """Return whether a change belongs to one row, and torch computes in its type."""
    new = change.new
    is_wide = new.dtype in (torch.float32, torch.float64)
    return change.entry.units is None and is_wide and not new.is_sparse


def _measure_others(rows: Rows, changes: list[Change]) -> _Array:
    """Return the norms of changes in any layout."""
    pieces = list(cut_by_size(changes))
    piece_rows = replace(rows, by_parameter=[piece.entry for piece in pieces])
    return cpu.measure_norms(piece_rows, subtract_in_batches(pieces, _PIECE))


def scale_(changes: list[Change], scales: _Array) -> None:
    """Write the scaled changes. Rows with scale 1 are neither read nor written.

    Args:
      changes: those parameters that have a gradient.
      scales: one per row.
    """
    if (scales == 1).all():
        return
    for change in changes:
        row_scales = scales[change.entry.start : change.entry.stop]
        if (row_scales == 1).all():
            continue
        if _is_plain_row(change):
            _write_row_(change, float(row_scales[0]))
            continue
        for piece in cut_by_size([change]):
            rows = slice(piece.entry.start, piece.entry.stop)
            write_(piece, torch.from_numpy(scales[rows]))


def _write_row_(change: Change, scale: float) -> None:
    """Write the scaled change of a whole row, in one pass and without a temporary."""
    if scale == 0:
        change.new.copy_(change.old)
    else:
        torch.lerp(change.old, change.new, scale, out=change.new)
