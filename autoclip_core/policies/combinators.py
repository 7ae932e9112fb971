"""Combinators: policies that change the limit of an inner policy.

A combinator changes what is applied, never what is recorded: the inner policy records
against its own limit, which `Limit.inner` holds. Otherwise a policy that records the
norm after clipping would record the cap, or the 0 of `Drop`, and then drop every norm.
"""

from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import numpy as np

from autoclip_core.checks import check_choice, check_count, check_limit, check_positive
from autoclip_core.history.validation import find_invalid_value
from autoclip_core.policy import Limit, Policy, check_policy
from autoclip_core.scale import XP, Array


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

    def init(self, rows: int, xp: XP = np) -> Any:
        """Return the state of the inner policy."""
        return self.policy.init(rows, xp)

    def record(self, state: Any, norms: Array, limit: Limit, xp: XP = np) -> Any:
        """Return the next state of the inner policy, recorded against its limit."""
        return self.policy.record(state, norms, _get_inner(limit), xp)


@dataclass(frozen=True, repr=False)
class Cap(Combinator):
    """Keep the threshold at or below a constant: T = min(T, max_norm).

    The target is capped in the same way. Put `Cap` outermost: then it also applies
    during the warm-up of the inner policy.

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
        object.__setattr__(self, "max_norm", check_positive("max_norm", self.max_norm))

    def limit(
        self, state: Any, norms: Array = None, *, param_norms: Array = None, xp: XP = np
    ) -> Limit:
        """Return the inner limit, at most `max_norm`."""
        inner = self.policy.limit(state, norms, param_norms=param_norms, xp=xp)
        is_high = inner.threshold > self.max_norm
        threshold = xp.where(is_high, self.max_norm, inner.threshold)
        target = xp.where(inner.target > self.max_norm, self.max_norm, inner.target)
        return Limit(threshold, target, inner, inner.cancels)


@dataclass(frozen=True, repr=False)
class Floor(Combinator):
    """Keep the threshold at or above a constant: T = max(T, min_norm).

    Norms up to `min_norm` are not clipped, and no norm is scaled to less than
    `min_norm`. The exception is an inner `Drop`, whose target stays 0.

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
        object.__setattr__(self, "min_norm", check_positive("min_norm", self.min_norm))

    def limit(
        self, state: Any, norms: Array = None, *, param_norms: Array = None, xp: XP = np
    ) -> Limit:
        """Return the inner limit, at least `min_norm`."""
        inner = self.policy.limit(state, norms, param_norms=param_norms, xp=xp)
        is_low = inner.threshold < self.min_norm
        threshold = xp.where(is_low, self.min_norm, inner.threshold)
        is_low_target = (inner.target < self.min_norm) & (inner.target > 0)
        target = xp.where(is_low_target, self.min_norm, inner.target)
        return Limit(threshold, target, inner, inner.cancels)


@dataclass(frozen=True, repr=False)
class Drop(Combinator):
    """Remove a gradient above the threshold, instead of scaling it: R = 0 if n > T.

    The inner policy records all norms, also those of removed gradients. So its
    threshold can follow a lasting change of level.

    Args:
      policy: the inner policy, which sets the threshold.
      action: "zero" sets the gradient of the row to 0. "skip" cancels the whole update
        if any row exceeds its threshold.

    Raises:
      TypeError: `policy` is not a policy.
      ValueError: `action` is neither "zero" nor "skip".

    >>> from autoclip_core import Fixed, decide
    >>> policy = Drop(Fixed(1.0), action="skip")
    >>> _, decision = decide(policy, policy.init(rows=2), [0.5, 4.0])
    >>> decision.scale.tolist(), decision.skipped.tolist()
    ([0.0, 0.0], [True, True])

    Reference:
      Chen, Firat, Bapna et al., "The best of both worlds: Combining recent advances in
      neural machine translation", 2018, https://arxiv.org/abs/1804.09849
    """

    _: KW_ONLY
    action: str = "zero"

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        check_choice("action", self.action, ("zero", "skip"))

    @property
    def expected_clip_rate(self) -> float | None:
        """The rate of the inner policy: Drop removes what that policy would clip."""
        return self.policy.expected_clip_rate

    def limit(
        self, state: Any, norms: Array = None, *, param_norms: Array = None, xp: XP = np
    ) -> Limit:
        """Return the inner threshold with a target of 0.

        Raises:
          ValueError: `norms` is None. Drop cannot remove a gradient before its norm is
            known.
        """
        if norms is None:
            raise ValueError(
                "Drop needs the current norm, but the caller asked for a threshold "
                "before the norm is known; use the policy without Drop"
            )
        inner = self.policy.limit(state, norms, param_norms=param_norms, xp=xp)
        target = xp.where(inner.target > 0, 0.0, inner.target)
        cancels = self.action == "skip" or inner.cancels
        return Limit(inner.threshold, target, inner, cancels)


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

    T = R = threshold during the warm-up; afterwards the inner policy sets both. The
    inner policy records from the first norm on.

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
        object.__setattr__(self, "steps", check_count("steps", self.steps, 0))
        number = check_limit("threshold", self.threshold)
        object.__setattr__(self, "threshold", number)

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
        is_warming = state.recorded < self.steps
        threshold = xp.where(is_warming, self.threshold, inner.threshold)
        target = xp.where(is_warming, self.threshold, inner.target)
        return Limit(threshold, target, inner, inner.cancels)

    def record(self, state: Any, norms: Array, limit: Limit, xp: XP = np) -> WarmingUp:
        """Return the next state of the inner policy and the next count."""
        inner = self.policy.record(state.inner, norms, _get_inner(limit), xp)
        count = xp.where(state.recorded < self.steps, state.recorded + 1, self.steps)
        return WarmingUp(inner, count)


def _get_inner(limit: Limit) -> Limit:
    """Return the limit of the inner policy."""
    assert limit.inner is not None, "`limit` must come from a combinator"
    return limit.inner
