"""The keywords that all clippers share, and the keys of a group dict."""

from collections.abc import Callable, Iterable
from typing import Any

from autoclip_core import Decision, Policy
from autoclip_core.clipper import settings

from .selection import Patterns

StepCallback = Callable[[Decision, list[str], int], object]
"""`on_clip` and `on_skip`: a function of a decision on the CPU, the names of its rows,
and the number of the step."""


class ClipperKeywords(settings.ClipperKeywords, total=False):
    """The keywords of every clipper, except those of its policy."""

    loss_policy: Policy | None
    max_consecutive_skips: int | None
    process_group: Any
    replicated: Patterns
    on_clip: StepCallback | None
    on_skip: StepCallback | None


class PolicyKeywords(ClipperKeywords, settings.PolicyKeywords):
    """The keywords of `Clipper` that every named clipper accepts."""


class WarmupKeywords(PolicyKeywords, settings.WarmupKeywords):
    """The same, and those of a warm-up, for a policy that has none of its own."""


def check_keys(overrides: dict[str, Any], allowed: Iterable[str]) -> None:
    """Refuse unknown keys of a group dict."""
    allowed = sorted(allowed)
    for key in overrides:
        if key not in allowed:
            raise ValueError(
                f"a group may have the keys {', '.join(['params', *allowed])}, got "
                f"{key!r}; an optimizer's own settings have no place here"
            )
