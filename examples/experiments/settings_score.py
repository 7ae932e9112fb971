"""How far a setting is from the best constant of each cell, and how many runs it loses.

A cell is a task at one learning rate under one optimizer.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from intervals import Interval, median_interval

LOST = 0.95
"""A run is lost if it diverges, or ends above this share of its task's level."""


class Cell(NamedTuple):
    """A task at a learning rate under an optimizer."""

    task: str
    optimizer: str
    factor: float


Results = Mapping[tuple[str, Cell], Sequence[Mapping[str, Any]]]
"""The results of each seed by contender and cell."""


@dataclass(frozen=True)
class Score:
    """A contender's score over cells."""

    outcomes: Mapping[Cell, Sequence[bool]]
    """Whether each run is lost, of the seeds that at least one contender trains."""
    excesses: Mapping[Cell, float]
    """Of the mean loss over the least mean loss of the oracle; 0.02 is 2 %."""

    def lost(self, factors: Iterable[float]) -> str:
        """Return the lost runs and the runs of the cells at these rates."""
        chosen = [o for cell, o in self.outcomes.items() if cell.factor in factors]
        return f"{sum(map(sum, chosen))}/{sum(map(len, chosen))}"

    @property
    def mean(self) -> float:
        """Return the mean excess."""
        return float(np.mean(list(self.excesses.values())))

    def median(self, factors: Iterable[float]) -> Interval:
        """Return the median excess of the cells at these rates, with its interval."""
        return median_interval(
            [e for cell, e in self.excesses.items() if cell.factor in factors]
        )

    def share_within(self, limit: float) -> float:
        """Return the share of cells whose excess is at most `limit`."""
        return float(np.mean([e <= limit for e in self.excesses.values()]))


def is_lost(result: Mapping[str, Any]) -> bool:
    """Return whether the run diverged or learned next to nothing."""
    return result["loss"] is None or result["loss"] > LOST * result["level"]


def mean_loss(results: Sequence[Mapping[str, Any]]) -> float:
    """Return the mean over seeds; no loss counts more than the task's level."""
    losses = [r["level"] if r["loss"] is None else r["loss"] for r in results]
    return float(
        np.mean([min(x, r["level"]) for x, r in zip(losses, results, strict=True)])
    )


def find_trained(results: Results) -> dict[tuple[Cell, int], list[str]]:
    """Return the contenders that train, by cell and seed, where at least one does."""
    trained: dict[tuple[Cell, int], list[str]] = {}
    for (name, cell), of_cell in results.items():
        for seed, result in enumerate(of_cell):
            if not is_lost(result):
                trained.setdefault((cell, seed), []).append(name)
    return trained


def list_lost(results: Results, contender: str) -> dict[Cell, tuple[int, list[str]]]:
    """Return how many runs of each cell the contender loses, and who trains one."""
    lost: dict[Cell, tuple[int, list[str]]] = {}
    for (cell, _), names in find_trained(results).items():
        if contender not in names:
            count, others = lost.get(cell, (0, []))
            lost[cell] = count + 1, list(dict.fromkeys([*others, *names]))
    return lost


def count_as_good(results: Results, contender: str, factor: float) -> tuple[int, int]:
    """Return in how many cells at a rate a contender is as good as the best, of all.

    Its mean loss is then at most the largest loss of a seed of the best contender.
    """
    counts = []
    for cell in {cell for _, cell in results if cell.factor == factor}:
        of_cell = [r for (_, c), r in results.items() if c == cell]
        limit = max(mean_loss([r]) for r in min(of_cell, key=mean_loss))
        counts.append(mean_loss(results[contender, cell]) <= limit)
    return sum(counts), len(counts)


def score_all(
    results: Results, contenders: Iterable[str], oracle: Sequence[str]
) -> dict[str, Score]:
    """Return the score of each contender over the cells that it ran.

    The oracle takes the best of its contenders in each cell.
    """
    trains = find_trained(results)
    best = {
        cell: min(mean_loss(results[name, cell]) for name in oracle)
        for cell in {cell for _, cell in results}
    }
    scores = {}
    for contender in contenders:
        cells = {c: r for (name, c), r in results.items() if name == contender}
        outcomes = {
            cell: [
                is_lost(r) for seed, r in enumerate(of_cell) if (cell, seed) in trains
            ]
            for cell, of_cell in cells.items()
        }
        excesses = {cell: mean_loss(r) / best[cell] - 1 for cell, r in cells.items()}
        scores[contender] = Score(outcomes, excesses)
    return scores
