"""Access the elements of a gradient: dense, sparse, complex, strided or narrow."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from autoclip_core.checks import format_error
from autoclip_core.clipper.units import Units, split_shape, unit_count, unit_shape
from autoclip_torch.rows.rows import ParameterRows

Gradients = Iterable[Tensor | None]
"""One tensor per parameter; None if a parameter has no gradient."""


class RowNorms(NamedTuple):
    """The norms of all rows: NumPy arrays on the CPU, or tensors on a device."""

    norms: Any
    """Shape (rows,)."""
    observed: Any
    """Shape (rows,): which rows have a tensor."""
    sizes: Any = None
    """Shape (rows,): the number of elements on all ranks, if "rms" needs it."""


PIECE = 2**20
"""The largest number of elements that are copied at a time."""


def is_plain(tensor: Tensor) -> bool:
    """Return whether the elements of a tensor are float32 in one block of memory."""
    return (
        tensor.dtype == torch.float32
        and not tensor.is_sparse
        and tensor.is_contiguous()
        and not tensor.is_neg()
    )


def get_stored(tensor: Tensor) -> Tensor:
    """Return the stored elements of a tensor, as a view that may be written."""
    return tensor._values() if tensor.is_sparse else tensor


def as_real(tensor: Tensor) -> Tensor:
    """Return the stored elements as a real view: complex ones get one more axis.

    Raises:
      TypeError: the elements have 8 bits; torch can neither measure nor scale these.
    """
    values = get_stored(tensor)
    if values.dtype.itemsize == 1:
        rule = "of 16 bits or more"
        way_out = (
            "cast to float8 inside the layer, and keep the parameter and its gradient "
            "in bfloat16 or float32"
        )
        raise TypeError(format_error("a gradient", rule, values.dtype, way_out))
    if not values.is_complex():
        return values
    # The conjugate of a conjugated view is a view: writing to it writes to the tensor.
    return torch.view_as_real(values.conj() if values.is_conj() else values)


def with_axis(values: Tensor) -> Tensor:
    """Return the same elements; a single element becomes a vector."""
    return values if values.ndim else values.view(1)


def compute_norm(
    values: Tensor, axes: tuple[int, ...] | None, dtype: torch.dtype, order: float = 2
) -> Tensor:
    """Return norms over axes, or over all axes if None, accumulated in `dtype`."""
    norms: Tensor = torch.linalg.vector_norm(values, order, dim=axes, dtype=dtype)
    return norms


def as_measurable(tensor: Tensor, order: float) -> Tensor:
    """Return real elements that have the norm of a tensor of dense elements."""
    values = as_real(tensor)
    if order == 2:
        return values
    # The largest magnitude of complex elements is not that of their two parts.
    values = get_stored(tensor).abs() if get_stored(tensor).is_complex() else values
    return values if values.numel() else values.new_zeros(1)


def get_unit_norms(
    tensor: Tensor, units: Units, dtype: torch.dtype, order: float = 2
) -> Tensor:
    """Return the norm of each unit of a tensor, accumulated in `dtype` or wider."""
    tensor = tensor.to_dense() if tensor.is_sparse else tensor
    if order != 2:
        if tensor.numel() == 0:  # an empty axis has no largest element
            return tensor.new_zeros(unit_count(tensor.shape, units), dtype=dtype)
        tensor = tensor.abs() if tensor.is_complex() else tensor
    values = as_real(tensor)
    dtype = torch.promote_types(dtype, values.dtype)
    if not units.axes:
        return tensor.abs().to(dtype)
    if tensor.is_complex():  # as_real() adds an axis of real and imaginary parts
        axes = (*units.axes, len(split_shape(tensor.shape, units)))
        units = Units(axes, units.groups)
    return compute_norm(split_groups(values, units), units.axes, dtype, order)


def split_groups(values: Tensor, units: Units) -> Tensor:
    """Return a view with the groups of the units, if any, as the first axis."""
    return values.view(split_shape(values.shape, units)) if units.groups > 1 else values


def is_cut_by_first_axis(units: Units, tensor: Tensor) -> bool:
    """Return whether the units are the indices of the first axis."""
    is_first = units.groups == 1 and 0 not in units.axes
    return is_first and len(units.axes) == tensor.ndim - 1


def align_unit_scales(
    gradient: Tensor, scales: Tensor, units: Units
) -> tuple[Tensor, Tensor]:
    """Return a gradient's elements and its units' scales, in shapes that broadcast."""
    scales = scales.reshape(unit_shape(gradient.shape, units))
    if gradient.is_sparse:
        # Each stored value needs the scale at its index. Expanding takes no memory.
        axes = gradient.sparse_dim()
        expanded = scales.expand(*gradient.shape[:axes], *scales.shape[axes:])
        values, scales = gradient._values(), expanded[tuple(gradient._indices())]
    else:
        values = split_groups(gradient, units)
    if values.is_complex():  # a complex 1 would turn inf + 1j into NaN
        return as_real(values), scales.unsqueeze(-1)
    return values, scales


def apply_scale_(values: Tensor, scales: Tensor) -> None:
    """Multiply values by scales in place. A scale of 0 sets any value to 0, even NaN.

    Args:
      values: the elements to multiply.
      scales: float32, in a shape that broadcasts, with at least one axis. The product
        is then computed in float32 or wider, and rounded once. A scale rounded to
        bfloat16 would be off by up to 0.4 %. A scale of 1 changes no bit.
    """
    is_zero = scales == 0
    values.masked_fill_(is_zero, 0.0)  # 0 * inf is NaN
    values.mul_(scales.masked_fill(is_zero, 1.0))


def make_writable(entry: ParameterRows, gradient: Tensor) -> Tensor:
    """Return the gradient, or replace it by a copy if its elements share memory."""
    # Only an expanded gradient has an axis of stride 0.
    if gradient.is_sparse or 0 not in gradient.stride():
        return gradient
    pairs = zip(gradient.shape, gradient.stride(), strict=True)
    if any(size > 1 and stride == 0 for size, stride in pairs):
        entry.parameter.grad = gradient = gradient.clone()
    return gradient


def copy_shared(
    entries: Sequence[ParameterRows], gradients: list[Tensor | None]
) -> list[Tensor | None]:
    """Return the gradients. If two parameters share one, the second gets a copy.

    Otherwise it would be scaled twice.
    """
    present = [id(gradient) for gradient in gradients if gradient is not None]
    if len(set(present)) == len(present):
        return gradients
    seen: set[int] = set()
    for entry, gradient in zip(entries, gradients, strict=True):
        if gradient is not None and id(gradient) in seen:
            entry.parameter.grad = gradient.clone()
        seen.add(id(gradient))
    return [entry.parameter.grad for entry in entries]


def count_piece_rows(values: Tensor, most: int = PIECE) -> int:
    """Return how many indices of the first axis have about `most` elements."""
    return max(1, most * values.shape[0] // max(1, values.numel()))


def split_pieces(
    rows: np.ndarray[Any, Any], values: Tensor
) -> Iterator[np.ndarray[Any, Any]]:
    """Yield the rows in pieces, so that a copy of a piece takes little memory."""
    step = count_piece_rows(values)
    for start in range(0, len(rows), step):
        yield rows[start : start + step]
