"""A progress bar on one line of the terminal; without a terminal there is none.

It is the bar of rich if that is installed, and a plain one otherwise.
"""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from autoclip_core.planning.replay import Progress

from .rich_output import has_rich, track

UPDATE_SECONDS = 0.1
"""Seconds between two updates of the bar."""

WIDTH = 30
"""Width of the bar in characters."""


def make_progress_bar(label: str) -> Progress | None:
    """Return a function that wraps a loop, or None if stderr is not a terminal."""
    if sys.stderr is None or not sys.stderr.isatty():
        return None
    if has_rich():
        return lambda items: track(items, label)

    def wrap(items: Iterable[Any]) -> Iterator[Any]:
        total = len(items)  # type: ignore[arg-type]
        last_update = time.monotonic()
        for done, item in enumerate(items, start=1):
            yield item
            if time.monotonic() - last_update >= UPDATE_SECONDS:
                last_update = time.monotonic()
                show_bar(label, done / total)
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    return wrap


def show_bar(label: str, part: float) -> None:
    """Write the bar over the current line; `part` is in [0, 1]."""
    bar = "#" * round(WIDTH * part)
    line = f"\r{label:24.24} [{bar:{WIDTH}}] {100 * part:3.0f} %"
    print(line, end="", file=sys.stderr, flush=True)
