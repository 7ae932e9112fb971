"""Mean and deviation of all norms of each row, in constant memory.

By Welford's recurrence, in float64, for the norms x and for their logarithms:

    d = x - m        m <- m + d / n        S <- S + d * (x - m)

Equal norms have exactly the mean x and S = 0, which a plain sum does not grant. Where
float64 may be missing, off the host, there are no such moments.

Reference:
  Welford, "Note on a method for calculating corrected sums of squares and products",
  Technometrics 4(3), 1962, https://doi.org/10.2307/1266577
"""

from typing import Any, NamedTuple

import numpy as np

from autoclip_core.scale import Array

from .full import check_on_host
from .validation import find_invalid_mean, find_invalid_value


class Moments(NamedTuple):
    """What all norms of each row leave behind, for the host only."""

    mean: Array
    """Shape (rows, 2), float64: m of the norms, and of their logarithms."""
    squares: Array
    """Shape (rows, 2), float64: S of the norms, and of their logarithms."""
    count: Array
    """Shape (rows,): norms recorded."""

    def find_problem(self) -> str:
        """Return what is wrong with moments that were read from somewhere, or ""."""
        mean, squares, count = self
        known = np.isfinite(mean[:, 1])
        spread = np.isfinite(squares) & (squares >= 0)
        return (
            find_invalid_mean(mean[:, 0], count)
            or find_invalid_value("mean of logarithms", mean[:, 1], "finite", known)
            or find_invalid_value("squares", squares, ">= 0 and finite", spread)
        )


def empty(rows: int, length: None = None, xp: Any = np) -> Moments:
    """Return the moments of no norm.

    Raises:
      ValueError: they would be off the host.
    """
    check_on_host(xp)
    return Moments(np.zeros((rows, 2)), np.zeros((rows, 2)), np.zeros(rows, np.int32))


def push(moments: Moments, norms: Array, xp: Any = np) -> Moments:
    """Return the moments after one more norm in each row."""
    mean, squares, count = moments
    values = np.empty_like(mean)
    values[:, 0] = np.where(norms > 0, norms, 1.0)  # `decide` drops what is not a norm
    np.log(values[:, 0], out=values[:, 1])
    count = count + np.int32(1)
    apart = values - mean
    mean = mean + apart / count[:, None]
    return Moments(mean, squares + apart * (values - mean), count)


def mean_std(
    moments: Moments, *, log: bool, ddof: int, xp: Any = np
) -> tuple[Array, Array, Array]:
    """Return for each row what `window.mean_std` does, measured from the mean itself.

    Rows with fewer than max(2, ddof + 1) norms have no deviation: theirs is +inf.
    """
    mean, squares, n = (
        moments.mean[:, int(log)],
        moments.squares[:, int(log)],
        moments.count,
    )
    middle = (np.exp(mean) if log else mean).astype(np.float32)
    std = np.sqrt(squares / np.maximum(n - ddof, 1)).astype(np.float32)
    enough = n >= max(2, ddof + 1)
    return middle, np.zeros_like(middle), np.where(enough, std, np.float32(np.inf))
