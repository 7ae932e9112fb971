"""The steps whose norms exceeded their thresholds most, with the rows to blame."""

import heapq
import math
from bisect import insort
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .step import Array, Step

MOST = 20
"""Number of steps that are kept."""

MOST_ROWS = 3
"""Number of rows that are named for a step."""


class LargeStep(NamedTuple):
    """A step whose norm exceeded its threshold."""

    ratio: float
    """The largest norm / threshold of a row. If a log has several rows and metrics
    without their names, norm before / norm after clipping, of all rows."""
    step: int
    """The number of the step."""
    norm: float
    """The norm of the step, of all rows."""
    rows: tuple[tuple[str, float], ...] = ()
    """The rows with the largest ratios, at most three, and their ratios; empty with a
    single row."""


class LargestSteps:
    """Keeps the steps with the largest ratios.

    >>> largest = LargestSteps()
    >>> largest.add(7, Step(6.0, 2.0, 1 / 3, 1.0, True, False))
    >>> largest.steps
    [LargeStep(ratio=3.0, step=7, norm=6.0, rows=())]
    """

    def __init__(self) -> None:
        self.steps: list[LargeStep] = []  # the largest ratio first

    def add(
        self, number: int, step: Step, rows: Mapping[str, float] | None = None
    ) -> None:
        """Add a step if its ratio, or the largest of its rows, is among the largest."""
        ratio = measure_ratio(step) if rows is None else max(rows.values(), default=0.0)
        if self.can_add(ratio):
            worst = heapq.nlargest(
                MOST_ROWS, (rows or {}).items(), key=lambda row: row[1]
            )
            named = tuple((name, value) for name, value in worst if name and value > 1)
            self._push(LargeStep(ratio, number, step.norm, named))

    def can_add(self, ratio: float) -> bool:
        """Return whether a ratio is among the largest."""
        return 1 < ratio < math.inf and (
            len(self.steps) < MOST or ratio > self.steps[-1].ratio
        )

    def add_rows(
        self, number: int, step: Step, rows: Mapping[str, Array], names: Sequence[str]
    ) -> None:
        """Add the step of a decision, whose fields and names of rows are given."""
        ratios = divide_known(rows["norm"], rows["threshold"])
        if self.can_add(float(ratios.max(initial=0.0))):
            self.add(number, step, dict(zip(names, ratios.tolist(), strict=False)))

    def _push(self, large: LargeStep) -> None:
        insort(self.steps, large, key=lambda large: (-large.ratio, large.step))
        del self.steps[MOST:]

    def to_list(self) -> list[Any]:
        """Return the steps as plain Python."""
        return [[s.step, s.ratio, s.norm, s.rows] for s in self.steps]

    @classmethod
    def from_list(cls, saved: Iterable[Any]) -> "LargestSteps":
        """Return the steps that `to_list` returned."""
        largest = cls()
        for step, ratio, norm, rows in saved:
            named = tuple((str(name), float(value)) for name, value in rows)
            largest._push(LargeStep(float(ratio), int(step), float(norm), named))
        return largest

    @classmethod
    def from_steps(cls, steps: Array, has_several_rows: bool) -> "LargestSteps":
        """Return the largest of stored steps, whose rows are not known."""
        clipped = steps[(steps["clipped"] > 0) & np.isfinite(steps["norm"])]
        above, below = clipped["norm"], clipped["threshold"]
        if has_several_rows:
            above, below = np.ones(len(clipped)), clipped["scale"]
        ratios = divide_known(above, below)
        largest = cls()
        for place in np.argsort(-ratios, kind="stable")[:MOST].tolist():
            ratio = float(ratios[place])
            if largest.can_add(ratio):
                number, norm = clipped["step"][place], clipped["norm"][place]
                largest._push(LargeStep(ratio, int(number), float(norm)))
        return largest


def divide_known(above: Array, below: Array) -> Array:
    """Return above / below; 0 where one is not finite, or the lower one is 0.

    >>> divide_known(np.array([3.0, np.nan, 1.0]), np.array([2.0, 1.0, 0.0])).tolist()
    [1.5, 0.0, 0.0]
    """
    is_known = np.isfinite(above) & np.isfinite(below) & (below > 0)
    with np.errstate(over="ignore"):
        ratios: Array = np.where(is_known, above, 0.0) / np.where(is_known, below, 1.0)
    return ratios


def measure_ratio(step: Step) -> float:
    """Return norm / threshold of a step of one row; 0 if one of them is unknown."""
    if math.isfinite(step.norm) and 0 < step.threshold < math.inf:
        return step.norm / step.threshold
    return 0.0
