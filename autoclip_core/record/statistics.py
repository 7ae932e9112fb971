"""Mean, median and quantile of recorded numbers, and the root of their squares."""

import math
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
"""A NumPy array, in all files about logs and series of norms."""


def mean(values: Array) -> float:
    """Return the mean in float64; NaN if there are no values."""
    return float(values.mean(dtype=np.float64)) if values.size else math.nan


def median(values: Array) -> float:
    """Return the median of finite values; +inf if there are none."""
    if not values.size:
        return math.inf
    middle = [(values.size - 1) // 2, values.size // 2]
    return float((np.partition(values, middle)[middle] / 2).sum())


def quantile(values: Array, share: float) -> float:
    """Return a quantile of finite values; NaN if there are none. No half overflows."""
    return 2 * float(np.quantile(values / 2, share)) if values.size else math.nan


def root_sum_squares(values: Array) -> float:
    """Return the root of the sum of squares of values >= 0; no square overflows."""
    largest = float(values.max())
    return largest * math.sqrt(((values / largest) ** 2).sum()) if largest else 0.0
