"""A moving mean and deviation of the norms of each row, or of their logarithms."""

from typing import NamedTuple

import numpy as np

from autoclip_core.scale import XP, Array, divide, square_root

from .averages import keep_in_range, keeps_only_last, multiply_by_exp
from .lookup import look_up_constants
from .validation import find_invalid_mean, find_invalid_value


class Moments(NamedTuple):
    """The moving moments of each row."""

    mean: Array
    """Shape (rows,): mu, the average of the recorded norms; with `log`, exp(mu)."""
    deviation: Array
    """Shape (rows,): sigma, their deviation. Its square could overflow."""
    count: Array
    """Shape (rows,): norms recorded, up to max(warmup_steps, 1)."""

    def find_problem(self, lowest: float = 0.0) -> str:
        """Return why loaded moments are invalid, or ""; norms are above `lowest`."""
        is_valid = np.isfinite(self.deviation) & (self.deviation >= 0)
        return find_invalid_mean(self.mean, self.count, lowest) or find_invalid_value(
            "deviation", self.deviation, ">= 0 and finite", is_valid
        )

    def find_signed_problem(self) -> str:
        """Return why loaded moments of losses are invalid, or ""."""
        return self.find_problem(lowest=-np.inf)


def empty(rows: int, xp: XP = np) -> Moments:
    """Return the moments before the first norm."""
    mean = xp.zeros((rows,), dtype=xp.float32)
    # A separate array, because JAX donates buffers.
    deviation = xp.zeros((rows,), dtype=xp.float32)
    return Moments(mean, deviation, xp.zeros((rows,), dtype=xp.int32))


def push(
    moments: Moments,
    norms: Array,
    *,
    alpha: float,
    warmup_steps: int,
    log: bool,
    xp: XP = np,
) -> Moments:
    """Return the moments after one more norm in each row.

    During the warm-up the n-th norm has the weight 1 / n, afterwards 1 - alpha. The
    square (y - old mean)^2 has the weight w - w^2 during the warm-up (Welford).
    Afterwards it has w * alpha^2, which makes it the square around the new mean.
    """
    mean, deviation, count = moments
    is_warming = (count < warmup_steps) | (count == 0)
    n = xp.where(count < warmup_steps, count, warmup_steps)
    (mean_weight,) = look_up_constants(_compute_weights, warmup_steps, n=n, xp=xp)
    weight = xp.where(is_warming, mean_weight, 1 - alpha)
    remainder = xp.where(is_warming, 1 - weight, alpha * alpha)
    square_weight = weight * remainder
    offset = subtract_mean(norms, mean, log, xp)
    next_mean = _update_mean(mean, norms, weight * offset, log, xp)
    spread = _update_deviation(deviation, weight, offset, square_weight, xp)
    if keeps_only_last(alpha):
        next_mean = xp.where(is_warming, next_mean, norms)
        spread = xp.where(is_warming, spread, 0.0)
    return Moments(next_mean, spread, xp.where(is_warming, count + 1, count))


def _compute_weights(n: Array) -> tuple[Array]:
    """Return 1 / (n + 1), the weight of the next norm in a mean of n norms."""
    return (np.float32(1) / (n + 1).astype(np.float32),)


def subtract_mean(norms: Array, mean: Array, log: bool, xp: XP) -> Array:
    """Return n - mu; with `log`, ln n - mu, or 0 if there is no norm or no mean.

    With `log` the state holds exp(mu). A ratio of norms beyond the range of float32
    counts as the end of that range.
    """
    if not log:
        return norms - mean
    has_both = (norms > 0) & (mean > 0)
    divisor = xp.where(has_both, mean, 1.0)
    ratio = divide(xp.where(has_both, norms, 1.0), divisor, xp)
    return xp.log(keep_in_range(ratio, xp))


def add_offset(mean: Array, offset: Array, log: bool, xp: XP) -> Array:
    """Return mu + offset; with `log`, its exponential."""
    if not log:
        return mean + offset
    # Before the first norm the mean is 0, and the result is not used.
    return multiply_by_exp(xp.where(mean > 0, mean, 1.0), offset, xp)


def _update_mean(mean: Array, new: Array, offset: Array, log: bool, xp: XP) -> Array:
    """Return the mean that includes the norm `new`, `offset` away from the old mean."""
    if not log:
        return mean + offset
    old = xp.where(mean > 0, mean, new)  # the first norm is the mean
    # A geometric mean lies between its norms. Rounding must not leave float32.
    moved = xp.minimum(old * xp.exp(offset), xp.maximum(old, new))
    return xp.maximum(moved, xp.minimum(old, new))


def _update_deviation(
    sigma: Array, weight: Array, offset: Array, square_weight: Array, xp: XP
) -> Array:
    """Return sqrt((1 - weight) * sigma^2 + square_weight * offset^2).

    The result is sigma plus a change. The change is a fraction of sigma, and so is its
    rounding error. A root that is always off by one unit (torch's is) would add up over
    the span of the average. Both numbers are first divided by the larger one, so no
    norm is squared.
    """
    distance = xp.maximum(offset, 0.0 - offset)
    largest = xp.maximum(sigma, distance)
    unit = xp.where(largest > 0, largest, 1.0)
    old, new = divide(sigma, unit, xp), divide(distance, unit, xp)
    gain, loss = square_weight * (new * new), weight * (old * old)
    total = old + square_root(old * old - loss + gain, xp)
    change = (gain - loss) / xp.where(total > 0, total, 1.0)
    return unit * (old + change)
