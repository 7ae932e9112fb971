"""The keywords that all clippers share: their checks and their saved form."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypedDict

import keras
import numpy as np

import autoclip_core
from autoclip_core import Policy
from autoclip_core.checks import check_choice, check_flag, format_error
from autoclip_core.clipper.patterns import Pattern, as_patterns
from autoclip_core.clipper.settings import PolicyBounds, choose_scope

from . import namespace


class ClipperKeywords(TypedDict, total=False):
    """Keywords of every clipper; `Clipper` documents them."""

    scope: str | None
    global_clipping: bool | None
    nonfinite: str
    exclude: Pattern | Iterable[Pattern] | None
    dry_run: bool


class PolicyKeywords(ClipperKeywords, total=False):
    """Keywords of every clipper with a policy."""

    min_threshold: float | None
    max_threshold: float | None


class WarmupKeywords(PolicyKeywords, total=False):
    """Keywords of every clipper whose policy has no warm-up arguments."""

    warmup_steps: int
    warmup_threshold: float | None


@dataclass(frozen=True)
class Settings:
    """The common keywords of one clipper."""

    scope: str | None = None
    global_clipping: bool | None = None
    nonfinite: str = "zero"
    warmup_steps: int = 0
    warmup_threshold: float | None = None
    min_threshold: float | None = None
    max_threshold: float | None = None
    exclude: Any = None
    dry_run: bool = False

    def __post_init__(self) -> None:
        """Check the rules that do not depend on the policy.

        Raises:
          ValueError, TypeError: an argument breaks its rule; the message says which.
        """
        check_flag("dry_run", self.dry_run)
        if self.nonfinite in ("skip", "raise"):
            way_out = (
                "a gradient transformer cannot skip an update or read a value; set "
                'nonfinite="zero", and to stop a run add keras.callbacks.'
                "TerminateOnNaN()"
            )
            rule = '"zero" or "propagate" in Keras'
            raise ValueError(format_error("nonfinite", rule, self.nonfinite, way_out))
        check_choice("nonfinite", self.nonfinite, ("zero", "propagate"))
        if self.scope == "group":
            way_out = (
                "a Keras optimizer has no groups; give it a clipper for each part of "
                'the model, such as QuantileClip(scope="global", exclude="encoder")'
            )
            rule = '"parameter", "global" or "unit" in Keras'
            raise ValueError(format_error("scope", rule, self.scope, way_out))

    def choose_scope(self, default: str) -> str:
        """Return the scope that `scope` and `global_clipping` agree on."""
        return choose_scope(self.scope, self.global_clipping, default)

    def wrap_policy(self, policy: Policy) -> Policy:
        """Return the policy wrapped in its warm-up, its floor and its cap."""
        bounds = PolicyBounds(
            self.warmup_steps,
            self.warmup_threshold,
            self.min_threshold,
            self.max_threshold,
        )
        return bounds.apply(policy)

    def non_defaults(self) -> dict[str, Any]:
        """Return the keywords that differ from their defaults."""
        pairs = ((f.name, getattr(self, f.name), f.default) for f in fields(self))
        return {name: value for name, value, default in pairs if value != default}

    def to_config(self) -> dict[str, Any]:
        """Return the keywords that differ from their defaults, as plain data."""
        config = self.non_defaults()
        if "exclude" in config:
            config["exclude"] = [_to_config(p) for p in as_patterns(self.exclude)]
        return config


def exclude_from_config(saved: Iterable[Any] | None) -> list[Pattern] | None:
    """Return the patterns and functions that `Settings.to_config` returned."""
    return None if saved is None else [_from_config(pattern) for pattern in saved]


def _from_config(saved: Any) -> Any:
    if isinstance(saved, Mapping) and "regex" in saved:
        return re.compile(saved["regex"], saved["flags"])
    return keras.saving.deserialize_keras_object(saved)


def _to_config(pattern: Pattern) -> Any:
    """Return a pattern as JSON can hold it; Keras saves a function by its name."""
    if isinstance(pattern, re.Pattern):
        return {"regex": pattern.pattern, "flags": pattern.flags}
    return keras.saving.serialize_keras_object(pattern)


def find_policy(name: str) -> Any | None:
    """Return a policy class of the core, or one that is registered with Keras."""
    policy_class = getattr(autoclip_core, name, None)
    return policy_class or keras.saving.get_registered_object(name)


def check_runs_in_graph(policy: Policy) -> None:
    """Refuse a policy that a graph cannot run.

    Raises:
      ValueError: the policy's state grows without bound, or the policy skips whole
        updates.
    """
    policy.init(1, namespace)  # raises for a history of unbounded length
    norms = np.ones(1, np.float32)
    if policy.limit(policy.init(1), norms, param_norms=norms).cancels:
        way_out = 'a gradient transformer cannot do that; use Drop(..., action="zero")'
        rule = 'without Drop(action="skip"), which skips whole updates'
        raise ValueError(format_error("policy", rule, policy, way_out))
