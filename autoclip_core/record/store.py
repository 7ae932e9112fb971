"""Where a log keeps its steps: the recent ones all, of the past two per stretch.

The past is cut into stretches of equal length. Of each its first step is kept (an even
sample) and its highest (so that no spike is lost; non-finite is the highest of all).
When the past is full, neighbouring stretches become one. So the memory is bounded, and
totals, which are counted as the steps come, stay exact.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from .step import Step
from .totals import Totals

Array = npt.NDArray[Any]

RECENT = 2**17
"""Steps that are always kept exactly."""

BLOCK = 2**16
"""Steps that move to the past at a time."""

STRETCHES = 2**15
"""The most stretches that the past is cut into."""

PENDING = 1024
"""Steps that wait as Python numbers: to write each into an array costs more."""

STEP = np.dtype(
    {
        "names": ["step", *Step._fields],
        "formats": ["i8", "f8", "f8", "f8", "f8", "?", "?"],
    },
    align=True,
)
"""What is kept of a step: 48 bytes."""


class Store:
    """Takes steps and keeps at most `RECENT + BLOCK` and two per stretch of the past.

    >>> store = Store()
    >>> store.add(0, Step(3.0, 2.0, 2 / 3, 1.0, True, False))
    >>> store.kept()["norm"].tolist()
    [3.0]
    """

    def __init__(self) -> None:
        self.stride = 1  # steps in a stretch of the past
        self.moved = 0  # steps that are past
        self._pending: list[tuple[Any, ...]] = []
        self._recent = np.empty(PENDING, STEP)
        self._count = 0
        self.totals = Totals()
        self._first = self._highest = np.empty(0, STEP)

    def add(self, number: int, step: Step) -> None:
        """Add one step under its number."""
        self._pending.append((number, *step))
        if len(self._pending) == PENDING:
            self.flush()

    def extend(self, steps: Array) -> None:
        """Add many steps, as an array of `STEP`."""
        self.flush()
        for start in range(0, len(steps), PENDING):
            self._append(steps[start : start + PENDING])

    def flush(self) -> None:
        """Write what waits into the arrays."""
        if self._pending:
            self._append(np.array(self._pending, STEP))
            self._pending.clear()

    def kept(self) -> Array:
        """Return an even sample of the past, then every recent step."""
        self.flush()
        recent = self._recent[: self._count]
        return np.concatenate([self._first, recent]) if self.moved else recent

    def recent(self) -> Array:
        """Return the steps that are kept exactly."""
        self.flush()
        return self._recent[: self._count]

    def highest(self) -> Array:
        """Return the highest step of each stretch of the past."""
        self.flush()
        return self._highest

    def refill(self, steps: Array, stride: int, moved: int, highest: Array) -> None:
        """Become the store that kept these steps, after `kept` and `highest`."""
        past = moved // stride
        self.extend(steps[past:])
        self._first, self._highest = steps[:past].copy(), highest
        self.stride, self.moved = stride, moved

    @property
    def thinned(self) -> bool:
        """Whether steps are missing."""
        return self.stride > 1

    def _append(self, steps: Array) -> None:
        self.totals.add(steps)
        if self._count + len(steps) > RECENT + BLOCK:
            self._move()
        if self._count + len(steps) > len(self._recent):
            size = min(max(2 * len(self._recent), PENDING), RECENT + BLOCK)
            grown = np.empty(size, STEP)
            grown[: self._count] = self._recent[: self._count]
            self._recent = grown
        self._recent[self._count : self._count + len(steps)] = steps
        self._count += len(steps)

    def _move(self) -> None:
        """Move the oldest block to the past, merging stretches until they fit."""
        while len(self._first) + BLOCK // self.stride > STRETCHES:
            self._first = self._first[::2].copy()
            self._highest = highest_of(self._highest, 2)
            self.stride *= 2
        block = self._recent[:BLOCK]
        self._first = np.concatenate([self._first, block[:: self.stride]])
        self._highest = np.concatenate([self._highest, highest_of(block, self.stride)])
        self._count -= BLOCK
        self._recent[: self._count] = self._recent[BLOCK : BLOCK + self._count].copy()
        self.moved += BLOCK


def highest_of(steps: Array, width: int) -> Array:
    """Return of every `width` steps the highest; a non-finite one is the highest.

    >>> steps = np.zeros(4, STEP)
    >>> steps["norm"], steps["finite"] = [1, 5, 2, float("nan")], [1, 1, 1, 0]
    >>> highest_of(steps, 2)["norm"].tolist()
    [5.0, nan]
    """
    heights = np.where(steps["finite"], np.nan_to_num(steps["norm"]), np.inf)
    groups = heights.reshape(-1, width)
    places = np.arange(len(groups)), groups.argmax(axis=1)
    highest: Array = steps.reshape(-1, width)[places]
    return highest
