"""The keywords that all clippers share, and the keys of a group dict."""

from collections.abc import Iterable
from typing import Any, TypedDict

from autoclip_core.clipper.patterns import Pattern


class Common(TypedDict, total=False):
    """The keywords of every clipper. `Clipper` documents them."""

    scope: str | None
    global_clipping: bool | None
    nonfinite: str
    min_threshold: float | None
    max_threshold: float | None
    exclude: Pattern | Iterable[Pattern] | None
    dry_run: bool
    max_consecutive_skips: int | None
    process_group: Any


class CommonAndWarmup(Common, total=False):
    """The keywords of every clipper whose policy has no warm-up fields."""

    warmup_steps: int
    warmup_threshold: float | None


def check_keys(overrides: dict[str, Any], allowed: Iterable[str]) -> None:
    """Refuse unknown keys of a group dict."""
    allowed = sorted(allowed)
    for key in overrides:
        if key not in allowed:
            raise ValueError(
                f"a group may have the keys {', '.join(['params', *allowed])}, got "
                f"{key!r}; an optimizer's own settings have no place here"
            )
