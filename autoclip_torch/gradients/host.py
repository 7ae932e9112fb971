"""On the host norms are plain numbers, and only what exceeds its limit is written.

How they are measured is told in `squares.py`.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoclip_core.clipper.units import Units
from autoclip_torch.rows.rows import ParameterRows, Rows

from . import squares
from .layout import (
    by_first_axis,
    pieces,
    real,
    select_,
    unit_scales,
    with_an_axis,
    writable,
)

# So many numbers of short tensors are copied side by side: they stay in the cache.
_SIDE_BY_SIDE = 2**18

# So few short tensors are read one by one sooner than they are copied.
_FEW = 32

_Array = np.ndarray[Any, Any]


def norms(rows: Rows, tensors: Any) -> tuple[_Array, _Array]:
    """Return the norm of each row as float64, and which rows have one."""
    tensors = list(tensors)
    sums = np.zeros(len(rows.names))
    short: list[int] = []
    with np.errstate(all="ignore"):  # what is not finite is told by the norm
        for place, (entry, tensor) in enumerate(
            zip(rows.by_parameter, tensors, strict=True)
        ):
            if tensor is None or entry.start == entry.stop:
                continue
            if squares.is_short(tensor, entry.units):
                short.append(place)
            else:
                _add_one(sums, entry, tensor)
        if len(short) < _FEW:
            for place in short:
                _add_one(sums, rows.by_parameter[place], tensors[place])
        else:
            _add_short(sums, rows, tensors, short)
        return np.sqrt(sums), _observed(rows, tensors)


def scale_(rows: Rows, gradients: Any, scales: _Array) -> None:
    """Write only what exceeds its limit; a scale of 1 does not even read."""
    touched = scales != 1
    if not touched.any():
        return
    index = rows.index
    factors = index.parts(torch.from_numpy(scales))
    some = index.count(touched).tolist()
    every = (index.count(touched & (scales != 0)) == index.counts).tolist()
    products: list[Tensor] = []
    by: list[Tensor] = []
    entries = zip(rows.by_parameter, gradients, some, every, strict=True)
    for entry, gradient, has_some, has_every in entries:
        if gradient is None or not has_some:
            continue
        gradient, factor = writable(entry, gradient), factors[entry.start]
        values, factor = _aligned(gradient, factor, entry.units)
        # What is negated, as the imaginary part of a conjugate is, goes alone.
        if has_every and values.dtype.itemsize >= 4 and not values.is_neg():
            products.append(values)
            by.append(factor)
        elif entry.units is None:
            _scale_whole_(values, float(factor))
        else:
            _scale_some_(gradient, entry.units, values, factor)
    if products:
        torch._foreach_mul_(products, by)


def _add_one(sums: _Array, entry: ParameterRows, tensor: Tensor) -> None:
    """Add the sums of squares of one tensor to those of its rows."""
    if entry.units is None:
        sums[entry.start] += squares.of_all(tensor)
    else:
        sums[entry.start : entry.stop] += squares.of_units(tensor, entry.units)


def _add_short(
    sums: _Array, rows: Rows, tensors: list[Tensor], short: list[int]
) -> None:
    """Add the sums of squares of short tensors, many at a time."""
    ends = np.cumsum([tensors[place].numel() for place in short])
    for batch in np.split(short, np.flatnonzero(np.diff(ends // _SIDE_BY_SIDE)) + 1):
        some = np.zeros(len(tensors), np.bool_)
        some[batch] = True
        counts = rows.index.counts[batch]
        found = squares.of_short([tensors[place] for place in batch], counts)
        np.add.at(sums, rows.index.rows(some), found)


def _observed(rows: Rows, tensors: list[Tensor | None]) -> _Array:
    """Return which rows have a tensor."""
    there = np.array([tensor is not None for tensor in tensors], np.bool_)
    observed: _Array = np.full(len(rows.names), there.all())
    if not there.all():
        observed[rows.index.rows(there)] = True
    return observed


def _aligned(
    gradient: Tensor, scales: Tensor, units: Units | None
) -> tuple[Tensor, Tensor]:
    """Return a gradient's numbers and its scales, in shapes that broadcast."""
    if units is not None:
        return unit_scales(gradient, scales, units)
    return with_an_axis(real(gradient)), scales


def _scale_whole_(values: Tensor, scale: float) -> None:
    """Remove a gradient, or scale one that cannot go together with others.

    Of half precision it cannot, as the scale would be rounded to that first.
    """
    if scale == 0:
        values.zero_()
    else:
        values.mul_(scale)


def _scale_some_(
    gradient: Tensor, units: Units, values: Tensor, scales: Tensor
) -> None:
    """Scale only those units of a gradient that exceed their limit."""
    if gradient.is_sparse or not by_first_axis(units, gradient):
        select_(values, scales)
        return
    touched = (scales != 1).view(-1).numpy().nonzero()[0]
    for some in pieces(touched, values):
        index = torch.from_numpy(some)
        chosen = values[index]
        select_(chosen, scales[index])
        values[index] = chosen
