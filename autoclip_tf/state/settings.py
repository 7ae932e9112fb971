"""The keywords that all clippers share: their checks and their saved form."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import keras

import autoclip_core
from autoclip_core.checks import check_choice, check_flag, format_error
from autoclip_core.clipper.norms import check_norm
from autoclip_core.clipper.patterns import Pattern, as_patterns, as_scale_patterns
from autoclip_core.clipper.settings import PolicyBounds

PATTERNS = {"exclude", "scale_only"}
"""The keywords that hold patterns."""


@dataclass(frozen=True)
class Settings:
    """The common keywords of one clipper."""

    scope: str | None = None
    global_clipping: bool | None = None
    norm: str = "l2"
    nonfinite: str = "zero"
    warmup_steps: int = 0
    warmup_threshold: float | None = None
    min_threshold: float | None = None
    max_threshold: float | None = None
    exclude: Any = None
    dry_run: bool = False
    scale_only: Any = None

    def __post_init__(self) -> None:
        """Check the rules that do not depend on the policy.

        Raises:
          ValueError, TypeError: an argument breaks its rule; the message says which.
        """
        check_flag("dry_run", self.dry_run)
        check_norm(self.norm)
        as_patterns(self.exclude)
        as_scale_patterns(self.scale_only)
        way_out = (
            "a gradient transformer cannot skip an update or read a value; set "
            'nonfinite="zero", and to stop a run add keras.callbacks.TerminateOnNaN()'
        )
        check_choice("nonfinite", self.nonfinite, ("zero", "propagate"), way_out)
        if self.scope == "group":
            way_out = (
                "a Keras optimizer has no groups; give it a clipper for each part of "
                'the model, such as QuantileClip(scope="global", exclude="encoder")'
            )
            rule = '"parameter", "global" or "unit" in Keras'
            raise ValueError(format_error("scope", rule, self.scope, way_out))

    @property
    def bounds(self) -> PolicyBounds:
        """The warm-up, the floor and the cap of the policy."""
        warmup = self.warmup_steps, self.warmup_threshold
        return PolicyBounds(*warmup, self.min_threshold, self.max_threshold)

    def non_defaults(self) -> dict[str, Any]:
        """Return the keywords that differ from their defaults."""
        pairs = ((f.name, getattr(self, f.name), f.default) for f in fields(self))
        return {name: value for name, value, default in pairs if value != default}

    def to_config(self) -> dict[str, Any]:
        """Return the keywords that differ from their defaults, as plain data."""
        config = self.non_defaults()
        for name in PATTERNS & config.keys():
            config[name] = [_to_config(p) for p in as_patterns(config[name], name)]
        return config


def patterns_from_config(saved: Iterable[Any] | None) -> list[Pattern] | None:
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
