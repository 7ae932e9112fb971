"""Policies around a policy: they change what is applied, never what is learned.

The inner policy records against its own limit, which `Limit.inner` carries along.
Otherwise a policy that learns what it applied would learn the cap, or learn the 0 of
`Drop` and drop everything for ever.
"""

from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import numpy as np

from autoclip_core.checks import check_choice, check_count, check_limit, check_positive
from autoclip_core.history.validation import find_invalid_value
from autoclip_core.policy import Limit, Policy, check_policy
from autoclip_core.scale import Array


@dataclass(frozen=True, repr=False)
class Combinator(Policy):
    """What all of them share: the inner policy, its state and its needs."""

    policy: Policy

    def __post_init__(self) -> None:
        """Check that there is a policy inside."""
        check_policy(self.policy)

    @property
    def needs_param_norms(self) -> bool:
        """Whether the inner policy needs them."""
        return self.policy.needs_param_norms

    def init(self, rows: int, xp: Any = np) -> Any:
        """Return the inner policy's state."""
        return self.policy.init(rows, xp)

    def record(self, state: Any, norms: Array, limit: Limit, xp: Any = np) -> Any:
        """Return the inner policy's next state, recorded against its own limit."""
        return self.policy.record(state, norms, _inner(limit), xp)


@dataclass(frozen=True, repr=False)
class Cap(Combinator):
    """Keep the threshold at or below a constant: T = min(T, max_norm).

    Put it outermost, so that it also holds while the inner policy warms up.

    Args:
      policy: the policy to cap.
      max_norm: the largest threshold, > 0.

    Raises:
      TypeError, ValueError: `policy` is no policy; `max_norm` is not > 0.

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
        self,
        state: Any,
        norms: Array = None,
        *,
        param_norms: Array = None,
        xp: Any = np,
    ) -> Limit:
        """Return the inner limit, capped."""
        inner = self.policy.limit(state, norms, param_norms=param_norms, xp=xp)
        threshold = xp.where(
            inner.threshold > self.max_norm, self.max_norm, inner.threshold
        )
        target = xp.where(inner.target > self.max_norm, self.max_norm, inner.target)
        return Limit(threshold, target, inner, inner.cancels)


@dataclass(frozen=True, repr=False)
class Floor(Combinator):
    """Keep the threshold at or above a constant: T = max(T, min_norm).

    Norms up to `min_norm` are left alone, and nothing is scaled below it, except by
    `Drop`, whose target stays 0.

    Args:
      policy: the policy to hold up.
      min_norm: the smallest threshold, > 0.

    Raises:
      TypeError, ValueError: `policy` is no policy; `min_norm` is not > 0.

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
        self,
        state: Any,
        norms: Array = None,
        *,
        param_norms: Array = None,
        xp: Any = np,
    ) -> Limit:
        """Return the inner limit, held up."""
        inner = self.policy.limit(state, norms, param_norms=param_norms, xp=xp)
        low = inner.threshold < self.min_norm
        threshold = xp.where(low, self.min_norm, inner.threshold)
        short = (inner.target < self.min_norm) & (inner.target > 0)
        target = xp.where(short, self.min_norm, inner.target)
        return Limit(threshold, target, inner, inner.cancels)


@dataclass(frozen=True, repr=False)
class Drop(Combinator):
    """Remove what exceeds the threshold, instead of scaling it: R = 0 beyond T.

    Args:
      policy: the policy that sets the threshold.
      action: "zero" removes the row's gradient; "skip" cancels the whole update if any
        row exceeds its threshold. Either way the inner policy learns the norms, so that
        a lasting change of level is not dropped for ever.

    Raises:
      TypeError, ValueError: `policy` is no policy; `action` is another word.

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
        """As the inner policy; here a row beyond its threshold is dropped."""
        return self.policy.expected_clip_rate

    def limit(
        self,
        state: Any,
        norms: Array = None,
        *,
        param_norms: Array = None,
        xp: Any = np,
    ) -> Limit:
        """Return the inner threshold with a target of 0.

        Raises:
          ValueError: `norms` is None: a norm that is not known yet cannot be dropped.
        """
        if norms is None:
            raise ValueError(
                "Drop needs the current norm, and a threshold was asked for before it "
                "is known: whoever clips to that threshold cannot drop; clip without "
                "Drop"
            )
        inner = self.policy.limit(state, norms, param_norms=param_norms, xp=xp)
        target = xp.where(inner.target > 0, 0.0, inner.target)
        cancels = self.action == "skip" or inner.cancels
        return Limit(inner.threshold, target, inner, cancels)


class WarmingUp(NamedTuple):
    """The state of `Warmup`."""

    inner: Any
    """The state of the inner policy, which learns from the first norm."""
    recorded: Array
    """Shape (rows,): norms recorded so far, up to the number of warm-up steps."""

    def find_problem(self) -> str:
        """Return what is wrong with a count that was read from somewhere, or ""."""
        return find_invalid_value("recorded", self.recorded, ">= 0", self.recorded >= 0)


@dataclass(frozen=True, repr=False)
class Warmup(Combinator):
    """Use a constant threshold until a row has recorded `steps` norms.

    T = R = threshold meanwhile; afterwards the inner policy sets both.
    Each row counts for itself: a step without a gradient, or with one that is zero or
    not finite, does not count. The inner policy learns meanwhile.

    Args:
      policy: the policy that takes over.
      steps: norms to record first, >= 0.
      threshold: the constant, > 0; +inf clips nothing.

    Raises:
      TypeError, ValueError: `policy` is no policy; a number is out of its range.

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
        """As the inner policy, once it has taken over."""
        return self.policy.expected_clip_rate

    def init(self, rows: int, xp: Any = np) -> WarmingUp:
        """Return the inner policy's state and a count of 0."""
        return WarmingUp(self.policy.init(rows, xp), xp.zeros((rows,), dtype=xp.int32))

    def limit(
        self,
        state: WarmingUp,
        norms: Array = None,
        *,
        param_norms: Array = None,
        xp: Any = np,
    ) -> Limit:
        """Return the constant for rows that warm up, else the inner limit."""
        inner = self.policy.limit(state.inner, norms, param_norms=param_norms, xp=xp)
        warming = state.recorded < self.steps
        threshold = xp.where(warming, self.threshold, inner.threshold)
        target = xp.where(warming, self.threshold, inner.target)
        return Limit(threshold, target, inner, inner.cancels)

    def record(
        self, state: WarmingUp, norms: Array, limit: Limit, xp: Any = np
    ) -> WarmingUp:
        """Return the inner policy's next state and the next count."""
        inner = self.policy.record(state.inner, norms, _inner(limit), xp)
        more = xp.where(state.recorded < self.steps, state.recorded + 1, self.steps)
        return WarmingUp(inner, more)


def _inner(limit: Limit) -> Limit:
    """Return the limit that the inner policy made."""
    assert limit.inner is not None, "a combinator records against a limit of its own"
    return limit.inner
