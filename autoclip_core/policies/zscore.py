"""A moving mean of the norm plus z moving deviations: ZClip."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from autoclip_core.checks import (
    check_choice,
    check_count,
    check_flag,
    check_number,
    check_positive,
)
from autoclip_core.history import moving
from autoclip_core.history.moving import Moments
from autoclip_core.policy import Policy, select_rows, set_fields
from autoclip_core.scale import XP, Array, Limit, divide

TARGETS = ("reciprocal", "mean", "threshold")
RECORDS = ("winsorized", "applied", "raw", "none")


@dataclass(frozen=True, repr=False, init=False)
class ZScore(Policy):
    """Clip norms more than z deviations above a moving average: T = mu + z * sigma.

    During the first `warmup_steps` norms of a row, nothing is clipped; mu and sigma are
    the mean and the (population) deviation of these norms. Afterwards, with y the
    recorded norm,

        mu <- alpha * mu + (1 - alpha) * y
        sigma^2 <- alpha * sigma^2 + (1 - alpha) * (y - mu)^2        (mu is the new one)

    A norm n above T is scaled to the target R. The recorded norm y decides whether the
    threshold can follow a change of level.

    With `log=True`, mu and sigma are those of ln n and ln y, and T is
    exp(mu + z * sigma). The targets are then the exponentials of the formulas below;
    exp(mu) is the geometric mean. Gradient norms are closer to log-normal than to
    normal, so the clip rate then depends less on their spread.

    Args:
      z: the number of deviations above the mean, > 0; usually 2 to 3.
      alpha: the weight of the previous moments, in [0, 1); usually 0.9 to 0.99. The
        average spans about 1 / (1 - alpha) steps.
      warmup_steps: the number of norms of a row before anything is clipped, >= 0.
      target: R. "reciprocal" is mu + z^2 * sigma / z_n with z_n = (n - mu) / sigma, so
        a larger spike ends closer to mu. "mean" is mu. "threshold" is T.
      record: y. "winsorized" is min(n, T); T follows a change of level, because sigma
        grows by about 7 % at each clipped step. If sigma = 0 (constant norms), y is at
        most 2 * T, because T could not rise otherwise (n itself if T <= 0, as it may be
        for losses). "applied" is the norm after
        clipping, the paper's rule; T never follows a tenfold rise, because a clipped
        spike lies less than one sigma from mu. "raw" is n; one spike hides the next.
        "none" records nothing at a clipped step.
      log: whether to use the logarithms of the norms.

    Raises:
      TypeError: a number has the wrong type.
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
      Chen, Firat, Bapna et al., "The best of both worlds: Combining recent advances in
      neural machine translation", 2018, https://arxiv.org/abs/1804.09849 (log, z = 4)
    """

    z: float
    alpha: float
    warmup_steps: int
    target: str
    # The argument is `record`. A field of that name would hide the method.
    recorded: str = field(metadata={"argument": "record"})
    log: bool = field(default=False, metadata={"is_added": True})

    def __init__(
        self,
        z: float = 2.5,
        *,
        alpha: float = 0.97,
        warmup_steps: int = 25,
        target: str = "reciprocal",
        record: str = "winsorized",
        log: bool = False,
    ) -> None:
        set_fields(
            self,
            z=check_positive("z", z),
            alpha=check_number("alpha", alpha, "in [0, 1)", lambda x: 0 <= x < 1),
            warmup_steps=check_count("warmup_steps", warmup_steps, 0),
            target=check_choice("target", target, TARGETS),
            recorded=check_choice("record", record, RECORDS),
            log=check_flag("log", log),
        )

    @property
    def can_limit_losses(self) -> bool:
        """Whether it uses the values themselves, not their logarithms."""
        return not self.log

    def init(self, rows: int, xp: XP = np) -> Moments:
        """Return the state before the first norm."""
        return moving.empty(rows, xp)

    def limit(
        self, state: Any, norms: Array = None, *, param_norms: Array = None, xp: XP = np
    ) -> Limit:
        """Return mu + z * sigma and the target; without norms the target is T."""
        mean, deviation, count = state
        is_ready = count >= max(self.warmup_steps, 1)
        level = moving.add_offset(mean, self.z * deviation, self.log, xp)
        threshold = xp.where(is_ready, level, float("inf"))
        if norms is None or self.target == "threshold":
            return Limit(threshold, threshold)
        is_above = norms > threshold
        if self.target == "mean":
            return Limit(threshold, xp.where(is_above, mean, threshold))
        # If n is clipped, sigma / (n - mu) is at most 1 / z. Otherwise R is T.
        # If sigma = 0, R is mu: n - mu may be so small that XLA flushes it to 0.
        spread = xp.where(is_above, deviation, 0.0)
        distance = moving.subtract_mean(norms, mean, self.log, xp)
        excess = xp.where(spread > 0, distance, 1.0)
        offset = self.z * self.z * (spread * divide(spread, excess, xp))
        reciprocal = moving.add_offset(mean, offset, self.log, xp)
        target = xp.minimum(reciprocal, threshold)  # rounding may exceed T
        return Limit(threshold, xp.where(is_above, target, threshold))

    def record(self, state: Any, norms: Array, limit: Limit, xp: XP = np) -> Moments:
        """Return the moments with the recorded norm: a mean first, then an average."""
        new = self._choose_recorded(norms, state.deviation, limit, xp)
        updated = moving.push(
            *(state, new),
            alpha=self.alpha,
            warmup_steps=self.warmup_steps,
            log=self.log,
            xp=xp,
        )
        if self.recorded == "none":
            updated = select_rows(norms <= limit.threshold, updated, state, xp)
        return updated

    def _choose_recorded(
        self, norms: Array, deviation: Array, limit: Limit, xp: XP
    ) -> Array:
        """Return the recorded norms y, as the argument `record` chooses them."""
        if self.recorded == "applied":
            return xp.where(norms > limit.threshold, limit.target, norms)
        if self.recorded == "winsorized":
            threshold = limit.threshold
            # A loss may be negative: twice its threshold is no room for a deviation.
            widened = xp.where(threshold > 0, 2 * threshold, norms)
            ceiling = xp.where(deviation > 0, threshold, widened)
            return xp.minimum(norms, ceiling)
        return norms
