"""Measure and scale changes on the CPU, with little memory in addition to the copy."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoclip_torch.gradients.cpu import RunningNorms, find_observed
from autoclip_torch.gradients.layout import RowNorms
from autoclip_torch.rows.rows import Rows

from .changes import Change, batch_by_size, cut_by_size, subtract, write_

_PIECE = 2**18
"""The elements of a difference that is in memory, or of several short differences."""

_Array = np.ndarray[Any, Any]


def measure(
    rows: Rows, changes: dict[int, Change], weights: Sequence[list[Tensor]]
) -> list[RowNorms]:
    """Return the norms of the changes, and those of the weights if these are given.

    The weights of a change are read while they are in the cache. Short changes come
    first, so that many of them are in one batch.

    Args:
      rows: the rows, or their parts.
      changes: those parameters that have a gradient, by their id.
      weights: all weights before the step, as the only item, or no item.
    """
    norms = [RunningNorms(rows) for _ in range(1 + len(weights))]
    short_first = sorted(changes.values(), key=lambda change: change.new.numel())
    for batch in batch_by_size(cut_by_size(short_first, _PIECE), _PIECE):
        entries = [change.entry for change in batch]
        norms[0].add(entries, subtract(batch))
        for of_weights in norms[1:]:
            of_weights.add(entries, [change.weights for change in batch])
    present: list[Any] = [changes.get(id(parameter)) for parameter in rows.parameters]
    for of_weights, tensors in zip(norms[1:], weights, strict=True):
        pairs = zip(present, tensors, strict=True)
        unchanged = [None if change else tensor for change, tensor in pairs]
        of_weights.add(rows.by_parameter, unchanged)
    observed = [find_observed(rows, each) for each in (present, *weights)]
    return [RowNorms(n.compute(), o) for n, o in zip(norms, observed, strict=True)]


def scale_(changes: Iterable[Change], scales: _Array) -> None:
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
        if change.entry.units is None and _is_wide(change.new):
            _write_row_(change, float(row_scales[0]))
            continue
        for piece in cut_by_size([change], _PIECE):
            rows = slice(piece.entry.start, piece.entry.stop)
            write_(piece, torch.from_numpy(scales[rows]))


def _write_row_(change: Change, scale: float) -> None:
    """Write the scaled change of a whole row, in one pass and without a temporary."""
    if scale == 0:
        change.new.copy_(change.old)
    else:
        torch.lerp(change.old, change.new, scale, out=change.new)


def _is_wide(tensor: Tensor) -> bool:
    """Return whether torch computes with a tensor in the type that it has."""
    return tensor.dtype in (torch.float32, torch.float64) and not tensor.is_sparse
