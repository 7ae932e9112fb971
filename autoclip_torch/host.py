"""On the host norms are plain numbers, and only what exceeds its limit is written.

How they are measured is told in `squares.py`.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoclip_core.units import Units

from . import squares
from .rows import Rows, Slot
from .values import by_first_axis, pieces, select_, stored, unit_scales, writable

# So many numbers of short tensors are copied side by side: they stay in the cache.
_SIDE_BY_SIDE = 2**18

_Array = np.ndarray[Any, Any]


def norms(rows: Rows, tensors: Any) -> tuple[_Array, _Array]:
    """Return the norm of each row as float64, and which rows have one."""
    sums = np.zeros(len(rows.names))
    observed = np.zeros(len(rows.names), np.bool_)
    short: list[tuple[Slot, Tensor]] = []
    waiting = 0
    with np.errstate(all="ignore"):  # what is not finite is told by the norm
        for slot, tensor in zip(rows.slots, tensors, strict=True):
            if tensor is None or slot.start == slot.stop:
                continue
            observed[slot.start : slot.stop] = True
            units = _units(slot)
            if squares.is_short(tensor, units):
                short.append((slot, tensor))
                waiting += tensor.numel()
                if waiting > _SIDE_BY_SIDE:
                    _add_short(sums, short)
                    short, waiting = [], 0
            elif units is None:
                sums[slot.start] += squares.of_all(tensor)
            else:
                sums[slot.start : slot.stop] = squares.of_units(tensor, units)
        if short:
            _add_short(sums, short)
        return np.sqrt(sums), observed


def scale_(rows: Rows, gradients: Any, scales: _Array) -> None:
    """Write only what exceeds its limit; a scale of 1 does not even read."""
    if not (scales != 1).any():
        return
    whole: list[tuple[Slot, Tensor]] = []
    for slot, gradient in zip(rows.slots, gradients, strict=True):
        if gradient is None or slot.start == slot.stop:
            continue
        if (units := _units(slot)) is None:
            whole.append((slot, gradient))
        else:
            _scale_units_(slot, gradient, units, scales[slot.start : slot.stop])
    if whole:
        _scale_whole_(whole, scales[[slot.start for slot, _ in whole]])


def _units(slot: Slot) -> Units | None:
    """Return how a parameter is cut, if into more than one row."""
    return slot.units if slot.stop - slot.start > 1 else None


def _add_short(sums: _Array, short: list[tuple[Slot, Tensor]]) -> None:
    """Add the sums of squares of short tensors to those of their rows."""
    starts = np.array([slot.start for slot, _ in short])
    counts = np.array([slot.stop for slot, _ in short]) - starts
    found = squares.of_short([tensor for _, tensor in short], counts)
    before = counts.cumsum() - counts
    np.add.at(sums, (starts - before).repeat(counts) + np.arange(len(found)), found)


def _scale_whole_(pairs: list[tuple[Slot, Tensor]], scales: _Array) -> None:
    """Scale gradients of one row each, in one call."""
    scaled: list[Tensor] = []
    factors: list[Tensor] = []
    gone: list[Tensor] = []
    # As a tensor a factor takes a quarter of the time that a number would take.
    both = zip(scales.tolist(), torch.from_numpy(scales).unbind(), strict=True)
    for (slot, gradient), (number, factor) in zip(pairs, both, strict=True):
        if number == 1:
            continue
        values = stored(writable(slot, gradient))
        if number == 0:
            gone.append(values)
        elif values.dtype in (torch.bfloat16, torch.float16):
            values.mul_(number)  # in one call with others it would be rounded first
        else:
            scaled.append(values)
            factors.append(factor)
    if scaled:
        torch._foreach_mul_(scaled, factors)
    if gone:
        torch._foreach_zero_(gone)


def _scale_units_(slot: Slot, gradient: Tensor, units: Units, scales: _Array) -> None:
    """Scale a gradient by its units."""
    touched = scales != 1
    count = np.count_nonzero(touched)
    if not count:
        return
    gradient = writable(slot, gradient)
    values, factors = unit_scales(gradient, torch.from_numpy(scales), units)
    every = count == np.count_nonzero(scales) == len(scales)
    if every and values.dtype.itemsize >= 4:
        values.mul_(factors)
    elif not gradient.is_sparse and by_first_axis(units, gradient):
        for some in pieces(np.flatnonzero(touched), values):
            index = torch.from_numpy(some)
            chosen = values[index]
            select_(chosen, factors[index])
            values[index] = chosen
    else:
        select_(values, factors)
