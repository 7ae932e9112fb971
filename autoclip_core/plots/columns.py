"""Reduces many steps to the columns of a picture, so that no spike is lost."""

import numpy as np

from autoclip_core.record.step import Array

COLUMNS = 1000
"""Maximum number of columns, about one per pixel; a column may cover many steps."""


def choose_log_limits(steps: Array) -> tuple[float, float]:
    """Return the limits of the log axis; they include every spike, but not 0.

    The lower limit is at least a millionth of the median. Otherwise one tiny norm would
    compress the rest of the picture.
    """
    values = np.concatenate([steps["norm"], steps["threshold"]])
    values = values[np.isfinite(values) & (values > 0)]
    if not values.size:
        return 0.1, 10.0
    # The axis overflows beyond these limits; no float32 norm lies there.
    logs = np.clip(np.log10(values), -250, 250)
    low, high = max(logs.min(), np.median(logs) - 6), logs.max()
    margin = 0.1 + 0.06 * (high - low)
    return float(10 ** (low - margin)), float(10 ** (high + margin))


def choose_width(end: float, count: int) -> int:
    """Return the steps per column, so that at most `count` columns are needed."""
    return max(1, -(-int(end + 1) // count))


def reduce_norms(
    number: Array, norms: Array, floor: float, width: int
) -> tuple[Array, ...]:
    """Return `reduce_to_columns` of the finite norms, each at least `floor`."""
    finite = np.where(np.isfinite(norms), norms, np.nan)
    return reduce_to_columns(number, np.maximum(finite, floor), width)


def reduce_to_columns(number: Array, values: Array, width: int) -> tuple[Array, ...]:
    """Return the x of each column, and its smallest, median and largest value.

    Args:
      number: the number of each step.
      values: a value per step; NaN is ignored, and a column with only NaN is NaN.
      width: the steps per column; a column without any step is left out.

    >>> x, low, middle, high = reduce_to_columns(
    ...     np.array([0, 1, 2, 9]), np.array([1.0, 3.0, np.nan, 5.0]), 2)
    >>> x.tolist(), low.tolist(), high.tolist()
    ([0.5, 2.5, 8.5], [1.0, nan, 5.0], [3.0, nan, 5.0])
    """
    used, column = np.unique(number // width, return_inverse=True)
    is_known = ~np.isnan(values)
    order = np.lexsort((values[is_known], column[is_known]))
    column, values = column[is_known][order], values[is_known][order]
    first = np.searchsorted(column, np.arange(len(used)))
    last = np.searchsorted(column, np.arange(len(used)), side="right") - 1
    has_values = last >= first
    reduced = np.full((3, len(used)), np.nan)
    for row, index in enumerate([first, (first + last) // 2, last]):
        reduced[row, has_values] = values[index[has_values]]
    return used * width + (width - 1) / 2, *reduced
