"""The two verbs: the norm of these gradients, and these gradients times this.

Both come twice. On the host norms are plain numbers, so that a decision costs no
dispatch, and only what exceeds its limit is written. On an accelerator, and for any
tensor subclass, nothing may be read back: everything is selected on the device.
"""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoclip_core.units import (
    Units,
    over_all_but,
    split_shape,
    unit_count,
    unit_shape,
)

from .rows import Rows, Slot

# Between these, the squares of float32 numbers lost nothing to overflow or to subnormal
# numbers when they were summed; outside, and only there, they are summed in float64.
_LEAST_SAFE, _MOST_SAFE = 1e-25, 1e38

# As many squares are summed in float32, by `dot` or along a row. The norm of 10 million
# numbers would be off by up to 1e-3; of so many, the rows are added in float64.
_ROW = 2**13

# So many numbers of a narrower type are widened at a time.
_PIECE = 2**20

Gradients = Iterable[Tensor | None]
"""One tensor per slot of the rows; None where a parameter has no gradient."""


def on_host(tensors: Gradients) -> bool:
    """Tell whether all are plain tensors on the CPU, which NumPy can view."""
    plain = (Tensor, torch.nn.Parameter)
    return all(t is None or (t.is_cpu and type(t) in plain) for t in tensors)


def measure(
    rows: Rows, tensors: Gradients, device: torch.device | None
) -> tuple[Any, Any]:
    """Return the norm of each row, and which rows have one.

    Args:
      rows: which tensor belongs to which row.
      tensors: one per slot: gradients, or parameters.
      device: where the norms are wanted; None is the host, as NumPy arrays.
    """
    if device is None:
        return _host_norms(rows, tensors)
    return _device_norms(rows, tensors, device)


def scale_(rows: Rows, gradients: Gradients, scales: Any) -> None:
    """Scale gradients in place.

    Args:
      rows: which gradient belongs to which row.
      gradients: one per slot.
      scales: float32, one per row, NumPy or torch; 1 leaves a gradient's bits alone, 0
        sets it to 0, whatever it holds.
    """
    if isinstance(scales, np.ndarray):
        _host_scale_(rows, gradients, scales)
    else:
        _device_scale_(rows, gradients, scales)


def _host_norms(
    rows: Rows, tensors: Gradients
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the norm of each row as float64, and which rows have one."""
    norms = np.zeros(len(rows.names))
    observed = np.zeros(len(rows.names), np.bool_)
    for slot, tensor in zip(rows.slots, tensors, strict=True):
        if tensor is None:
            continue
        observed[slot.start : slot.stop] = True
        if slot.units is not None:
            norms[slot.start : slot.stop] = _host_unit_norms(tensor, slot.units)
        else:  # a row may hold several tensors
            norms[slot.start] = _hypot(norms[slot.start], _host_norm(tensor))
    return norms, observed


def _host_scale_(
    rows: Rows, gradients: Gradients, scales: np.ndarray[Any, Any]
) -> None:
    """Write only what exceeds its limit; a scale of 1 does not even read."""
    touched = scales != 1
    for slot, gradient in zip(rows.slots, gradients, strict=True):
        if gradient is None or not touched[slot.start : slot.stop].any():
            continue
        gradient = writable(slot, gradient)
        if slot.units is not None:
            unit_scales = torch.from_numpy(scales[slot.start : slot.stop])
            select_(*_unit_scales(gradient, unit_scales, slot.units))
        elif scales[slot.start] == 0:
            gradient.zero_()
        else:
            stored = gradient._values() if gradient.is_sparse else gradient
            stored.mul_(float(scales[slot.start]))


def _device_norms(
    rows: Rows, tensors: Gradients, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return on the device the norm of each row, and which rows have one.

    Squares are summed in float64, so that neither large nor small finite gradients lose
    their norm; on a device without float64, in float32.
    """
    wide = torch.float32 if device.type == "mps" else torch.float64
    absent = torch.zeros((), dtype=wide, device=device)
    yes = torch.ones((), dtype=torch.bool, device=device)
    # Slots stand in the order of their rows, and so do the keys.
    vectors: dict[int, list[Tensor]] = {slot.start: [] for slot in rows.slots}
    widths = {slot.start: slot.stop - slot.start for slot in rows.slots}
    for slot, tensor in zip(rows.slots, tensors, strict=True):
        if tensor is not None and slot.stop > slot.start:
            own = norms_in(tensor, slot.units, wide).to(device, non_blocking=True)
            vectors[slot.start].append(own.reshape(-1))
    norms = [
        _combine(parts) if parts else absent.expand(widths[start])
        for start, parts in vectors.items()
    ]
    observed = [
        (yes if parts else ~yes).expand(widths[start])
        for start, parts in vectors.items()
    ]
    return torch.cat(norms), torch.cat(observed)


def _device_scale_(rows: Rows, gradients: Gradients, scales: Tensor) -> None:
    """Scale in place without reading a value back: select, where the scale is not 1."""
    for slot, gradient in zip(rows.slots, gradients, strict=True):
        if gradient is not None:
            own = scales[slot.start : slot.stop]
            scale_one_(slot, gradient, own.to(gradient.device, non_blocking=True))


def scale_one_(slot: Slot, gradient: Tensor, scales: Tensor) -> None:
    """Scale one gradient in place by the scales of its rows, on their device."""
    gradient = writable(slot, gradient)
    if slot.units is not None:
        select_(*_unit_scales(gradient, scales, slot.units))
    else:
        stored = gradient._values() if gradient.is_sparse else gradient
        select_(stored, scales.reshape(()))


def unscale_(gradients: Gradients, factor: Tensor) -> None:
    """Divide every gradient in place by a loss scale, on its device."""
    for gradient in gradients:
        if gradient is not None:
            stored = gradient._values() if gradient.is_sparse else gradient
            stored.div_(factor.to(gradient.device, non_blocking=True))


def clamped(gradient: Tensor, most: float) -> Tensor:
    """Return a copy with every element, or part of a complex one, in [-most, most]."""
    copy = gradient.coalesce().clone() if gradient.is_sparse else gradient.clone()
    return clamp_(copy, most)


def cut_off(gradient: Tensor, most: float) -> Tensor:
    """Return what clamping takes away, with any sign; 0 where it changes nothing."""
    if not gradient.is_sparse:
        return gradient - clamped(gradient, most)
    # Of a coalesced tensor: added up in another order, duplicates may differ in a bit.
    gradient = gradient.coalesce()
    rest = clamped(gradient, most)
    rest._values().sub_(gradient._values())
    return rest


def clamp_(gradient: Tensor, most: float) -> Tensor:
    """Clamp every element of a dense or a coalesced gradient in place."""
    _values(gradient).clamp_(-most, most)
    return gradient


def _host_norm(tensor: Tensor) -> float:
    """Return the norm of one tensor; float32 first, float64 where that is not safe."""
    values = _values(tensor.coalesce() if tensor.is_sparse else tensor)
    flat = _flat(values)
    if flat is not None and values.dtype != torch.float64:
        squares = sum(map(_squares, torch.split(flat, _PIECE)))
        if _LEAST_SAFE < squares < _MOST_SAFE:
            return math.sqrt(squares)
    return float(torch.linalg.vector_norm(values, dtype=torch.float64))


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
    norms = _norm(flat[:whole].view(-1, _ROW), (1,), torch.float32).double()
    rest = _squares(flat[whole:]) if whole < flat.numel() else 0.0
    return float(torch.dot(norms, norms)) + rest


def _host_unit_norms(tensor: Tensor, units: Units) -> np.ndarray[Any, Any]:
    """Return the norm of each unit; as above, float32 first."""
    if unit_count(tensor.shape, units) == 1:
        return np.array([_host_norm(tensor)])
    tensor = tensor.to_dense() if tensor.is_sparse else tensor
    values = _values(tensor)
    if units == over_all_but(tensor.shape, 0) and values.dtype != torch.float64:
        short = values.numel() <= _ROW * len(values)
        parts = (values,) if short else torch.split(values.flatten(1), _ROW, dim=1)
        norms = [_norm(p, tuple(range(1, p.ndim)), torch.float32) for p in parts]
        squares = torch.stack(norms).double().square().sum(0)
        if bool(((squares > _LEAST_SAFE) & (squares < _MOST_SAFE)).all()):
            return squares.sqrt().numpy()
    return norms_in(tensor, units, torch.float64).reshape(-1).numpy()


def norms_in(tensor: Tensor, units: Units | None, dtype: torch.dtype) -> Tensor:
    """Return the tensor's norm, or one per unit, accumulated in `dtype` or wider."""
    if tensor.is_sparse:
        tensor = tensor.coalesce() if units is None else tensor.to_dense()
    values = _values(tensor)
    dtype = torch.promote_types(dtype, values.dtype)
    if units is None:
        return _norm(values, None, dtype)
    if not units.axes:
        return tensor.abs().to(dtype)
    if tensor.is_complex():  # _values() has added an axis of real and imaginary parts
        units = Units(
            (*units.axes, len(split_shape(tensor.shape, units))), units.groups
        )
    return _norm(_split(values, units), units.axes, dtype)


def _norm(values: Tensor, axes: tuple[int, ...] | None, dtype: torch.dtype) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(values, dim=axes, dtype=dtype)
    return norms


def _combine(norms: list[Tensor]) -> Tensor:
    """Return the norm of a row that holds several tensors."""
    if len(norms) == 1:
        return norms[0]
    return _norm(torch.stack(norms), (0,), norms[0].dtype)


def _hypot(a: float, b: float) -> float:
    # math.hypot(nan, inf) is inf, which would hide the NaN; the sum keeps it.
    return math.hypot(a, b) if math.isfinite(a + b) else a + b


def _values(tensor: Tensor) -> Tensor:
    """Return the numbers of a tensor as a real, dense view of it."""
    values = tensor._values() if tensor.is_sparse else tensor
    if not values.is_complex():
        return values
    # The conjugate of a conjugated view is no copy: what clamps it clamps the tensor.
    return torch.view_as_real(values.conj() if values.is_conj() else values)


def _split(values: Tensor, units: Units) -> Tensor:
    return values.view(split_shape(values.shape, units)) if units.groups > 1 else values


def _unit_scales(
    gradient: Tensor, scales: Tensor, units: Units
) -> tuple[Tensor, Tensor]:
    """Return a gradient's values and its units' scales, in shapes that broadcast."""
    scales = scales.reshape(unit_shape(gradient.shape, units))
    if not gradient.is_sparse:
        return _split(gradient, units), scales
    # Each stored value has the scale of its place; the expanded scales take no memory.
    among = gradient.sparse_dim()
    places = tuple(gradient._indices())
    expanded = scales.expand(*gradient.shape[:among], *scales.shape[among:])
    return gradient._values(), expanded[places]


def select_(values: Tensor, scale: Tensor) -> None:
    """Write scale * values where the scale is not 1, and 0 where it is 0.

    Multiplying by 1 or 0 would not do: 0 * inf is NaN. The product is taken in float32
    or wider: a scale rounded to bfloat16 would be off by up to 0.4 %.
    """
    wide = values if values.dtype.itemsize >= 4 else values.float()
    scaled = torch.where(scale == 0, 0.0, wide * scale).to(values.dtype)
    values.copy_(torch.where(scale == 1, values, scaled))


def give_each_its_own(slots: Iterable[Slot]) -> None:
    """Copy a gradient that two parameters share: it would be scaled twice."""
    seen: set[int] = set()
    for slot in slots:
        gradient = slot.parameter.grad
        if gradient is None:
            continue
        if id(gradient) in seen:
            slot.parameter.grad = gradient = gradient.clone()
        seen.add(id(gradient))


def writable(slot: Slot, gradient: Tensor) -> Tensor:
    """Return the gradient, or a copy put in its place where memory overlaps."""
    if gradient.is_sparse:
        return gradient
    pairs = zip(gradient.shape, gradient.stride(), strict=True)
    if any(size > 1 and stride == 0 for size, stride in pairs):
        slot.parameter.grad = gradient = gradient.clone()
    return gradient
