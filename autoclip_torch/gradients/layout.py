"""The numbers of one gradient, be it dense, sparse, complex, strided or narrow."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoclip_core.checks import format_error
from autoclip_core.clipper.units import Units, split_shape, unit_shape
from autoclip_torch.rows.rows import ParameterRows

# So many numbers are copied at a time, where they have to be.
PIECE = 2**20


def stored(tensor: Tensor) -> Tensor:
    """Return the numbers that a tensor holds; writing to them writes to the tensor."""
    return tensor._values() if tensor.is_sparse else tensor


def real(tensor: Tensor) -> Tensor:
    """Return the stored numbers as a real view: complex ones get an axis of parts.

    Raises:
      TypeError: they are of 8 bits, which torch can neither measure nor scale.
    """
    values = stored(tensor)
    if values.dtype.itemsize == 1:
        rule = "of 16 bits or more"
        way_out = (
            "cast to float8 inside the layer, and keep the parameter and its gradient "
            "in bfloat16 or float32"
        )
        raise TypeError(format_error("a gradient", rule, values.dtype, way_out))
    if not values.is_complex():
        return values
    # The conjugate of a conjugated view is no copy: what clamps it clamps the tensor.
    return torch.view_as_real(values.conj() if values.is_conj() else values)


def with_an_axis(values: Tensor) -> Tensor:
    """Return the same numbers, a single one as a vector."""
    return values if values.ndim else values.view(1)


def norm_over(
    values: Tensor, axes: tuple[int, ...] | None, dtype: torch.dtype
) -> Tensor:
    """Return norms over axes, with None over all of them, accumulated in `dtype`."""
    norms: Tensor = torch.linalg.vector_norm(values, dim=axes, dtype=dtype)
    return norms


def norms_in(tensor: Tensor, units: Units | None, dtype: torch.dtype) -> Tensor:
    """Return the tensor's norm, or one per unit, accumulated in `dtype` or wider."""
    if tensor.is_sparse:
        tensor = tensor.coalesce() if units is None else tensor.to_dense()
    values = real(tensor)
    dtype = torch.promote_types(dtype, values.dtype)
    if units is None:
        return norm_over(values, None, dtype)
    if not units.axes:
        return tensor.abs().to(dtype)
    if tensor.is_complex():  # real() has added an axis of real and imaginary parts
        axes = (*units.axes, len(split_shape(tensor.shape, units)))
        units = Units(axes, units.groups)
    return norm_over(split(values, units), units.axes, dtype)


def split(values: Tensor, units: Units) -> Tensor:
    """Return a view with the groups of the units as an axis, where there are some."""
    return values.view(split_shape(values.shape, units)) if units.groups > 1 else values


def by_first_axis(units: Units, tensor: Tensor) -> bool:
    """Tell whether each index of the first axis is a unit; no axes are one unit."""
    first = units.groups == 1 and 0 not in units.axes
    return first and len(units.axes) == tensor.ndim - 1


def unit_scales(
    gradient: Tensor, scales: Tensor, units: Units
) -> tuple[Tensor, Tensor]:
    """Return a gradient's numbers and its units' scales, in shapes that broadcast."""
    scales = scales.reshape(unit_shape(gradient.shape, units))
    if gradient.is_sparse:
        # Each stored value has the scale of its place; expanded, they take no memory.
        among = gradient.sparse_dim()
        places = tuple(gradient._indices())
        expanded = scales.expand(*gradient.shape[:among], *scales.shape[among:])
        values, scales = gradient._values(), expanded[places]
    else:
        values = split(gradient, units)
    if values.is_complex():  # as a complex number 1 would make NaN of inf + 1j
        return real(values), scales.unsqueeze(-1)
    return values, scales


def select_(values: Tensor, scales: Tensor) -> None:
    """Write scale * value, and 0 where the scale is 0, whatever was there.

    Args:
      values: numbers that are written in place.
      scales: float32, in a shape that broadcasts against them, of one axis at least:
        then the product is taken in float32 or wider, and rounded once. A scale rounded
        to bfloat16 would be off by up to 0.4 %. A scale of 1 changes no bit.
    """
    gone = scales == 0
    values.masked_fill_(gone, 0.0)  # as 0 * inf is NaN
    values.mul_(scales.masked_fill(gone, 1.0))


def writable(entry: ParameterRows, gradient: Tensor) -> Tensor:
    """Return the gradient, or a copy put in its place where memory overlaps."""
    # An expanded gradient has an axis of stride 0, a dense one never has.
    if gradient.is_sparse or 0 not in gradient.stride():
        return gradient
    pairs = zip(gradient.shape, gradient.stride(), strict=True)
    if any(size > 1 and stride == 0 for size, stride in pairs):
        entry.parameter.grad = gradient = gradient.clone()
    return gradient


def rows_of_a_piece(values: Tensor) -> int:
    """Return how many entries of the first axis have about `PIECE` numbers."""
    return max(1, PIECE * values.shape[0] // max(1, values.numel()))


def pieces(
    rows: np.ndarray[Any, Any], values: Tensor
) -> Iterator[np.ndarray[Any, Any]]:
    """Yield the rows in parts, so that a copy of each takes little memory."""
    step = rows_of_a_piece(values)
    for start in range(0, len(rows), step):
        yield rows[start : start + step]
