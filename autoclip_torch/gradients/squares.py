"""Sums of squares on the CPU. Each number is read once, in the fastest way.

| numbers in a tensor | summed by                       |
|---------------------|---------------------------------|
| up to 2^13          | NumPy, many tensors at a time   |
| up to 2^18          | NumPy's `vecdot`, in one thread |
| more                | torch, in all its threads       |

Tensors of the first kind are copied side by side. For those of the second kind, a
second thread would start too late. Sums are computed in float32. If a sum may have lost
squares to overflow or underflow, it is computed again in float64.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from autoclip_core.clipper.units import Units

from .layout import (
    PIECE,
    is_cut_by_first_axis,
    norm_over,
    norms_in,
    pieces,
    real,
    rows_of_a_piece,
)

# A float32 sum of squares between these limits has lost nothing to overflow or to
# subnormal numbers. Sums outside the limits, and only these, are computed in float64.
_LEAST_SAFE, _MOST_SAFE = 1e-25, 1e38

# At most this many squares are summed in float32. Longer tensors are cut into strips,
# whose sums are added in float64. Without strips, the norm of 10 million numbers would
# be off by up to 1e-3.
_SHORT = 2**13

# The length of a strip. torch keeps a few partial sums for each row. If each of them
# holds a large number, small numbers are lost: 3e-5 of the norm of 2**13 numbers, 4e-6
# of a strip, 8e-6 of two strips, which a unit may have.
_STRIP = 2**10

# Up to this length, one thread reads a tensor before a second thread starts.
_ONE_THREAD = 2**18

_NARROW = (torch.float32, torch.bfloat16, torch.float16)

_Array = np.ndarray[Any, Any]


def is_short(tensor: Tensor, units: Units | None) -> bool:
    """Return whether `of_short` may measure a tensor together with others."""
    return (
        0 < tensor.numel() <= _SHORT
        and not tensor.is_sparse
        and tensor.dtype in _NARROW
        and (units is None or is_cut_by_first_axis(units, tensor))
    )


def of_short(tensors: list[Tensor], rows: _Array) -> _Array:
    """Return the sums of squares of short tensors, each cut into rows of equal size."""
    side_by_side: Tensor = _flatten_dense_tensors(tensors)  # type: ignore[no-untyped-call]
    flat = side_by_side.float().numpy(force=True)
    sizes = np.array([tensor.numel() for tensor in tensors])
    lengths = (sizes // rows).repeat(rows)
    starts = lengths.cumsum() - lengths
    sums = np.add.reduceat(flat * flat, starts).astype(np.float64)
    if len(unsafe := _unsafe(sums)):  # safe sums stay unchanged bit for bit
        wide = np.add.reduceat(np.square(flat, dtype=np.float64), starts)
        sums[unsafe] = wide[unsafe]
    return sums


def of_all(tensor: Tensor) -> float:
    """Return the sum of squares of one tensor."""
    if _is_plain(tensor):
        row = tensor.numpy(force=True).reshape(1, -1)
        total = float(_in_strips(row, _by_numpy, _SHORT)[0])
        if _LEAST_SAFE < total < _MOST_SAFE:
            return total
    values = real(tensor.coalesce() if tensor.is_sparse else tensor)
    flat = _flat(values)
    if flat is not None and values.dtype in _NARROW:
        # Widening a narrow type copies it, so it is done in pieces.
        parts = (flat,) if flat.dtype == torch.float32 else torch.split(flat, PIECE)
        total = sum(float(_by_row(part.view(1, -1))[0]) for part in parts)
        if _LEAST_SAFE < total < _MOST_SAFE:
            return total
    return float(_wide(values if flat is None else flat, None).sum())


def _is_plain(tensor: Tensor) -> bool:
    """Return whether NumPy can read a tensor directly. This is the common case."""
    return (
        tensor.dtype == torch.float32
        and not tensor.is_sparse
        and tensor.is_contiguous()
        and tensor.numel() <= _ONE_THREAD
    )


def of_units(tensor: Tensor, units: Units) -> _Array:
    """Return the sum of squares of each unit of one tensor."""
    tensor = tensor.to_dense() if tensor.is_sparse else tensor
    values = real(tensor)
    if not is_cut_by_first_axis(units, tensor):
        return _squared(norms_in(tensor, units, torch.float64).reshape(-1))
    table = _table(values)
    if table is None or values.dtype not in _NARROW:
        return _wide(values, tuple(range(1, values.ndim)))
    if table.dtype == torch.float32:
        sums = _by_row(table)
    else:
        parts = torch.split(table, rows_of_a_piece(table))
        sums = np.concatenate([_by_row(part) for part in parts])
    if len(unsafe := _unsafe(sums)):
        for piece in pieces(unsafe, table):
            sums[piece] = _wide(table[torch.from_numpy(piece)], (1,))
    return sums


def _unsafe(sums: _Array) -> _Array:
    """Return which float32 sums have to be computed again in float64."""
    is_safe = (sums > _LEAST_SAFE) & (sums < _MOST_SAFE)
    return (~is_safe).nonzero()[0]


def _flat(values: Tensor) -> Tensor | None:
    """Return the numbers in memory order, or None if the memory has gaps."""
    if values.is_contiguous():
        return values.view(-1)
    order = sorted(range(values.ndim), key=values.stride, reverse=True)
    values = values.permute(order)  # channels_last, or transposed
    return values.view(-1) if values.is_contiguous() else None


def _table(values: Tensor) -> Tensor | None:
    """Return a view as a matrix, one row per index of the first axis, or None."""
    rows, size = values.shape[0], values.numel()
    flat = _flat(values)
    if flat is None or values.stride(0) * rows != size:
        return None
    return flat.view(rows, size // rows)


def _wide(values: Tensor, axes: tuple[int, ...] | None) -> _Array:
    """Return sums of squares in float64: one per row, or one per piece if None."""
    # torch copies what it widens, so it is done in pieces.
    parts = torch.split(values, rows_of_a_piece(values))
    norms = [norm_over(part, axes, torch.float64).reshape(-1) for part in parts]
    return _squared(torch.cat(norms))


def _by_row(table: Tensor) -> _Array:
    """Return the sum of squares of each row, in one pass."""
    table = table.float()
    if table.numel() <= _ONE_THREAD:
        return _in_strips(table.numpy(force=True), _by_numpy, _SHORT)
    return _in_strips(table, _by_torch, 2 * _STRIP)


def _in_strips(table: Any, squares: Callable[[Any], _Array], most: int) -> _Array:
    """Return the sum of squares of each row. Long rows are summed in strips."""
    rows, length = table.shape
    if length <= most:
        return squares(table).astype(np.float64)
    strip, parts = _STRIP, -(-length // most)
    if length <= _SHORT and length % parts == 0:  # a unit, in equal strips
        strip = length // parts
    whole = length // strip * strip
    strips = squares(table[:, :whole].reshape(rows, -1, strip))
    sums: _Array = np.add.reduce(strips, axis=1, dtype=np.float64)
    return sums if whole == length else sums + squares(table[:, whole:])


def _by_numpy(table: _Array) -> _Array:
    sums: _Array = np.vecdot(table, table)
    return sums


def _by_torch(table: Tensor) -> _Array:
    return _squared(norm_over(table, (-1,), torch.float32))


def _squared(norms: Tensor) -> _Array:
    """Return squares in float64: there, no float32 norm has a square that overflows."""
    squares: _Array = np.square(norms.numpy(force=True), dtype=np.float64)
    return squares
