"""A quantile of past norms that is tracked in one number per row."""

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import numpy as np

from autoclip_core.checks import check_positive, check_quantile
from autoclip_core.history.averages import MAX_EXPONENT, keep_in_range
from autoclip_core.history.validation import find_invalid_value
from autoclip_core.policy import Policy, set_fields
from autoclip_core.scale import XP, Array, Limit


class Tracked(NamedTuple):
    """The state of `StreamingQuantile`."""

    level: Array
    """C, shape (rows,): the tracked quantile; +inf before the first norm."""

    def find_problem(self) -> str:
        """Return why a loaded level is invalid, or ""."""
        return find_invalid_value("level", self.level, "> 0", self.level > 0)


@dataclass(frozen=True, repr=False)
class StreamingQuantile(Policy):
    """Clip to a quantile that is tracked in one number per row: T = R = C.

    The first norm sets C; each later norm n moves it by a fixed ratio,

        C <- C * exp(-rate * (1[n <= C] - q))

    which is integral control of the clip rate. Over any t steps after the first,
    clip rate = (1 - q) + ln(C_t / C_0) / (rate * t), exactly. A single norm of any size
    moves C by a factor of at most exp(rate * q).

    Use this policy for thousands of rows: a window of 1000 norms takes 2000 times the
    memory.

    Args:
      quantile: q, in [0, 1].
      rate: the step of ln C, > 0; usually 0.02 to 0.2. With 0.05 and q = 0.9 the
        threshold rises by at most 4.6 % per step and falls by at most 0.5 %.

    Raises:
      TypeError: an argument is not a number.
      ValueError: an argument is outside its range.

    >>> from autoclip_core import decide
    >>> policy = StreamingQuantile(0.5, rate=0.1)
    >>> state = policy.init(rows=1)
    >>> for norm in [1.0, 0.5, 2.0]:
    ...     state, decision = decide(policy, state, [norm])
    ...     print(f"{decision.threshold[0]:.4f}")
    inf
    1.0000
    0.9512

    Reference:
      Andrew, Thakkar, McMahan, Ramaswamy, "Differentially private learning with
      adaptive clipping", 2021, https://arxiv.org/abs/1905.03871
    """

    quantile: float = 0.9
    _: KW_ONLY
    rate: float = 0.05

    def __post_init__(self) -> None:
        """Check the arguments."""
        quantile = check_quantile("quantile", self.quantile)
        set_fields(self, quantile=quantile, rate=check_positive("rate", self.rate))

    @property
    def expected_clip_rate(self) -> float:
        """1 - q, for any series of norms that stays in bounds."""
        return round(1 - self.quantile, 12)

    def init(self, rows: int, xp: XP = np) -> Tracked:
        """Return the state before the first norm."""
        return Tracked(xp.full((rows,), float("inf"), dtype=xp.float32))

    def limit(
        self, state: Any, norms: Array = None, *, param_norms: Array = None, xp: XP = np
    ) -> Limit:
        """Return the tracked quantile."""
        return Limit(state.level, state.level)

    def record(self, state: Any, norms: Array, limit: Limit, xp: XP = np) -> Tracked:
        """Return the quantile after one step up or down; the first norm sets it."""
        # level + level * expm1(x), not level * exp(x): the rounding of a factor near 1
        # to float32 would bias every step in the same direction.
        has_level = xp.isfinite(state.level)
        level = xp.where(has_level, state.level, norms)  # inf - inf would warn
        rise = level + level * math.expm1(min(self.rate * self.quantile, MAX_EXPONENT))
        fall = level + level * math.expm1(-self.rate * (1 - self.quantile))
        # A level of 0 or infinity would never change again.
        moved = keep_in_range(xp.where(norms > level, rise, fall), xp)
        return Tracked(xp.where(has_level, moved, norms))
