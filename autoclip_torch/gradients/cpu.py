"""Measure and scale plain CPU tensors, in NumPy: only clipped gradients are written.

`squares.py` sums the squares.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoclip_core.clipper.units import Units
from autoclip_torch.rows.row_index import RowIndex
from autoclip_torch.rows.rows import ParameterRows, Rows

from . import squares
from .layout import (
    RowNorms,
    align_unit_scales,
    apply_scale_,
    as_measurable,
    as_real,
    get_unit_norms,
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
    tensors, norms = list(tensors), RunningNorms(rows)
    norms.add(rows.by_parameter, tensors)
    return RowNorms(norms.compute(), find_observed(rows, tensors))


class RunningNorms:
    """The norm of each row, of tensors that are added in several calls."""

    def __init__(self, rows: Rows) -> None:
        self._takes_largest = rows.norm == "max"
        self._totals: _Array = np.zeros(len(rows.names))

    def add(
        self, entries: Sequence[ParameterRows], tensors: Iterable[Tensor | None]
    ) -> None:
        """Add tensors to the rows of their parameters."""
        add_ = _raise_to_largest_ if self._takes_largest else _add_squares_
        with np.errstate(all="ignore"):  # the norm shows whether the sum is finite
            add_(self._totals, entries, tensors)

    def compute(self) -> _Array:
        """Return the norms as float64. A NaN makes a largest magnitude infinite."""
        totals = self._totals
        if self._takes_largest:
            return np.where(np.isnan(totals), np.inf, totals)
        norms: _Array = np.sqrt(totals)
        return norms


def _raise_to_largest_(
    largest: _Array, entries: Iterable[ParameterRows], tensors: Iterable[Any]
) -> None:
    """Raise each row to the largest magnitude of its tensors, in place, or to NaN.

    torch's own norm of infinite order takes 25 times as long, because it uses no vector
    instructions.
    """
    for entry, tensor in zip(entries, tensors, strict=True):
        if tensor is not None and entry.start < entry.stop:
            span = slice(entry.start, entry.stop)
            largest[span] = np.maximum(
                largest[span], _find_largest(tensor, entry.units)
            )


def _find_largest(tensor: Tensor, units: Units | None) -> Any:
    """Return the largest magnitude of one tensor, or of each of its units."""
    if units is None:
        tensor = tensor.coalesce() if tensor.is_sparse else tensor
        low, high = torch.aminmax(as_measurable(tensor, np.inf))
        return max(-float(low), float(high))
    tensor = tensor.to_dense() if tensor.is_sparse else tensor
    if not is_cut_by_first_axis(units, tensor) or tensor.numel() == 0:
        norms = get_unit_norms(tensor, units, torch.float64, np.inf)
        return norms.reshape(-1).numpy(force=True)
    table = as_measurable(tensor, np.inf).flatten(1)
    low, high = torch.aminmax(table, dim=1)
    return torch.maximum(-low, high).double().numpy(force=True)


def _add_squares_(
    sums: _Array, entries: Sequence[ParameterRows], tensors: Iterable[Tensor | None]
) -> None:
    short: list[tuple[ParameterRows, Tensor]] = []
    may_batch = len(entries) >= _SMALLEST_BATCH
    for entry, tensor in zip(entries, tensors, strict=True):
        if tensor is None or entry.start == entry.stop:
            continue
        if may_batch and squares.is_short(tensor, entry.units):
            short.append((entry, tensor))
        else:
            _add_one(sums, entry, tensor)
    if len(short) < _SMALLEST_BATCH:
        for entry, tensor in short:
            _add_one(sums, entry, tensor)
    else:
        _add_short(sums, short)


def scale_(rows: Rows, gradients: Any, scales: _Array) -> None:
    """Multiply the gradients by the scale of their row, in place.

    A gradient whose scale is 1 is neither read nor written.
    """
    is_touched = scales != 1
    if not np.count_nonzero(is_touched):  # `any` takes twice as long for one row
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
    if entry.units is None:
        sums[entry.start] += squares.sum_tensor(tensor)
    else:
        sums[entry.start : entry.stop] += squares.sum_units(tensor, entry.units)


def _add_short(sums: _Array, short: Sequence[tuple[ParameterRows, Tensor]]) -> None:
    """Add the sums of squares of short tensors, many at a time."""
    ends = np.cumsum([tensor.numel() for _, tensor in short])
    cuts = np.flatnonzero(np.diff(ends // _BATCH_ELEMENTS)) + 1
    for start, stop in pairwise([0, *cuts, len(short)]):
        entries, tensors = zip(*short[start:stop], strict=True)
        index = RowIndex([(entry.start, entry.stop) for entry in entries], {})
        np.add.at(sums, index.rows, squares.sum_short(tensors, index.counts))


def find_observed(rows: Rows, tensors: Sequence[Any]) -> _Array:
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

    Half precision is scaled alone, by a number: a scale in a float32 tensor would widen
    a copy of the whole gradient first.
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
