"""How far a loop is, on one line of a terminal; nothing where there is no terminal."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from autoclip_core.planning.replay import Progress

EVERY = 0.1
"""Seconds between two updates."""

WIDTH = 30
"""Characters of the bar."""


def progress_bar(label: str) -> Progress | None:
    """Return what to wrap around a loop, or None where stderr is no terminal."""
    if not sys.stderr.isatty():
        return None

    def wrap(items: Iterable[Any]) -> Iterator[Any]:
        total = len(items)  # type: ignore[arg-type]
        shown = time.monotonic()
        for done, item in enumerate(items):
            yield item
            if time.monotonic() - shown >= EVERY:
                shown = time.monotonic()
                show(label, (done + 1) / total)
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    return wrap


def show(label: str, part: float) -> None:
    """Write the bar over the line."""
    full = "#" * round(WIDTH * part)
    line = f"\r{label:24.24} [{full:{WIDTH}}] {100 * part:3.0f} %"
    print(line, end="", file=sys.stderr, flush=True)
