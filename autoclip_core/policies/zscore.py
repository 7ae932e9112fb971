"""ZClip: a moving mean of the norm plus z moving deviations."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from autoclip_core.checks import (
    check_choice,
    check_count,
    check_number,
    check_positive,
)
from autoclip_core.history.lookup import look_up_constants
from autoclip_core.history.validation import find_invalid_mean, find_invalid_value
from autoclip_core.policy import Limit, Policy, select_rows
from autoclip_core.scale import Array

TARGETS = ("reciprocal", "mean", "threshold")
RECORDS = ("winsorized", "applied", "raw", "none")


class Moments(NamedTuple):
    """The state of `ZScore`."""

    mean: Array
    """Shape (rows,): the moving average of what was recorded."""
    deviation: Array
    """Shape (rows,): its deviation; sigma, not its square, which could overflow."""
    count: Array
    """Shape (rows,): norms recorded, up to the length of the warm-up."""

    def find_problem(self) -> str:
        """Return what is wrong with moments that were read from somewhere, or ""."""
        sound = np.isfinite(self.deviation) & (self.deviation >= 0)
        return find_invalid_mean(self.mean, self.count) or find_invalid_value(
            "deviation", self.deviation, ">= 0 and finite", sound
        )


@dataclass(frozen=True, repr=False, init=False)
class ZScore(Policy):
    """Clip norms more than z deviations above a moving average: T = mu + z * sigma.

    During the first `warmup_steps` norms, mu and sigma are their mean and (population)
    deviation, and nothing is clipped. Afterwards, with y the recorded norm,

        mu <- alpha * mu + (1 - alpha) * y
        sigma^2 <- alpha * sigma^2 + (1 - alpha) * (y - mu)^2        (mu is the new one)

    A norm n above T is scaled to the target R: "reciprocal" mu + z^2 * sigma / z_n with
    z_n = (n - mu) / sigma, so that the larger the spike, the closer to mu; "mean" mu;
    "threshold" T.

    What is recorded decides whether the threshold can follow a change of level.
    "winsorized", min(n, T), does: sigma grows by about 7 % at each clipped step.
    "applied", the norm after clipping, is the paper's rule; it never follows a tenfold
    rise, because a clipped spike lies less than one sigma from mu. "raw" n lets one
    spike hide the next; "none" learns nothing from a clipped step. A history without
    any spread (sigma = 0, constant norms) would make "winsorized" as blind: there the
    recorded norm is at most 2 * T.

    Args:
      z: deviations above the mean, > 0; 2 to 3.
      alpha: the memory, in [0, 1); 0.9 to 0.99. It spans about 1 / (1 - alpha) steps.
      warmup_steps: norms recorded before anything is clipped, >= 0.
      target: "reciprocal", "mean" or "threshold".
      record: "winsorized", "applied", "raw" or "none".

    Raises:
      ValueError: an argument is outside its range.

    >>> from autoclip_core import decide
    >>> policy = ZScore(2.0, warmup_steps=2, target="threshold")
    >>> state = policy.init(rows=1)
    >>> for norm in [1.0, 3.0, 8.0]:
    ...     state, decision = decide(policy, state, [norm])
    >>> float(decision.threshold[0]), float(decision.scale[0])
    (4.0, 0.5)

    Reference:
      Kumar, Owen, Roy Chowdhury, Guera, "ZClip: Adaptive spike mitigation for LLM
      pre-training", 2025, https://arxiv.org/abs/2504.02507
    """

    z: float
    alpha: float
    warmup_steps: int
    target: str
    # The argument is `record`; a field of that name would hide the method.
    recorded: str = field(metadata={"argument": "record"})

    def __init__(
        self,
        z: float = 2.5,
        *,
        alpha: float = 0.97,
        warmup_steps: int = 25,
        target: str = "reciprocal",
        record: str = "winsorized",
    ) -> None:
        """Check and keep the arguments."""
        checked = {
            "z": check_positive("z", z),
            "alpha": check_number("alpha", alpha, "in [0, 1)", lambda x: 0 <= x < 1),
            "warmup_steps": check_count("warmup_steps", warmup_steps, 0),
            "target": check_choice("target", target, TARGETS),
            "recorded": check_choice("record", record, RECORDS),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def init(self, rows: int, xp: Any = np) -> Moments:
        """Return the state before the first norm."""
        mean = xp.zeros((rows,), dtype=xp.float32)
        deviation = xp.zeros((rows,), dtype=xp.float32)  # its own: buffers are donated
        return Moments(mean, deviation, xp.zeros((rows,), dtype=xp.int32))

    def limit(
        self,
        state: Moments,
        norms: Array = None,
        *,
        param_norms: Array = None,
        xp: Any = np,
    ) -> Limit:
        """Return mu + z * sigma and the target; without norms the target is T."""
        mean, deviation, count = state
        ready = count >= max(self.warmup_steps, 1)
        threshold = xp.where(ready, mean + self.z * deviation, float("inf"))
        if norms is None or self.target == "threshold":
            return Limit(threshold, threshold)
        above = norms > threshold
        if self.target == "mean":
            return Limit(threshold, xp.where(above, mean, threshold))
        # sigma / (n - mu) is at most 1 / z where n is clipped; elsewhere R is T.
        # Without any deviation R is mu, and n - mu may be so small that XLA takes it
        # for 0.
        spread = xp.where(above, deviation, 0.0)
        excess = xp.where(spread > 0, norms - mean, 1.0)
        reciprocal = mean + self.z * self.z * (spread * (spread / excess))
        target = xp.minimum(reciprocal, threshold)  # which rounding may exceed
        return Limit(threshold, xp.where(above, target, threshold))

    def record(
        self, state: Moments, norms: Array, limit: Limit, xp: Any = np
    ) -> Moments:
        """Return the moments after one norm: their mean at first, then the average."""
        mean, deviation, count = state
        new = self._recorded(norms, deviation, limit, xp)
        # In the warm-up the n-th norm has the weight 1/n, and later 1 - alpha. The mean
        # of squares takes (y - old mean)^2 times `weight - weight^2` (Welford), later
        # times `weight * alpha^2`, which makes it the square around the new mean.
        young = (count < self.warmup_steps) | (count == 0)
        weight = xp.where(young, _share(count, self.warmup_steps, xp), 1 - self.alpha)
        spread = weight * xp.where(young, 1 - weight, self.alpha * self.alpha)
        apart = xp.maximum(new - mean, mean - new)
        moved = Moments(
            mean + weight * (new - mean),
            _blend(deviation, weight, apart, spread, xp),
            xp.where(young, count + 1, count),
        )
        if self.recorded == "none":
            moved = select_rows(norms <= limit.threshold, moved, state, xp)
        return moved

    def _recorded(self, norms: Array, deviation: Array, limit: Limit, xp: Any) -> Array:
        """Return what the history learns of a norm."""
        if self.recorded == "applied":
            return xp.where(norms > limit.threshold, limit.target, norms)
        if self.recorded == "winsorized":
            most = limit.threshold
            return xp.minimum(norms, xp.where(deviation > 0, most, 2 * most))
        return norms


def _share(count: Array, most: int, xp: Any) -> Array:
    """Return 1 / (count + 1), the weight of the next norm in a mean of up to `most`."""
    (share,) = look_up_constants(
        _shares, most, n=xp.where(count < most, count, most), xp=xp
    )
    return share


def _shares(n: Array) -> tuple[Array]:
    return (np.float32(1) / (n + 1).astype(np.float32),)


def _blend(sigma: Array, weight: Array, apart: Array, spread: Array, xp: Any) -> Array:
    """Return sqrt((1 - weight) * sigma^2 + spread * apart^2), as sigma plus a change.

    The change is a fraction of sigma, and so is its rounding: a root that is always off
    by one unit (torch's is) would add up over the memory of the average. Both numbers
    are divided by the larger one first: a raw norm is never squared.
    """
    largest = xp.maximum(sigma, apart)
    unit = xp.where(largest > 0, largest, 1.0)
    old, new = sigma / unit, apart / unit
    gain, loss = spread * (new * new), weight * (old * old)
    total = old + xp.sqrt(old * old - loss + gain)
    change = (gain - loss) / xp.where(total > 0, total, 1.0)
    return unit * (old + change)
