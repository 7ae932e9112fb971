"""Measure and scale Keras gradients: the norm of each row, and the scaled gradients."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from autoclip_core.clipper.norms import to_rms
from autoclip_core.clipper.units import ParameterRows, row_size, unit_shape

from . import namespace
from .dense import DenseGradient, Tensor, widen
from .sparse import SparseGradient, can_stay_sparse, to_dense

# A sum of float32 squares in this range has lost nothing to overflow or underflow.
_MIN_EXACT_SUM, _MAX_EXACT_SUM = 1e-25, 1e38


class Part(NamedTuple):
    """One gradient, or variable, and its rows."""

    rows: ParameterRows
    tensor: Tensor
    """A dense tensor, or TensorFlow's `IndexedSlices`."""
    shape: tuple[int, ...]
    """The shape of the variable."""


def measure_norms(parts: Sequence[Part], row_count: int, norm: str = "l2") -> Tensor:
    """Return the norm of each row, shape (row_count,), float32.

    Squares are summed in float32. If a sum is infinite or tiny, it may have lost
    something to overflow or underflow. Then each row is divided by its largest element
    and summed again. A row of exact zeros costs this second pass too.

    Args:
      parts: gradients or variables.
      row_count: the number of rows.
      norm: as in `Clipper`.
    """
    gradients = [_wrap(part, merge=True) for part in parts]
    if norm == "max":
        return _largest(parts, gradients, row_count, _magnitude_or_infinity)
    squares = _sum_squares(parts, gradients, row_count, None)
    is_absent = ops.convert_to_tensor(~find_observed(parts, row_count))
    is_exact = ops.logical_and(squares > _MIN_EXACT_SUM, squares < _MAX_EXACT_SUM)

    def rescaled_norms() -> Tensor:
        largest = _largest(parts, gradients, row_count, ops.abs)
        is_usable = ops.logical_and(largest > 0, ops.isfinite(largest))
        divisor = ops.where(is_usable, largest, 1.0)
        return divisor * root(_sum_squares(parts, gradients, row_count, divisor))

    def root(sums: Tensor) -> Tensor:
        if norm == "l2":
            return ops.sqrt(sums)
        return to_rms(ops.sqrt(sums), count_elements(parts, row_count), namespace)

    all_exact = ops.all(ops.logical_or(is_exact, is_absent))
    return ops.cond(all_exact, lambda: root(squares), rescaled_norms)


def count_elements(parts: Sequence[Part], row_count: int) -> Tensor:
    """Return the number of elements of each row; a sparse gradient counts whole."""
    sizes = np.zeros((row_count,), np.float32)
    for rows, _, shape in parts:
        sizes[rows.start : rows.stop] += row_size(shape, rows)
    return ops.convert_to_tensor(sizes)


def find_largest(parts: Sequence[Part], row_count: int) -> Tensor:
    """Return the largest magnitude in each row, shape (row_count,), float32."""
    gradients = [_wrap(part, merge=True) for part in parts]
    return _largest(parts, gradients, row_count, ops.abs)


def find_observed(parts: Sequence[Part], row_count: int) -> np.ndarray[Any, Any]:
    """Return which rows have a gradient; this is known when a step is traced."""
    has_gradient = np.zeros((row_count,), bool)
    for rows, *_ in parts:
        has_gradient[rows.start : rows.stop] = True
    return has_gradient


def scale_all(parts: Sequence[Part], scales: Tensor) -> list[Tensor]:
    """Return the gradients scaled; a row whose scale is 1 is unchanged bit for bit.

    In most steps no row is scaled; then no gradient is written.
    """

    def scaled() -> list[Tensor]:
        return [_scale(part, scales) for part in parts]

    def unchanged() -> list[Tensor]:
        # Both branches must return the same kind: some slices are made dense.
        gradients = [_wrap(part, merge=False) for part in parts]
        return [gradient.with_values(gradient.values) for gradient in gradients]

    return list(ops.cond(ops.any(scales != 1), scaled, unchanged))


def map_elements(function: Callable[[Tensor], Tensor], part: Part) -> Tensor:
    """Return a function of each element of a gradient, after duplicates are summed."""
    gradient = _wrap(part, merge=True)
    return gradient.with_values(ops.cast(function(gradient.values), part.tensor.dtype))


def _wrap(part: Part, *, merge: bool) -> Any:
    """Return a `DenseGradient` or a `SparseGradient`, which have the same methods.

    Args:
      part: the gradient.
      merge: whether slices of the same index are summed first.
    """
    if not hasattr(part.tensor, "dense_shape"):
        return DenseGradient(part.tensor, part.shape)
    if not can_stay_sparse(part.rows.units, part.shape):
        return DenseGradient(to_dense(part.tensor), part.shape)
    gradient = SparseGradient(part.tensor, part.shape)
    return gradient.merge() if merge else gradient


def _scale(part: Part, scales: Tensor) -> Tensor:
    """Return scale * gradient in float32 or wider, unless the scale is 0 or 1.

    A scale of 0 gives 0 and a scale of 1 the gradient itself. Duplicate slices need not
    be summed to be scaled, and stay slices.
    """
    gradient = _wrap(part, merge=False)
    scale = gradient.spread_scale(select_part(scales, part))
    wide = widen(gradient.values)
    product = ops.where(scale == 0, 0.0, wide * ops.cast(scale, wide.dtype))
    narrow = ops.cast(product, gradient.values.dtype)
    return gradient.with_values(ops.where(scale == 1, gradient.values, narrow))


def _sum_squares(
    parts: Sequence[Part], gradients: Sequence[Any], row_count: int, divisor: Tensor
) -> Tensor:
    """Return each row's sum of squares, after division by the row's divisor, if any."""

    def squares(part: Part, gradient: Any) -> Tensor:
        values = widen(gradient.values)
        if divisor is not None:
            spread = gradient.spread_scale(select_part(divisor, part))
            values = values / ops.cast(spread, values.dtype)
        return gradient.reduce(ops.sum, ops.square(values), part.rows.units)

    return _reduce_rows(parts, gradients, row_count, squares, ops.segment_sum)


def _magnitude_or_infinity(values: Tensor) -> Tensor:
    """Return magnitudes, infinity for a NaN: a maximum under XLA ignores a NaN."""
    return ops.where(values == values, ops.abs(values), float("inf"))


def _largest(
    parts: Sequence[Part],
    gradients: Sequence[Any],
    row_count: int,
    magnitude: Callable[[Tensor], Tensor],
) -> Tensor:
    def largest(part: Part, gradient: Any) -> Tensor:
        magnitudes = magnitude(widen(gradient.values))
        return gradient.reduce(_max, magnitudes, part.rows.units)

    # segment_max returns -inf for a row without a gradient, which has no elements.
    by_row = _reduce_rows(parts, gradients, row_count, largest, ops.segment_max)
    return ops.maximum(by_row, 0.0)


def _reduce_rows(
    parts: Sequence[Part],
    gradients: Sequence[Any],
    row_count: int,
    reduce_part: Callable[[Part, Any], Tensor],
    reduce_segments: Callable[..., Tensor],
) -> Tensor:
    """Return one number per row; 0 if a row has no gradient.

    One operation combines the parts of each row, for all rows.
    """
    pairs = zip(parts, gradients, strict=True)
    values = [ops.cast(ops.reshape(reduce_part(*p), (-1,)), "float32") for p in pairs]
    indices = [np.arange(part.rows.start, part.rows.stop) for part in parts]
    if not parts:
        return ops.zeros((row_count,), "float32")
    index, numbers = np.concatenate(indices), ops.concatenate(values)
    if np.array_equal(index, np.arange(row_count)):
        return numbers
    return reduce_segments(numbers, index.astype(np.int32), num_segments=row_count)


def _max(values: Tensor, axis: Any = None) -> Tensor:
    return ops.max(values, axis=axis, initial=0.0)


def select_part(by_row: Tensor, part: Part) -> Tensor:
    """Return a part's entries of a number per row, to broadcast with the variable."""
    units = part.rows.units
    shape = () if units is None else unit_shape(part.shape, units)
    return ops.reshape(by_row[part.rows.start : part.rows.stop], shape)
