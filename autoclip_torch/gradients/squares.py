"""Sums of squares on the CPU. Each element is read once, in the fastest way.

| elements of a tensor | summed by                       |
|----------------------|---------------------------------|
| up to 2^13           | NumPy, many tensors at a time   |
| up to 2^18           | NumPy's `vecdot`, in one thread |
| more                 | torch, in all its threads       |

Tensors of the first kind are copied side by side. For tensors of the second kind,
starting a second thread takes longer than the sum. Sums are computed
in float32. If a sum may have lost squares to overflow or underflow, it is computed
again in float64.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from autoclip_core.clipper.units import Units

from .layout import (
    PIECE,
    as_real,
    compute_norm,
    count_piece_rows,
    get_unit_norms,
    is_cut_by_first_axis,
    is_plain,
    split_pieces,
)

# A float32 sum of squares between these limits has lost nothing to overflow or to
# subnormal numbers. Sums outside the limits, and only these, are computed in float64.
_SMALLEST_EXACT, _LARGEST_EXACT = 1e-25, 1e38

# At most this many squares are summed in float32. Longer tensors are cut into strips,
# whose sums are added in float64. Without strips, the norm of 10 million elements would
# be off by up to 1e-3.
_SHORT = 2**13

# The length of a strip. torch keeps a few partial sums for each row. If each of them
# holds a large square, small squares are lost: 3e-5 of the norm of 2**13 elements, 4e-6
# of a strip, 8e-6 of two strips, which a unit may have.
_STRIP = 2**10

# Up to this length, one thread reads a tensor before a second thread starts.
_ONE_THREAD = 2**18

_NARROW = (torch.float32, torch.bfloat16, torch.float16)

_Array = np.ndarray[Any, Any]


def is_short(tensor: Tensor, units: Units | None) -> bool:
    """Return whether `sum_short` may measure a tensor together with others."""
    return (
        0 < tensor.numel() <= _SHORT
        and not tensor.is_sparse
        and tensor.dtype in _NARROW
        and (units is None or is_cut_by_first_axis(units, tensor))
    )


def sum_short(tensors: Sequence[Tensor], rows: _Array) -> _Array:
    """Return the sums of squares of short tensors, each cut into rows of equal size."""
    side_by_side: Tensor = _flatten_dense_tensors(tensors)  # type: ignore[no-untyped-call]
    flat = side_by_side.float().numpy(force=True)
    sizes = np.array([tensor.numel() for tensor in tensors])
    lengths = (sizes // rows).repeat(rows)
    starts = lengths.cumsum() - lengths
    sums = np.add.reduceat(flat * flat, starts).astype(np.float64)
    if len(inexact := _find_inexact(sums)):  # exact sums stay unchanged bit for bit
        wide = np.add.reduceat(np.square(flat, dtype=np.float64), starts)
        sums[inexact] = wide[inexact]
    return sums


def sum_tensor(tensor: Tensor) -> float:
    """Return the sum of squares of one tensor."""
    if tensor.numel() <= _ONE_THREAD and is_plain(tensor):
        total = _sum_piece(tensor)
        if _is_exact(total):
            return total
    values = as_real(tensor.coalesce() if tensor.is_sparse else tensor)
    flat = _flatten(values)
    if flat is not None and values.dtype in _NARROW:
        # Widening a narrow type copies it, so it is done in pieces.
        parts = (flat,) if flat.dtype == torch.float32 else torch.split(flat, PIECE)
        total = sum(float(_sum_rows(part.view(1, -1))[0]) for part in parts)
        if _is_exact(total):
            return total
    return float(_sum_wide(values if flat is None else flat, None).sum())


def _sum_piece(tensor: Tensor) -> float:
    """Return the sum of squares of at most 2^18 float32 numbers, if it is exact."""
    flat = tensor.numpy(force=True).reshape(-1)
    if flat.size <= _SHORT:
        return float(flat.dot(flat))  # the bits of `vecdot`, in less time
    return float(_sum_in_strips(flat[None], _sum_by_numpy, _SHORT)[0])


def _is_exact(total: Any) -> Any:
    """Return whether a sum of float32 squares lost none to overflow or underflow."""
    return (total > _SMALLEST_EXACT) & (total < _LARGEST_EXACT)


def sum_units(tensor: Tensor, units: Units) -> _Array:
    """Return the sum of squares of each unit of one tensor."""
    tensor = tensor.to_dense() if tensor.is_sparse else tensor
    values = as_real(tensor)
    if not is_cut_by_first_axis(units, tensor):
        return _square(get_unit_norms(tensor, units, torch.float64).reshape(-1))
    table = _as_matrix(values)
    if table is None or values.dtype not in _NARROW:
        return _sum_wide(values, tuple(range(1, values.ndim)))
    if table.dtype == torch.float32:
        sums = _sum_rows(table)
    else:
        parts = torch.split(table, count_piece_rows(table))
        sums = np.concatenate([_sum_rows(part) for part in parts])
    if len(inexact := _find_inexact(sums)):
        for piece in split_pieces(inexact, table):
            sums[piece] = _sum_wide(table[torch.from_numpy(piece)], (1,))
    return sums


def _find_inexact(sums: _Array) -> _Array:
    """Return which float32 sums have to be computed again in float64."""
    inexact: _Array = (~_is_exact(sums)).nonzero()[0]
    return inexact


def _flatten(values: Tensor) -> Tensor | None:
    """Return the elements in memory order, or None if the memory has gaps."""
    if values.is_contiguous():
        return values.view(-1)
    order = sorted(range(values.ndim), key=values.stride, reverse=True)
    values = values.permute(order)  # channels_last, or transposed
    return values.view(-1) if values.is_contiguous() else None


def _as_matrix(values: Tensor) -> Tensor | None:
    """Return a view as a matrix, one row per index of the first axis, or None."""
    rows, size = values.shape[0], values.numel()
    flat = _flatten(values)
    if flat is None or values.stride(0) * rows != size:
        return None
    return flat.view(rows, size // rows)


def _sum_wide(values: Tensor, axes: tuple[int, ...] | None) -> _Array:
    """Return sums of squares in float64: one per row, or one per piece if None."""
    # torch copies what it widens, so it is done in pieces.
    parts = torch.split(values, count_piece_rows(values))
    norms = [compute_norm(part, axes, torch.float64).reshape(-1) for part in parts]
    return _square(torch.cat(norms))


def _sum_rows(table: Tensor) -> _Array:
    """Return the sum of squares of each row, in one pass."""
    table = table.float()
    if table.numel() <= _ONE_THREAD:
        return _sum_in_strips(table.numpy(force=True), _sum_by_numpy, _SHORT)
    return _sum_in_strips(table, _sum_by_torch, 2 * _STRIP)


def _sum_in_strips(table: Any, squares: Callable[[Any], _Array], most: int) -> _Array:
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


def _sum_by_numpy(table: _Array) -> _Array:
    sums: _Array = np.vecdot(table, table)
    return sums


def _sum_by_torch(table: Tensor) -> _Array:
    return _square(compute_norm(table, (-1,), torch.float32))


def _square(norms: Tensor) -> _Array:
    """Return squares in float64: there, no float32 norm has a square that overflows."""
    squares: _Array = np.square(norms.numpy(force=True), dtype=np.float64)
    return squares
