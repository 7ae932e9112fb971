"""Reads what a training script printed: norms with their steps.

A step may stand on an earlier line than its norm. A progress bar shows a norm more than
once, and so do several ranks.
"""

import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator

from .log_lines import COLOR, PAIR, find_places, read_named

BAR = re.compile(r"\b(\d+)/(\d+) \[\d")
"""The count of a progress bar, such as "3/40 [00:02<00:25"."""

RECENT_ROWS = 256
"""Number of rows among which a row of the same text is a repetition."""


def read_log_rows(
    lines: Iterable[str], column: str | None = None
) -> Iterator[dict[str, str]]:
    """Yield each name of a gradient norm with its number, and the step.

    >>> list(read_log_rows(["step 7 | loss 2.50 | norm 0.31 | lr 1e-4"]))
    [{'step': '7', 'norm': '0.31'}]
    """
    bar, repetitions = ProgressBar(), Repetitions()
    step = epoch = None
    for line in lines:
        if "\x1b" in line:
            line = COLOR.sub("", line)
        places = find_places(line)
        step = line[places.step] if places.step else step
        epoch = line[places.epoch] if places.epoch else epoch
        norms = read_named(line, column) if column else places.read_norms(line)
        if not norms:
            continue
        if step is None and (count := BAR.search(line)):
            yield from bar.add(int(count[1]), int(count[2]), norms)
            continue
        yield from bar.flush()
        if step is None:
            yield norms
            continue
        if not repetitions.has((epoch, step, *norms.values()), line[places.start :]):
            yield {"step": step, **norms}
        step = None
    yield from bar.flush()


class Repetitions:
    """Finds the lines in which several ranks print the same step."""

    def __init__(self) -> None:
        self._last: tuple[str | None, ...] = ()
        self._recent: OrderedDict[int, None] = OrderedDict()

    def has(self, row: tuple[str | None, ...], text: str) -> bool:
        """Return whether a row repeats the last one, or its text a recent one.

        A row has the epoch, the step and the norms.
        """
        key = hash((row, text))
        if row == self._last or key in self._recent:
            return True
        self._last = row
        self._recent[key] = None
        if len(self._recent) > RECENT_ROWS:
            self._recent.popitem(last=False)
        return False


class ProgressBar:
    """Yields the norms of a progress bar once for each count: the last that it shows.

    A bar is drawn again when it advances, with the norms of the step before. A bar that
    has norms at the count 0 shows those of the last step twice.
    """

    def __init__(self) -> None:
        self._count = -1
        self._norms: dict[str, str] | None = None
        self._last: dict[str, str] | None = None
        self._begins_at_0 = False

    def add(
        self, count: int, total: int, norms: dict[str, str]
    ) -> Iterator[dict[str, str]]:
        """Add a drawing of the bar; yield the norms of the count before."""
        if count != self._count:
            yield from self.flush()
            if count < self._count or self._count < 0:
                self._begins_at_0 = count == 0
            self._count = count
        is_repetition = count == total and self._begins_at_0 and norms == self._last
        self._norms = None if is_repetition else norms

    def flush(self) -> list[dict[str, str]]:
        """Return the norms of the last count, once."""
        if self._norms is None:
            return []
        self._last, self._norms = self._norms, None
        return [self._last]


def list_log_names(lines: Iterable[str], most: int = 20) -> list[str]:
    """Return names that stand before a number in a log, for an error."""
    names: dict[str, None] = {}
    for line in lines:
        for match in PAIR.finditer(COLOR.sub("", line)):
            names[match["name"]] = None
        if len(names) >= most:
            break
    return list(names)[:most]
