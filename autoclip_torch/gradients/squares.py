"""Sums of squares on the host: each number is read once, by whoever reads it fastest.

| numbers in a tensor | who reads them                                               |
|---------------------|--------------------------------------------------------------|
| up to 2^13          | NumPy, many tensors at a time, after a copy side by side     |
| up to 2^18          | NumPy's `vecdot`: one thread, as a second one comes too late |
| more                | torch, in all its threads                                    |

float32 comes first; where its squares are not safe, float64 does it again.
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
    by_first_axis,
    norm_over,
    norms_in,
    pieces,
    real,
    rows_of_a_piece,
)

# Between these, the squares of float32 numbers lost nothing to overflow or to subnormal
# numbers when they were summed; outside, and only there, they are summed in float64.
_LEAST_SAFE, _MOST_SAFE = 1e-25, 1e38

# As many squares are summed in float32 at most. The norm of 10 million numbers would be
# off by up to 1e-3; what is longer is cut into strips, and float64 adds up their sums.
_SHORT = 2**13

# So long is a strip. Beside one large number in each of the few sums that torch keeps
# of a row, the small ones get lost: of 2**13 numbers 3e-5 of the norm, of so many 4e-6,
# and of twice as many, which a unit may have, 8e-6.
_STRIP = 2**10

# Up to here one thread has read a tensor before another one is awake.
_ONE_THREAD = 2**18

_NARROW = (torch.float32, torch.bfloat16, torch.float16)

_Array = np.ndarray[Any, Any]


def is_short(tensor: Tensor, units: Units | None) -> bool:
    """Tell whether `of_short` may measure it together with others."""
    return (
        0 < tensor.numel() <= _SHORT
        and not tensor.is_sparse
        and tensor.dtype in _NARROW
        and (units is None or by_first_axis(units, tensor))
    )


def of_short(tensors: list[Tensor], rows: _Array) -> _Array:
    """Return the sums of squares of short tensors, each cut evenly into its rows."""
    side_by_side: Tensor = _flatten_dense_tensors(tensors)  # type: ignore[no-untyped-call]
    flat = side_by_side.float().numpy(force=True)
    sizes = np.array([tensor.numel() for tensor in tensors])
    lengths = (sizes // rows).repeat(rows)
    starts = lengths.cumsum() - lengths
    sums = np.add.reduceat(flat * flat, starts).astype(np.float64)
    if len(unsafe := _unsafe(sums)):  # the others keep their bits
        again = np.add.reduceat(np.square(flat, dtype=np.float64), starts)
        sums[unsafe] = again[unsafe]
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
        # A narrow type is widened as a copy, so in pieces.
        parts = (flat,) if flat.dtype == torch.float32 else torch.split(flat, PIECE)
        total = sum(float(_by_row(part.view(1, -1))[0]) for part in parts)
        if _LEAST_SAFE < total < _MOST_SAFE:
            return total
    return float(_wide(values if flat is None else flat, None).sum())


def _is_plain(tensor: Tensor) -> bool:
    """Tell whether NumPy may read it as it is: most are so, and take the short way."""
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
    if not by_first_axis(units, tensor):
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
        for some in pieces(unsafe, table):
            sums[some] = _wide(table[torch.from_numpy(some)], (1,))
    return sums


def _unsafe(sums: _Array) -> _Array:
    """Return where sums, taken in float32, are to be taken again in float64."""
    safe = (sums > _LEAST_SAFE) & (sums < _MOST_SAFE)
    return (~safe).nonzero()[0]


def _flat(values: Tensor) -> Tensor | None:
    """Return the numbers in the order of memory, or None where it has gaps."""
    if values.is_contiguous():
        return values.view(-1)
    order = sorted(range(values.ndim), key=values.stride, reverse=True)
    values = values.permute(order)  # channels_last, or transposed
    return values.view(-1) if values.is_contiguous() else None


def _table(values: Tensor) -> Tensor | None:
    """Return the numbers of each index of the first axis, if they lie side by side."""
    rows, size = values.shape[0], values.numel()
    flat = _flat(values)
    if flat is None or values.stride(0) * rows != size:
        return None
    return flat.view(rows, size // rows)


def _wide(values: Tensor, axes: tuple[int, ...] | None) -> _Array:
    """Return sums of squares in float64: one per row, or with None one per piece."""
    # torch widens what it is given as a copy, so in pieces.
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
    """Return the sum of squares of each row, in float64 over strips of long ones."""
    rows, length = table.shape
    if length <= most:
        return squares(table).astype(np.float64)
    strip, parts = _STRIP, -(-length // most)
    if length <= _SHORT and length % parts == 0:  # a unit, without a remainder
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
    """Return squares in float64, of which a norm in float32 is never too large."""
    squares: _Array = np.square(norms.numpy(force=True), dtype=np.float64)
    return squares
