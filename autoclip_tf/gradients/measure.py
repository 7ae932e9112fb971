"""The norms of rows of gradients or variables; `scale_only` cuts rows in two parts."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from keras import ops

from autoclip_core.clipper.norms import to_rms
from autoclip_core.clipper.parts import join_observed

from . import namespace
from .dense import Tensor, widen
from .row_tensor import RowTensor, count_elements, find_observed, take_rows, wrap
from .rows import Rows

Pairs = Sequence[tuple[RowTensor, Any]]
"""Tensors, each as `wrap` returns it: slices of an index are summed."""

# A sum of float32 squares in this range has lost nothing to overflow or underflow.
_MIN_EXACT_SUM, _MAX_EXACT_SUM = 1e-25, 1e38


def measure_parts(
    tensors: Sequence[RowTensor], rows: Rows
) -> tuple[Tensor, Tensor | None]:
    """Return the norms of the parts of all rows, and their sizes if joining needs them.

    Without `scale_only`, a row is its only part.
    """
    norms = measure_norms(tensors, rows.part_count, rows.norm)
    if not rows.is_split or rows.norm != "rms":
        return norms, None
    return norms, count_elements(tensors, rows.part_count)


def measure_rows(tensors: Sequence[RowTensor], rows: Rows) -> Tensor:
    """Return the norm of each row."""
    return rows.join(*measure_parts(tensors, rows))


def find_observed_rows(tensors: Sequence[RowTensor], rows: Rows) -> Tensor:
    """Return which rows have a gradient."""
    observed = find_observed(tensors, rows.part_count)
    return ops.convert_to_tensor(join_observed(observed) if rows.is_split else observed)


def measure_norms(
    tensors: Sequence[RowTensor], row_count: int, norm: str = "l2"
) -> Tensor:
    """Return the norm of each row, shape (row_count,), float32.

    Squares are summed in float32. If a sum is infinite or tiny, it may have lost
    something to overflow or underflow. Then each row is divided by its largest element
    and summed again. A row of exact zeros costs this second pass too.

    Args:
      tensors: gradients or variables.
      row_count: the number of rows.
      norm: as in `Clipper`.
    """
    pairs = [(item, wrap(item, merge=True)) for item in tensors]
    if norm == "max":
        return _largest(pairs, row_count, _magnitude_or_infinity)
    squares = _sum_squares(pairs, row_count, None)
    is_absent = ops.convert_to_tensor(~find_observed(tensors, row_count))
    is_exact = ops.logical_and(squares > _MIN_EXACT_SUM, squares < _MAX_EXACT_SUM)

    def rescaled_norms() -> Tensor:
        largest = _largest(pairs, row_count, ops.abs)
        is_usable = ops.logical_and(largest > 0, ops.isfinite(largest))
        divisor = ops.where(is_usable, largest, 1.0)
        return divisor * root(_sum_squares(pairs, row_count, divisor))

    def root(sums: Tensor) -> Tensor:
        if norm == "l2":
            return ops.sqrt(sums)
        return to_rms(ops.sqrt(sums), count_elements(tensors, row_count), namespace)

    all_exact = ops.all(ops.logical_or(is_exact, is_absent))
    return ops.cond(all_exact, lambda: root(squares), rescaled_norms)


def find_largest(tensors: Sequence[RowTensor], row_count: int) -> Tensor:
    """Return the largest magnitude in each row, shape (row_count,), float32."""
    pairs = [(item, wrap(item, merge=True)) for item in tensors]
    return _largest(pairs, row_count, ops.abs)


def _sum_squares(pairs: Pairs, row_count: int, divisor: Tensor) -> Tensor:
    """Return each row's sum of squares, after division by the row's divisor, if any."""

    def squares(item: RowTensor, gradient: Any) -> Tensor:
        values = widen(gradient.values)
        if divisor is not None:
            spread = gradient.spread_scale(take_rows(divisor, item))
            values = values / ops.cast(spread, values.dtype)
        return gradient.reduce(ops.sum, ops.square(values), item.rows.units)

    return _reduce_rows(pairs, row_count, squares, ops.segment_sum)


def _magnitude_or_infinity(values: Tensor) -> Tensor:
    """Return magnitudes, infinity for a NaN: a maximum under XLA ignores a NaN."""
    return ops.where(values == values, ops.abs(values), float("inf"))


def _largest(
    pairs: Pairs, row_count: int, magnitude: Callable[[Tensor], Tensor]
) -> Tensor:
    def largest(item: RowTensor, gradient: Any) -> Tensor:
        magnitudes = magnitude(widen(gradient.values))
        return gradient.reduce(_max, magnitudes, item.rows.units)

    # segment_max returns -inf for a row without a gradient, which has no elements.
    by_row = _reduce_rows(pairs, row_count, largest, ops.segment_max)
    return ops.maximum(by_row, 0.0)


def _reduce_rows(
    pairs: Pairs,
    row_count: int,
    reduce_item: Callable[[RowTensor, Any], Tensor],
    reduce_segments: Callable[..., Tensor],
) -> Tensor:
    """Return one number per row; 0 if a row has no gradient.

    One operation combines the tensors of each row, for all rows.
    """
    if not pairs:
        return ops.zeros((row_count,), "float32")
    values = [
        ops.cast(ops.reshape(reduce_item(*pair), (-1,)), "float32") for pair in pairs
    ]
    indices = [np.arange(item.rows.start, item.rows.stop) for item, _ in pairs]
    index, numbers = np.concatenate(indices), ops.concatenate(values)
    if np.array_equal(index, np.arange(row_count)):
        return numbers
    return reduce_segments(numbers, index.astype(np.int32), num_segments=row_count)


def _max(values: Tensor, axis: Any = None) -> Tensor:
    return ops.max(values, axis=axis, initial=0.0)
