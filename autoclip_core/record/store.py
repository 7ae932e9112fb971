"""The steps of a log in bounded memory: all recent steps, two per interval before.

Older steps are thinned to intervals of equal length. Each interval keeps its first step
(an even sample) and the step with its highest norm, so no spike is lost; a non-finite
norm counts as the highest. When there are too many intervals, neighbours are merged.
The totals are counted as the steps arrive and stay exact.
"""

from typing import Any

import numpy as np

from autoclip_core.checks import check_count, format_error

from .step import Array, Step
from .totals import RunTotals

RECENT = 2**17
"""The last steps, which are all stored."""

BLOCK = 2**16
"""Steps that are thinned at a time."""

INTERVALS = 2**15
"""The maximum number of intervals of older steps."""

PENDING = 1024
"""Steps buffered as Python numbers; writing each one into an array costs more."""

STEP = np.dtype(
    {
        "names": ["step", *Step._fields],
        "formats": ["i8", "f8", "f8", "f8", "f8", "?", "?", "?"],
    },
    align=True,
)
"""The stored fields of a step: 48 bytes."""


class Store:
    """Stores at most `RECENT + BLOCK` recent steps and two per older interval.

    >>> store = Store()
    >>> store.add(0, Step(3.0, 2.0, 2 / 3, 1.0, True, False))
    >>> store.steps()["norm"].tolist()
    [3.0]
    """

    def __init__(self) -> None:
        self.stride = 1  # steps per interval
        self.moved = 0  # steps that were thinned
        self._pending: list[tuple[Any, ...]] = []
        self._recent = np.empty(PENDING, STEP)
        self._count = 0
        self.totals = RunTotals()
        self._first = self._highest = np.empty(0, STEP)

    def add(self, number: int, step: Step) -> None:
        """Add one step with its number."""
        self._pending.append((number, *step))
        if len(self._pending) == PENDING:
            self.flush()

    def extend(self, steps: Array) -> None:
        """Add many steps, as an array of `STEP`."""
        self.flush()
        for start in range(0, len(steps), PENDING):
            self._append(steps[start : start + PENDING])

    def flush(self) -> None:
        """Write the buffered steps into the arrays."""
        if self._pending:
            self._append(np.array(self._pending, STEP))
            self._pending.clear()

    def steps(self) -> Array:
        """Return the first step of each interval, then every recent step."""
        self.flush()
        recent = self._recent[: self._count]
        return np.concatenate([self._first, recent]) if self.moved else recent

    def recent(self) -> Array:
        """Return the recent steps, which are complete."""
        self.flush()
        return self._recent[: self._count]

    def highest(self) -> Array:
        """Return the step with the highest norm of each interval."""
        self.flush()
        return self._highest

    def refill(self, steps: Array, stride: int, moved: int, highest: Array) -> None:
        """Restore a thinned store; the numbers must not contradict each other."""
        intervals = check_count("moved", moved, 0) // check_count("stride", stride, 1)
        if len(highest) != intervals or len(steps) < intervals:
            rule = f"one step per interval; there are {intervals} intervals"
            raise ValueError(format_error("highest", rule, len(highest), ""))
        self.extend(steps[intervals:])
        self._first, self._highest = steps[:intervals].copy(), highest
        self.stride, self.moved = stride, moved

    @property
    def last(self) -> int:
        """The number of the latest step; -1 if there is none."""
        if self._pending:
            return int(self._pending[-1][0])
        return int(self._recent["step"][self._count - 1]) if self._count else -1

    @property
    def is_thinned(self) -> bool:
        """Whether some steps are no longer stored."""
        return self.stride > 1

    def _append(self, steps: Array) -> None:
        self.totals.add(steps)
        if self._count + len(steps) > RECENT + BLOCK:
            self._thin_block()
        if self._count + len(steps) > len(self._recent):
            size = min(max(2 * len(self._recent), PENDING), RECENT + BLOCK)
            grown = np.empty(size, STEP)
            grown[: self._count] = self._recent[: self._count]
            self._recent = grown
        self._recent[self._count : self._count + len(steps)] = steps
        self._count += len(steps)

    def _thin_block(self) -> None:
        """Thin the oldest block of recent steps; merge intervals until they fit."""
        while len(self._first) + BLOCK // self.stride > INTERVALS:
            self._first = self._first[::2].copy()
            self._highest = find_highest_steps(self._highest, 2)
            self.stride *= 2
        block = self._recent[:BLOCK]
        self._first = np.concatenate([self._first, block[:: self.stride]])
        self._highest = np.concatenate(
            [self._highest, find_highest_steps(block, self.stride)]
        )
        self._count -= BLOCK
        self._recent[: self._count] = self._recent[BLOCK : BLOCK + self._count].copy()
        self.moved += BLOCK


def find_highest_steps(steps: Array, width: int) -> Array:
    """Return the highest step of every `width` steps; non-finite counts as highest.

    >>> steps = np.zeros(4, STEP)
    >>> steps["norm"], steps["finite"] = [1, 5, 2, float("nan")], [1, 1, 1, 0]
    >>> find_highest_steps(steps, 2)["norm"].tolist()
    [5.0, nan]
    """
    heights = np.where(steps["finite"], np.nan_to_num(steps["norm"]), np.inf)
    groups = heights.reshape(-1, width)
    indices = np.arange(len(groups)), groups.argmax(axis=1)
    highest: Array = steps.reshape(-1, width)[indices]
    return highest
