"""Mean and deviation of all norms of each row, in constant memory.

Welford's recurrence, in float64, for the norms x and for their logarithms:

    d = x - m        m <- m + d / n        S <- S + d * (x - m)

Equal norms have exactly the mean x and S = 0; a plain sum does not guarantee this.
The moments exist only in NumPy, because float64 may be missing elsewhere.

Reference:
  Welford, "Note on a method for calculating corrected sums of squares and products",
  Technometrics 4(3), 1962, https://doi.org/10.2307/1266577
"""

from typing import NamedTuple

import numpy as np

from autoclip_core.scale import XP, Array

from .full import check_is_numpy
from .validation import find_invalid_mean, find_invalid_value


class FullMoments(NamedTuple):
    """The moments of all norms of each row, in NumPy only."""

    mean: Array
    """Shape (rows, 2), float64: m of the norms, and of their logarithms."""
    squares: Array
    """Shape (rows, 2), float64: S of the norms, and of their logarithms."""
    count: Array
    """Shape (rows,): the number of norms recorded."""

    def find_problem(self, lowest: float = 0.0) -> str:
        """Return why loaded moments are invalid, or ""; norms are above `lowest`."""
        mean, squares, count = self
        is_finite = np.isfinite(mean[:, 1])
        is_valid = np.isfinite(squares) & (squares >= 0)
        return (
            find_invalid_mean(mean[:, 0], count, lowest)
            or find_invalid_value("mean of logarithms", mean[:, 1], "finite", is_finite)
            or find_invalid_value("squares", squares, ">= 0 and finite", is_valid)
        )

    def find_signed_problem(self) -> str:
        """Return why loaded moments of losses are invalid, or ""."""
        return self.find_problem(lowest=-np.inf)


def empty(rows: int, length: None = None, xp: XP = np) -> FullMoments:
    """Return the moments before the first norm.

    Raises:
      ValueError: the arrays are not NumPy arrays.
    """
    check_is_numpy(xp)
    return FullMoments(
        np.zeros((rows, 2)), np.zeros((rows, 2)), np.zeros(rows, np.int32)
    )


def push(moments: FullMoments, norms: Array, xp: XP = np) -> FullMoments:
    """Return the moments after one more norm in each row."""
    mean, squares, count = moments
    values = np.empty_like(mean)
    values[:, 0] = norms
    values[:, 1] = np.where(norms > 0, norms, 1.0)  # a loss has no logarithm
    np.log(values[:, 1], out=values[:, 1])
    count = count + np.int32(1)
    distance = values - mean
    mean = mean + distance / count[:, None]
    return FullMoments(mean, squares + distance * (values - mean), count)


def mean_std(
    moments: FullMoments, *, log: bool, ddof: int, xp: XP = np
) -> tuple[Array, Array, Array]:
    """Return the results of `window.mean_std`; the middle norm is the mean itself.

    The deviation of a row with fewer than max(2, ddof + 1) norms is +inf.
    """
    mean, squares, n = moments
    mean, squares = mean[:, int(log)], squares[:, int(log)]
    middle = (np.exp(mean) if log else mean).astype(np.float32)
    std = np.sqrt(squares / np.maximum(n - ddof, 1)).astype(np.float32)
    has_std = n >= max(2, ddof + 1)
    return middle, np.zeros_like(middle), np.where(has_std, std, np.float32(np.inf))
