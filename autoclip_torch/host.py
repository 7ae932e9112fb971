"""On the host norms are plain numbers, and only what exceeds its limit is written.

Every number is read once, at the speed of the memory, and many small tensors in one
call. float32 comes first; where its squares are not safe, float64 does it again.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoclip_core.units import Units, over_all_but

from .rows import Rows, Slot
from .values import norm_over, norms_in, real, select_, stored, unit_scales, writable

# Between these, the squares of float32 numbers lost nothing to overflow or to subnormal
# numbers when they were summed; outside, and only there, they are summed in float64.
_LEAST_SAFE, _MOST_SAFE = 1e-25, 1e38

# As many squares are summed in float32, by `dot` or along a row. The norm of 10 million
# numbers would be off by up to 1e-3; of so many, the rows are added in float64.
_ROW = 2**13

# So many numbers are copied at a time, where they have to be.
_PIECE = 2**20

_NARROW = (torch.float32, torch.bfloat16, torch.float16)

_Array = np.ndarray[Any, Any]


def norms(rows: Rows, tensors: Any) -> tuple[_Array, _Array]:
    """Return the norm of each row as float64, and which rows have one."""
    squares = np.zeros(len(rows.names))
    observed = np.zeros(len(rows.names), np.bool_)
    short: list[Tensor] = []
    starts: list[int] = []
    for slot, tensor in zip(rows.slots, tensors, strict=True):
        if tensor is None:
            continue
        observed[slot.start : slot.stop] = True
        if slot.units is not None and slot.stop - slot.start != 1:
            with np.errstate(over="ignore"):  # float64 gradients may exceed float32
                own = np.square(_unit_norms(tensor, slot.units))
            squares[slot.start : slot.stop] = own
        elif _is_short(tensor):
            short.append(tensor)
            starts.append(slot.start)
        else:  # a row may hold several tensors
            norm = _norm(tensor)
            squares[slot.start] += norm * norm
    if short:
        np.add.at(squares, starts, np.square(_short_norms(short)))
    return np.sqrt(squares), observed


def scale_(rows: Rows, gradients: Any, scales: _Array) -> None:
    """Write only what exceeds its limit; a scale of 1 does not even read."""
    if not (scales != 1).any():
        return
    factors, numbers = [], scales.tolist()
    scaled: list[Tensor] = []
    gone: list[Tensor] = []
    for slot, gradient in zip(rows.slots, gradients, strict=True):
        if gradient is None:
            continue
        if slot.units is not None and slot.stop - slot.start != 1:
            _scale_units_(slot, gradient, slot.units, scales[slot.start : slot.stop])
        elif (factor := numbers[slot.start]) == 0:
            gone.append(stored(writable(slot, gradient)))
        elif factor != 1:
            values = stored(writable(slot, gradient))
            if values.dtype in (torch.bfloat16, torch.float16):
                values.mul_(factor)  # in one call with others it would be rounded first
            else:
                scaled.append(values)
                factors.append(factor)
    if scaled:
        torch._foreach_mul_(scaled, factors)
    if gone:
        torch._foreach_zero_(gone)


def _is_short(tensor: Tensor) -> bool:
    """Tell whether one call may measure it together with others."""
    dense = tensor.layout is torch.strided
    return dense and tensor.numel() <= _ROW and tensor.dtype in _NARROW


def _short_norms(tensors: list[Tensor]) -> _Array:
    found = torch.stack(torch._foreach_norm(tensors, 2, torch.float32)).double()
    norms: _Array = found.numpy()
    for place in np.flatnonzero(_unsafe(norms)).tolist():
        norms[place] = norm_over(tensors[place], None, torch.float64).item()
    return norms


def _unsafe(norms: _Array) -> Any:
    """Tell which norms, taken in float32, are to be taken again in float64."""
    return ~((norms > math.sqrt(_LEAST_SAFE)) & (norms < math.sqrt(_MOST_SAFE)))


def _norm(tensor: Tensor) -> float:
    """Return the norm of one tensor; float32 first, float64 where that is not safe."""
    values = real(tensor.coalesce() if tensor.is_sparse else tensor)
    flat = _flat(values)
    if flat is not None and values.dtype != torch.float64:
        # A narrow type is widened as a copy, so in pieces.
        parts = (flat,) if flat.dtype == torch.float32 else torch.split(flat, _PIECE)
        squares = sum(map(_squares, parts))
        if _LEAST_SAFE < squares < _MOST_SAFE:
            return math.sqrt(squares)
    # torch widens what it is given as a copy, so in pieces.
    whole = values if flat is None else flat
    pieces = torch.split(whole, _rows_of_a_piece(whole))
    again = [float(norm_over(piece, None, torch.float64)) for piece in pieces]
    return math.sqrt(sum(norm * norm for norm in again))


def _rows_of_a_piece(values: Tensor) -> int:
    """Return how many entries of the first axis have about `_PIECE` numbers."""
    return max(1, _PIECE * len(values) // max(1, values.numel()))


def _flat(values: Tensor) -> Tensor | None:
    """Return the numbers in the order of memory, or None where it has gaps."""
    if not values.is_contiguous():  # channels_last, or transposed
        order = sorted(range(values.ndim), key=values.stride, reverse=True)
        values = values.permute(order)
    return values.view(-1) if values.is_contiguous() else None


def _squares(flat: Tensor) -> float:
    """Return the sum of squares, in one pass at memory bandwidth."""
    if flat.numel() <= _ROW:
        wide = flat.float()
        return float(torch.dot(wide, wide))
    whole = flat.numel() // _ROW * _ROW
    norms = norm_over(flat[:whole].view(-1, _ROW), (1,), torch.float32).double()
    rest = _squares(flat[whole:]) if whole < flat.numel() else 0.0
    return float(torch.dot(norms, norms)) + rest


def _unit_norms(tensor: Tensor, units: Units) -> _Array:
    """Return the norm of each unit; as above, float32 first."""
    tensor = tensor.to_dense() if tensor.is_sparse else tensor
    values = real(tensor)
    if units != over_all_but(tensor.shape, 0) or values.dtype == torch.float64:
        found: _Array = norms_in(tensor, units, torch.float64).reshape(-1).numpy()
        return found
    axes = tuple(range(1, values.ndim))
    if values.numel() <= _ROW * len(values):
        narrow = values.dtype != torch.float32
        step = _rows_of_a_piece(values) if narrow else max(1, len(values))
        parts = torch.split(values, step)
        rows = [norm_over(part, axes, torch.float32) for part in parts]
        norms = torch.cat(rows).double().numpy()
    else:
        parts = torch.split(values.flatten(1), _ROW, dim=1)
        sums = [norm_over(part, (1,), torch.float32).double() for part in parts]
        norms = norm_over(torch.stack(sums), (0,), torch.float64).numpy()
    for some in _pieces(np.flatnonzero(_unsafe(norms)), values):
        chosen = values[torch.from_numpy(some)]
        norms[some] = norm_over(chosen, axes, torch.float64).numpy()
    return norms


def _scale_units_(slot: Slot, gradient: Tensor, units: Units, scales: _Array) -> None:
    """Scale a gradient by its units."""
    touched = scales != 1
    if not touched.any():
        return
    gradient = writable(slot, gradient)
    values, factors = unit_scales(gradient, torch.from_numpy(scales), units)
    if scales.all() and touched.all() and values.dtype.itemsize >= 4:
        values.mul_(factors)
    elif not gradient.is_sparse and units == over_all_but(gradient.shape, 0):
        for some in _pieces(np.flatnonzero(touched), values):
            index = torch.from_numpy(some)
            chosen = values[index]
            select_(chosen, factors[index])
            values[index] = chosen
    else:
        select_(values, factors)


def _pieces(rows: _Array, values: Tensor) -> Iterator[_Array]:
    """Yield the rows in parts, so that a copy of each takes little memory."""
    step = _rows_of_a_piece(values)
    for start in range(0, len(rows), step):
        yield rows[start : start + step]
