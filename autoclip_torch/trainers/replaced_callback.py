"""Find the callback that a Hugging Face trainer replaces when it resumes a run."""

import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any


def find_replaced_callback(kind: type) -> Any:
    """Return the callback that is replaced by the one being made, or None.

    From a checkpoint, Transformers makes a callback with the saved arguments. It drops
    the callback that the trainer was given. No event receives both of them.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_name == "__init__":
        frame = frame.f_back
    if frame is None or frame.f_code.co_name != "_load_callback_state":
        return None
    callback = frame.f_locals.get("callback")
    return callback if isinstance(callback, kind) else None


def describe_changes(saved: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """Return the arguments that differ, with both values; empty if none does."""
    names = sorted(name for name in {*saved, *given})
    pairs = [(name, *(each.get(name) for each in (given, saved))) for name in names]
    return ", ".join(
        f"{name}={now!r} in place of {before!r}"
        for name, now, before in pairs
        if now != before
    )
