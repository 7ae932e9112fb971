"""Averages and exponentials that stay within the range of float32."""

import numpy as np

from autoclip_core.scale import SMALLEST_NORMAL, XP, Array

LOG_LARGEST = 88.722
"""ln of the largest float32, rounded down."""

LOG_SMALLEST = -87.336
"""ln of the smallest normal float32, rounded up."""

MAX_EXPONENT = 80.0
"""exp of this number is far inside the range of float32."""

LARGEST = float(np.finfo(np.float32).max)


def keeps_only_last(decay: float) -> bool:
    """Return whether an average with this decay is its last value alone, in float32.

    `mean + weight * (value - mean)` with a weight of 1 would lose a value that is far
    below the mean: in float32, 1e30 + (1 - 1e30) is 0.

    >>> keeps_only_last(0.0), keeps_only_last(1e-9), keeps_only_last(0.5)
    (True, True, False)
    """
    # 1 - 2^-25 lies halfway between 1 and the float32 below it, and rounds to 1. A
    # compiled step of torch cannot ask NumPy.
    return decay <= 2.0**-25


def multiply_by_exp(factor: Array, exponent: Array, xp: XP = np) -> Array:
    """Return factor * exp(exponent), at the end of the range of float32 if outside.

    Args:
      factor: positive normal float32 numbers.
      exponent: numbers of the same shape; exp of them may be outside the range.
      xp: the array namespace.

    >>> multiply_by_exp(np.float32([2, 1e-30]), np.float32([0, 90])).tolist()
    [2.0, 1220403328.0]
    """
    # A selection after exp would not do: the gradient of inf * 0 is NaN.
    logs = xp.log(factor)
    # An exponent of 0 leaves the factor, also at the ends of the range.
    highest = xp.maximum(LOG_LARGEST - logs, 0.0)
    lowest = xp.minimum(LOG_SMALLEST - logs, 0.0)
    exponent = xp.where(exponent < highest, exponent, highest)
    exponent = xp.where(exponent > lowest, exponent, lowest)
    is_near = (exponent < MAX_EXPONENT) & (exponent > -MAX_EXPONENT)
    half = xp.exp(0.5 * xp.where(is_near, 0.0, exponent))
    return factor * xp.exp(xp.where(is_near, exponent, 0.0)) * half * half


def keep_in_range(values: Array, xp: XP = np) -> Array:
    """Return positive values, at the ends of the normal range of float32 if outside.

    >>> keep_in_range(np.float32([0, 1, np.inf])).tolist()
    [1.1754943508222875e-38, 1.0, 3.4028234663852886e+38]
    """
    values = xp.where(values < LARGEST, values, LARGEST)
    return xp.where(values > SMALLEST_NORMAL, values, SMALLEST_NORMAL)
