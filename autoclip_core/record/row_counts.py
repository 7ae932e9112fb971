"""Which row is clipped when: counts per row and stretch of the run, bounded."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

STRETCHES = 128
"""The most stretches that a run is cut into; they double in length as it goes on."""


class RowCounts:
    """How often each row was observed and clipped, in up to 128 stretches of the run.

    >>> counts = RowCounts(["weight", "bias"])
    >>> counts.add(np.array([1.0, 0.0]), np.array([True, True]))
    >>> counts.rates().tolist(), counts.names
    ([1.0, 0.0], ['weight', 'bias'])
    """

    def __init__(self, names: Sequence[str] = ()) -> None:
        self.names = [str(name) for name in names]
        self.steps = 0
        self.width = 1  # recorded steps in a stretch
        self.clipped = np.zeros((STRETCHES, len(self.names)), np.int32)
        self.observed = np.zeros((STRETCHES, len(self.names)), np.int32)

    def add(self, clipped: Array, observed: Array) -> None:
        """Count one step of every row; rows that join later were not observed before.

        Args:
          clipped: whether each row was clipped, shape (rows,).
          observed: whether it had a gradient.
        """
        rows = len(clipped)
        if rows > len(self.names):
            self._grow(rows)
        if self.steps == STRETCHES * self.width:
            self._halve()
        stretch = self.steps // self.width
        self.clipped[stretch, :rows] += clipped > 0
        self.observed[stretch, :rows] += observed
        self.steps += 1

    def rates(self) -> Array:
        """Return the clip rate of each row over the run; NaN where never observed."""
        return share(self.clipped.sum(axis=0), self.observed.sum(axis=0))

    def map(self) -> Array:
        """Return the clip rate of each row in each stretch, (rows, stretches)."""
        used = -(-self.steps // self.width)
        return share(self.clipped[:used], self.observed[:used]).T

    def clips(self) -> Array:
        """Return how often each row was clipped."""
        counts: Array = self.clipped.sum(axis=0)
        return counts

    def to_plain(self) -> dict[str, Any]:
        """Return all of it as plain Python."""
        used = -(-self.steps // self.width)
        return {
            "names": self.names,
            "steps": self.steps,
            "width": self.width,
            "clipped": self.clipped[:used].tolist(),
            "observed": self.observed[:used].tolist(),
        }

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> "RowCounts":
        """Return what `to_plain` described."""
        counts = cls(plain["names"])
        counts.steps, counts.width = plain["steps"], plain["width"]
        used = len(plain["clipped"])
        if used:
            counts.clipped[:used] = plain["clipped"]
            counts.observed[:used] = plain["observed"]
        return counts

    def _grow(self, rows: int) -> None:
        more = rows - len(self.names)
        self.names += [f"row {place}" for place in range(len(self.names), rows)]
        self.clipped = np.pad(self.clipped, [(0, 0), (0, more)])
        self.observed = np.pad(self.observed, [(0, 0), (0, more)])

    def _halve(self) -> None:
        """Make one stretch of every two."""
        for counts in (self.clipped, self.observed):
            counts[: STRETCHES // 2] = counts[::2] + counts[1::2]
            counts[STRETCHES // 2 :] = 0
        self.width *= 2


def share(part: Array, of: Array) -> Array:
    """Return part / of; NaN where there is nothing."""
    rates: Array = np.where(of > 0, part / np.maximum(of, 1), np.nan)
    return rates
