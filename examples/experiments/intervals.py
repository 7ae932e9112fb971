"""Intervals of 95 % that assume no distribution: of a median, and of a success rate."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Z = 1.959964
"""The normal quantile of 97.5 %."""


class Interval(NamedTuple):
    """An estimate and the ends of its interval."""

    middle: float
    low: float
    high: float

    def text(self, spec: str = ".3g") -> str:
        """Return `middle (low to high)`; what is infinite is called ∞."""
        middle, low, high = (format(x, spec) if math.isfinite(x) else "∞" for x in self)
        return f"{middle} ({low} to {high})"


def median_interval(values: Sequence[float]) -> Interval:
    """Return the median between two of the sorted values.

    The k-th smallest and the k-th largest of n values hold the median between them with
    probability 1 − 2·P(Binomial(n, ½) < k), whatever the distribution. k is the
    largest for which that is 95 %; with fewer than 6 values it is 1, the whole range,
    and the probability is less: 94 % of 5, 88 % of 4, 75 % of 3. NaN is taken to be
    worse than any number: infinite.

    >>> median_interval([5, 1, 4, 2, 3])
    Interval(middle=3.0, low=1.0, high=5.0)
    """
    found = np.sort(np.where(np.isnan(values), np.inf, values).astype(float))
    n = len(found)
    below = np.cumsum([math.comb(n, k) / 2**n for k in range(n)])
    rank = max(1, int(np.sum(2 * below <= 0.05)))
    middle = (found[(n - 1) // 2] + found[n // 2]) / 2
    return Interval(*map(float, (middle, found[rank - 1], found[n - rank])))


def success_interval(successes: int, trials: int) -> Interval:
    """Return a success rate with Wilson's score interval.

    >>> success_interval(8, 8).text(".2f")
    '1.00 (0.68 to 1.00)'
    """
    rate, weight = successes / trials, Z**2 / trials
    middle = (rate + weight / 2) / (1 + weight)
    half = math.sqrt(weight * rate * (1 - rate) + weight**2 / 4) / (1 + weight)
    return Interval(rate, max(0.0, middle - half), min(1.0, middle + half))
