"""The keywords that every clipper accepts, and the repr of a clipper."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any, TypedDict

import numpy as np

from autoclip_core.checks import (
    check_choice,
    check_count,
    check_flag,
    check_limit,
    check_positive,
    format_error,
)
from autoclip_core.policies.combinators import Cap, Floor, Warmup
from autoclip_core.policy import Policy, as_code, check_policy
from autoclip_core.scale import XP

from .patterns import Pattern

SCOPES = ("parameter", "group", "global", "unit")


class ClipperKeywords(TypedDict, total=False):
    """The keywords of a clipper in every framework, except those of its policy."""

    scope: str | None
    global_clipping: bool | None
    norm: str
    nonfinite: str
    exclude: Pattern | Iterable[Pattern] | None
    scale_only: Pattern | Iterable[Pattern] | None
    dry_run: bool


class PolicyKeywords(ClipperKeywords, total=False):
    """The keywords of `Clipper` that every named clipper accepts."""

    min_threshold: float | None
    max_threshold: float | None


class WarmupKeywords(PolicyKeywords, total=False):
    """The same, and those of a warm-up, for a policy that has none of its own."""

    warmup_steps: int
    warmup_threshold: float | None


def check_keywords(owner: type, given: Iterable[str], allowed: Any) -> None:
    """Check that a clipper accepts each keyword.

    Args:
      owner: the class that was called.
      given: the keywords that were passed, without the named arguments.
      allowed: the TypedDict of the accepted keywords.

    Raises:
      TypeError: a keyword is not accepted.
    """
    for name in given:
        if name not in allowed.__optional_keys__:
            parameters = signature(owner).parameters.values()
            named = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
            known = ", ".join([*named, *sorted(allowed.__optional_keys__)])
            raise TypeError(
                f"{name} is no argument of {owner.__name__}; it takes {known}"
            )


def choose_scope(scope: str | None, global_clipping: bool | None, default: str) -> str:
    """Return the scope from its two spellings, `scope` and `global_clipping`.

    Raises:
      ValueError: the two spellings disagree, or the scope is unknown.
    """
    if scope is not None:
        check_choice("scope", scope, SCOPES)
    if global_clipping is None:
        return scope or default
    check_flag("global_clipping", global_clipping)
    if scope is None:
        local = "parameter" if default == "global" else default
        return "global" if global_clipping else local
    if global_clipping != (scope == "global"):
        rule = f"in agreement with scope={scope!r}"
        way_out = "global_clipping is the older spelling of scope; pass only scope"
        error = format_error("global_clipping", rule, global_clipping, way_out)
        raise ValueError(error)
    return scope


def format_clipper(
    owner: type, arguments: Mapping[str, Any], scope: str, settings: Mapping[str, Any]
) -> str:
    """Return the repr of a clipper, such as `NormClip(max_norm=1.0, scope='global')`.

    Args:
      owner: the clipper's class; the defaults are those of its constructor.
      arguments: the arguments of the policy. The first one is always shown, and the
        others if they differ from their defaults.
      scope: the clipper's scope.
      settings: what to show after the scope: the keywords that differ from their
        defaults, then `rows`, the number of rows, once it is known.
    """
    parameters, (first, *_) = signature(owner).parameters, arguments
    shown = {
        name: value
        for name, value in arguments.items()
        if name == first or name not in parameters or value != parameters[name].default
    }
    shown |= {"scope": scope, **settings}
    inside = ", ".join(f"{name}={as_code(value)}" for name, value in shown.items())
    return f"{owner.__name__}({inside})"


def check_traceable(policy: Policy, xp: XP, way_out: str) -> None:
    """Check that a traced step can take a policy.

    Args:
      policy: the policy.
      xp: the array namespace of the step.
      way_out: the call that skips updates, for the error message.

    Raises:
      TypeError: it is no policy.
      ValueError: its history has no bound, or it cancels whole updates.
    """
    check_policy(policy)
    policy.init(1, xp)  # raises for a history of unbounded length
    norm = np.ones(1, np.float32)
    if policy.limit(policy.init(1), norm, param_norms=norm).cancels:
        rule = 'without Drop(action="skip"), which skips whole updates'
        raise ValueError(format_error("policy", rule, policy, way_out))


@dataclass(frozen=True)
class PolicyBounds:
    """The warm-up, the floor and the cap of a policy; `apply` adds them in this order.

    Raises:
      ValueError: a number is out of its range, contradicts another or has no effect.
    """

    warmup_steps: int = 0
    warmup_threshold: float | None = None
    min_threshold: float | None = None
    max_threshold: float | None = None

    def __post_init__(self) -> None:
        """Check the arguments."""
        check_count("warmup_steps", self.warmup_steps, 0)
        if self.warmup_threshold is not None:
            check_limit("warmup_threshold", self.warmup_threshold)
            if self.warmup_steps == 0:
                rule = "given together with warmup_steps"
                way_out = "set warmup_steps to the norms that each row records first"
                threshold = self.warmup_threshold
                error = format_error("warmup_threshold", rule, threshold, way_out)
                raise ValueError(error)
        low, high = self.min_threshold, self.max_threshold
        for name, value in [("min_threshold", low), ("max_threshold", high)]:
            if value is not None:
                check_positive(name, value, "use None for no such limit")
        if low is not None and high is not None and low > high:
            rule = f"at most max_threshold={high!r}"
            raise ValueError(format_error("min_threshold", rule, low, "swap the two"))

    def apply(self, policy: Policy) -> Policy:
        """Return the policy with its warm-up, its floor and, outermost, its cap."""
        if self.warmup_steps:
            limit = self.warmup_threshold
            limit = float("inf") if limit is None else limit
            policy = Warmup(policy, steps=self.warmup_steps, threshold=limit)
        if self.min_threshold is not None:
            policy = Floor(policy, min_norm=self.min_threshold)
        if self.max_threshold is not None:
            policy = Cap(policy, max_norm=self.max_threshold)
        return policy
