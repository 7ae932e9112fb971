"""Measure and scale changes on the CPU, with little memory in addition to the copy.

A long parameter is measured in pieces: the difference of a piece is written into a
buffer that stays in the cache. The weights before the step are then in the cache too.
"""

from collections.abc import Iterator, Sequence
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
    long = [change for change in changes if _is_long(change)]
    is_long = {id(change.entry) for change in long}
    norms = _measure_long(rows, long, has_weights=len(weights) > 0)
    others = [change for change in changes if id(change.entry) not in is_long]
    norms[0] = _join(rows, norms[0], _measure_others(rows, others))
    changed = {id(change.entry): change.new for change in changes}
    present = [changed.get(id(entry)) for entry in rows.by_parameter]
    measured = [RowNorms(norms[0], cpu.find_observed(rows, present))]
    for old in weights:
        pairs = zip(rows.by_parameter, old, strict=True)
        rest = [None if id(entry) in is_long else each for entry, each in pairs]
        joined = _join(rows, norms[1], cpu.measure_norms(rows, rest))
        measured.append(RowNorms(joined, cpu.find_observed(rows, old)))
    return measured


def _join(rows: Rows, first: _Array, second: _Array) -> _Array:
    """Return the norms of rows from the norms of two parts of each row."""
    joined: _Array = (np.maximum if rows.norm == "max" else np.hypot)(first, second)
    return joined


def _measure_long(rows: Rows, changes: list[Change], has_weights: bool) -> _Array:
    """Return the norms of the changes, and below them those of the weights.

    The weights have rows of their own, so that each piece is measured at once.
    """
    count = len(rows.names)
    entries = []
    for change in changes:
        entry = change.entry
        of_weights = replace(entry, start=entry.start + count, stop=entry.stop + count)
        pair = [entry, of_weights] if has_weights else [entry]
        entries += pair * _count_pieces(change)
    both = replace(rows, by_parameter=entries, names=rows.names * 2)
    pieces = _read_pieces(changes, has_weights)
    return cpu.measure_norms(both, pieces).reshape(2, count)


def _read_pieces(changes: list[Change], has_weights: bool) -> Iterator[Tensor]:
    """Yield the difference of each piece, in a buffer that the next one overwrites.

    Each difference is followed by the weights before the step, if they are measured.
    """
    dtypes = {change.new.dtype for change in changes}
    buffers = {dtype: torch.empty(_PIECE, dtype=dtype) for dtype in dtypes}
    for change in changes:
        buffer, count = buffers[change.new.dtype], _count_pieces(change)
        old = change.old.view(-1).tensor_split(count)
        new = change.new.view(-1).tensor_split(count)
        for old_piece, new_piece in zip(old, new, strict=True):
            yield torch.sub(old_piece, new_piece, out=buffer[: len(old_piece)])
            if has_weights:
                yield old_piece


def _count_pieces(change: Change) -> int:
    """Return how many pieces of equal size a change has. None of them is short."""
    return max(1, -(-change.new.numel() // _PIECE))


def _is_long(change: Change) -> bool:
    """Return whether a change is read in pieces. Short ones are read many at a time."""
    return (
        _is_plain_row(change)
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
