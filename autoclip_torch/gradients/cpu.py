"""Measure and scale plain CPU tensors, in NumPy: only clipped gradients are written.

`squares.py` sums the squares, and `largest.py` finds the largest magnitudes.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoclip_core.clipper.units import Units
from autoclip_torch.rows.rows import ParameterRows, Rows

from . import squares
from .largest import find_largest
from .layout import (
    RowNorms,
    align_unit_scales,
    apply_scale_,
    as_real,
    is_cut_by_first_axis,
    is_plain,
    make_writable,
    split_pieces,
    with_axis,
)

# At most this many elements of short tensors are copied side by side: the cache size.
_BATCH_ELEMENTS = 2**18

# Fewer short tensors than this are faster to read one by one than to copy.
_SMALLEST_BATCH = 32

_Array = np.ndarray[Any, Any]


def measure(rows: Rows, tensors: Any) -> RowNorms:
    """Return the norm of each row as float64, and which rows have one.

    An rms norm is measured as an l2 norm.
    """
    tensors = list(tensors)
    return RowNorms(measure_norms(rows, tensors), find_observed(rows, tensors))


def measure_norms(rows: Rows, tensors: Iterable[Any]) -> _Array:
    """Return the norm of each row as float64.

    The tensors may come from a generator. Long ones are then freed one by one.
    """
    if rows.norm == "max":
        return find_largest(rows, tensors)
    norms: _Array = np.sqrt(_sum_squares(rows, tensors))
    return norms


def _sum_squares(rows: Rows, tensors: Iterable[Any]) -> _Array:
    """Return the sum of squares of each row as float64."""
    sums: _Array = np.zeros(len(rows.names))
    short: dict[int, Tensor] = {}
    may_batch = len(rows.by_parameter) >= _SMALLEST_BATCH
    with np.errstate(all="ignore"):  # the norm shows whether the sum is finite
        pairs = zip(rows.by_parameter, tensors, strict=True)
        for index, (entry, tensor) in enumerate(pairs):
            if tensor is None or entry.start == entry.stop:
                continue
            if may_batch and squares.is_short(tensor, entry.units):
                short[index] = tensor
            else:
                _add_one(sums, entry, tensor)
        if len(short) < _SMALLEST_BATCH:
            for index, tensor in short.items():
                _add_one(sums, rows.by_parameter[index], tensor)
        else:
            _add_short(sums, rows, short)
    return sums


def scale_(rows: Rows, gradients: Any, scales: _Array) -> None:
    """Multiply the gradients by the scale of their row, in place.

    A gradient whose scale is 1 is neither read nor written.
    """
    is_touched = scales != 1
    if not is_touched.any():
        return
    index = rows.index
    factors = index.split(torch.from_numpy(scales))
    touched = index.count(is_touched).tolist()
    is_multiplied = index.count(is_touched & (scales != 0)) == index.counts
    products: tuple[list[Tensor], list[Tensor]] = ([], [])
    entries = zip(
        rows.by_parameter, gradients, touched, is_multiplied.tolist(), strict=True
    )
    for entry, gradient, is_clipped, is_product in entries:
        if gradient is None or not is_clipped:
            continue
        values, factor = with_axis(gradient), factors[entry.start]
        if entry.units is not None or not is_plain(gradient):
            gradient = make_writable(entry, gradient)
            values, factor = _align(gradient, factor, entry.units)
        # A negated view, such as the imaginary part of a conjugate, is scaled alone.
        if is_product and values.dtype.itemsize >= 4 and not values.is_neg():
            products[0].append(values)
            products[1].append(factor)
        elif entry.units is None:
            _scale_whole_(values, float(factor))
        else:
            _scale_units_(gradient, entry.units, values, factor)
    if products[0]:
        torch._foreach_mul_(*products)


def _add_one(sums: _Array, entry: ParameterRows, tensor: Tensor) -> None:
    """Add the sums of squares of one tensor to those of its rows."""
    if entry.units is None:
        sums[entry.start] += squares.sum_tensor(tensor)
    else:
        sums[entry.start : entry.stop] += squares.sum_units(tensor, entry.units)


def _add_short(sums: _Array, rows: Rows, short: dict[int, Tensor]) -> None:
    """Add the sums of squares of short tensors, many at a time."""
    ends = np.cumsum([tensor.numel() for tensor in short.values()])
    cuts = np.flatnonzero(np.diff(ends // _BATCH_ELEMENTS)) + 1
    for batch in np.split(list(short), cuts):
        is_in_batch = np.zeros(len(rows.by_parameter), np.bool_)
        is_in_batch[batch] = True
        counts = rows.index.counts[batch]
        batch_sums = squares.sum_short([short[index] for index in batch], counts)
        np.add.at(sums, rows.index.get_rows(is_in_batch), batch_sums)


def find_observed(rows: Rows, tensors: Sequence[Tensor | None]) -> _Array:
    """Return which rows have a tensor."""
    is_present = [tensor is not None for tensor in tensors]
    if all(is_present):
        return np.ones(len(rows.names), np.bool_)
    observed: _Array = np.zeros(len(rows.names), np.bool_)
    observed[rows.index.get_rows(np.array(is_present))] = True
    return observed


def _align(
    gradient: Tensor, scales: Tensor, units: Units | None
) -> tuple[Tensor, Tensor]:
    """Return a gradient's elements and its scales, in shapes that broadcast."""
    if units is not None:
        return align_unit_scales(gradient, scales, units)
    return with_axis(as_real(gradient)), scales


def _scale_whole_(values: Tensor, scale: float) -> None:
    """Scale one gradient, or set it to 0.

    Half precision is scaled alone: together with others, the scale would be rounded to
    half precision first.
    """
    if scale == 0:
        values.zero_()
    else:
        values.mul_(scale)


def _scale_units_(
    gradient: Tensor, units: Units, values: Tensor, scales: Tensor
) -> None:
    """Scale only those units of a gradient that exceed their threshold."""
    if gradient.is_sparse or not is_cut_by_first_axis(units, gradient):
        apply_scale_(values, scales)
        return
    touched = (scales != 1).view(-1).numpy().nonzero()[0]
    for piece in split_pieces(touched, values):
        index = torch.from_numpy(piece)
        copy = values[index]
        apply_scale_(copy, scales[index])
        values[index] = copy
