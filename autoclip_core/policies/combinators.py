"""Combinators: policies that change the limit of an inner policy; `drop.py` has `Drop`.

A combinator changes what is applied, never what is recorded: the inner policy records
against its own limit, which `Limit.inner` holds. Otherwise a policy that records the
norm after clipping would record the cap, or the 0 of `Drop`, and then drop every norm.

`Drop` sets the drop level D of a limit. `Cap` leaves D unchanged, `Floor` raises it,
and `Warmup` sets it to +inf until the warm-up ends.
"""

from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import numpy as np

from autoclip_core.checks import check_count, check_limit, check_positive
from autoclip_core.history.validation import find_invalid_value
from autoclip_core.policy import Policy, check_policy, set_fields
from autoclip_core.scale import XP, Array, Limit, complete_limit


@dataclass(frozen=True, repr=False)
class Combinator(Policy):
    """A policy around an inner policy; it uses the state of the inner policy."""

    policy: Policy

    def __post_init__(self) -> None:
        """Check that `policy` is a policy."""
        check_policy(self.policy)

    @property
    def needs_param_norms(self) -> bool:
        """Whether the inner policy needs the norms of the parameters."""
        return self.policy.needs_param_norms

    @property
    def can_limit_losses(self) -> bool:
        """Whether the inner policy works on values of any sign."""
        return self.policy.can_limit_losses

    def init(self, rows: int, xp: XP = np) -> Any:
        """Return the state of the inner policy."""
        return self.policy.init(rows, xp)

    def record(self, state: Any, norms: Array, limit: Limit, xp: XP = np) -> Any:
        """Return the next state of the inner policy, recorded against its limit."""
        return self.policy.record(state, norms, _get_inner(limit), xp)


@dataclass(frozen=True, repr=False)
class Cap(Combinator):
    """Keep the threshold at or below a constant: T = min(T, max_norm).

    The target is capped in the same way. The drop level of an inner `Drop` is not
    changed: `Cap(Drop(policy), max_norm=1.0)` clips at 1 and drops what `policy` would
    clip. Put `Cap` outermost: then it also applies during the warm-up of the inner
    policy.

    Args:
      policy: the inner policy.
      max_norm: the largest threshold, > 0, in the unit of a gradient norm.

    Raises:
      TypeError: `policy` is not a policy, or `max_norm` is not a number.
      ValueError: `max_norm` is not positive and finite.

    >>> from autoclip_core import Quantile, decide
    >>> policy = Cap(Quantile(0.9), max_norm=2.0)
    >>> _, decision = decide(policy, policy.init(rows=1), [8.0])
    >>> float(decision.threshold[0]), float(decision.scale[0])
    (2.0, 0.25)
    """

    _: KW_ONLY
    max_norm: float

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        set_fields(self, max_norm=check_positive("max_norm", self.max_norm))

    def limit(
        self, state: Any, norms: Array = None, *, param_norms: Array = None, xp: XP = np
    ) -> Limit:
        """Return the inner limit, at most `max_norm`."""
        inner = self.policy.limit(state, norms, param_norms=param_norms, xp=xp)
        threshold, target, _, cancels, drop = complete_limit(inner, xp)
        threshold = xp.where(threshold > self.max_norm, self.max_norm, threshold)
        target = xp.where(target > self.max_norm, self.max_norm, target)
        return Limit(threshold, target, inner, cancels, drop=drop)


@dataclass(frozen=True, repr=False)
class Floor(Combinator):
    """Keep the threshold at or above a constant: T = max(T, min_norm).

    Norms up to `min_norm` are neither clipped nor dropped, and no norm is scaled to
    less than `min_norm`: target and drop level are raised in the same way.

    Args:
      policy: the inner policy.
      min_norm: the smallest threshold, > 0, in the unit of a gradient norm.

    Raises:
      TypeError: `policy` is not a policy, or `min_norm` is not a number.
      ValueError: `min_norm` is not positive and finite.

    >>> from autoclip_core import Fixed, decide
    >>> policy = Floor(Fixed(1.0), min_norm=2.0)
    >>> _, decision = decide(policy, policy.init(rows=2), [1.5, 4.0])
    >>> decision.scale.tolist()
    [1.0, 0.5]
    """

    _: KW_ONLY
    min_norm: float

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        set_fields(self, min_norm=check_positive("min_norm", self.min_norm))

    def limit(
        self, state: Any, norms: Array = None, *, param_norms: Array = None, xp: XP = np
    ) -> Limit:
        """Return the inner limit, at least `min_norm`."""
        inner = self.policy.limit(state, norms, param_norms=param_norms, xp=xp)
        threshold, target, _, cancels, drop = complete_limit(inner, xp)
        threshold = xp.where(threshold < self.min_norm, self.min_norm, threshold)
        target = xp.where(target < self.min_norm, self.min_norm, target)
        drop = xp.where(drop < self.min_norm, self.min_norm, drop)
        return Limit(threshold, target, inner, cancels, drop=drop)


class WarmingUp(NamedTuple):
    """The state of `Warmup`."""

    inner: Any
    """The state of the inner policy, which records from the first norm on."""
    recorded: Array
    """Shape (rows,): norms recorded so far, up to `steps`."""

    def find_problem(self) -> str:
        """Return why a loaded count is invalid, or ""."""
        return find_invalid_value("recorded", self.recorded, ">= 0", self.recorded >= 0)


@dataclass(frozen=True, repr=False)
class Warmup(Combinator):
    """Use a constant threshold until a row has recorded `steps` norms.

    T = R = threshold and D = +inf during the warm-up; afterwards the inner policy sets
    all three. The inner policy records from the first norm on.

    Each row has its own count. A step does not count for a row if the gradient is
    missing, zero or not finite.

    Args:
      policy: the inner policy.
      steps: the number of norms of a row before the inner policy sets the limit, >= 0.
      threshold: the constant, > 0, in the unit of a gradient norm; +inf clips nothing.

    Raises:
      TypeError: `policy` is not a policy, or a number has the wrong type.
      ValueError: a number is outside its range.

    >>> from autoclip_core import Quantile, decide
    >>> policy = Warmup(Quantile(0.5), steps=2, threshold=1.0)
    >>> state = policy.init(rows=1)
    >>> for norm in [4.0, 6.0, 10.0]:
    ...     state, decision = decide(policy, state, [norm])
    ...     print(decision.threshold[0], decision.scale[0])
    1.0 0.25
    1.0 0.16666667
    5.0 0.5
    """

    _: KW_ONLY
    steps: int
    threshold: float = float("inf")

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        steps = check_count("steps", self.steps, 0)
        threshold = check_limit("threshold", self.threshold)
        set_fields(self, steps=steps, threshold=threshold)

    @property
    def expected_clip_rate(self) -> float | None:
        """The rate of the inner policy, after the warm-up."""
        return self.policy.expected_clip_rate

    def init(self, rows: int, xp: XP = np) -> WarmingUp:
        """Return the state of the inner policy and a count of 0."""
        return WarmingUp(self.policy.init(rows, xp), xp.zeros((rows,), dtype=xp.int32))

    def limit(
        self, state: Any, norms: Array = None, *, param_norms: Array = None, xp: XP = np
    ) -> Limit:
        """Return the constant for rows in their warm-up, else the inner limit."""
        inner = self.policy.limit(state.inner, norms, param_norms=param_norms, xp=xp)
        threshold, target, _, cancels, drop = complete_limit(inner, xp)
        is_warming = state.recorded < self.steps
        threshold = xp.where(is_warming, self.threshold, threshold)
        target = xp.where(is_warming, self.threshold, target)
        drop = xp.where(is_warming, float("inf"), drop)
        return Limit(threshold, target, inner, cancels, drop=drop)

    def record(self, state: Any, norms: Array, limit: Limit, xp: XP = np) -> WarmingUp:
        """Return the next state of the inner policy and the next count."""
        inner = self.policy.record(state.inner, norms, _get_inner(limit), xp)
        count = xp.where(state.recorded < self.steps, state.recorded + 1, self.steps)
        return WarmingUp(inner, count)


def _get_inner(limit: Limit) -> Limit:
    """Return the limit of the inner policy."""
    assert isinstance(limit.inner, Limit), "`limit` must come from a combinator"
    return limit.inner
