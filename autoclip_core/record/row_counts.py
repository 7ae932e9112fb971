"""How often each row is clipped in each interval of the run, in bounded memory."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from autoclip_core.checks import check_count, format_error

from .step import Array

INTERVALS = 128
"""The maximum number of intervals; their length doubles as the run goes on."""


class RowCounts:
    """Counts how often each row was observed and clipped, in up to 128 intervals.

    >>> counts = RowCounts(["weight", "bias"])
    >>> counts.add(np.array([1.0, 0.0]), np.array([True, True]))
    >>> counts.rates().tolist(), counts.names
    ([1.0, 0.0], ['weight', 'bias'])
    """

    def __init__(self, names: Sequence[str] = ()) -> None:
        self.names = [str(name) for name in names]
        self.steps = 0
        self.width = 1  # recorded steps per interval
        self.clipped = np.zeros((INTERVALS, len(self.names)), np.int32)
        self.observed = np.zeros((INTERVALS, len(self.names)), np.int32)

    def add(self, clipped: Array, observed: Array) -> None:
        """Count one step of every row; a new row counts as not observed before.

        Args:
          clipped: above 0 for each row that was clipped, shape (rows,).
          observed: whether each row had a gradient.
        """
        rows = len(clipped)
        if rows > len(self.names):
            self._grow(rows)
        if self.steps == INTERVALS * self.width:
            self._merge_pairs()
        interval = self.steps // self.width
        self.clipped[interval, :rows] += clipped > 0
        self.observed[interval, :rows] += observed
        self.steps += 1

    def add_named(self, names: Sequence[str], clipped: Array, observed: Array) -> None:
        """Count one step of the rows with these names; new names become new rows."""
        known, first = set(self.names), len(self.names)
        if new := [name for name in names if name not in known]:
            self._grow(first + len(new))
            self.names[first:] = new
        rows = {name: row for row, name in enumerate(self.names)}
        places = [rows[name] for name in names]
        columns = np.zeros((2, len(rows)))
        columns[:, places] = clipped, observed
        self.add(columns[0], columns[1] > 0)

    def rates(self) -> Array:
        """Return each row's clip rate over the run; NaN if it was never observed."""
        return compute_rates(self.clipped.sum(axis=0), self.observed.sum(axis=0))

    def rates_over_time(self) -> Array:
        """Return each row's clip rate in each interval, shape (rows, intervals)."""
        used = -(-self.steps // self.width)
        return compute_rates(self.clipped[:used], self.observed[:used]).T

    def clips(self) -> Array:
        """Return in how many steps each row was clipped."""
        counts: Array = self.clipped.sum(axis=0)
        return counts

    def to_dict(self) -> dict[str, Any]:
        """Return the counts as plain Python."""
        used = -(-self.steps // self.width)
        return {
            "names": self.names,
            "steps": self.steps,
            "width": self.width,
            "clipped": self.clipped[:used].tolist(),
            "observed": self.observed[:used].tolist(),
        }

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "RowCounts":
        """Return the counts that `to_dict` returned."""
        counts = cls(list(saved["names"]))
        counts.width = check_count("width", saved["width"], 1)
        counts.steps = check_count("steps", saved["steps"], 0)
        used = -(-counts.steps // counts.width)
        rule = f"at most {INTERVALS} times the width"
        if used > INTERVALS:
            raise ValueError(format_error("steps", rule, counts.steps, ""))
        for name in ("clipped", "observed"):
            table = np.array(saved[name], np.int32).reshape(used, len(counts.names))
            if (table < 0).any():
                raise ValueError(format_error(name, ">= 0", int(table.min()), ""))
            getattr(counts, name)[:used] = table
        return counts

    def _grow(self, rows: int) -> None:
        more = rows - len(self.names)
        self.names += [f"row {index}" for index in range(len(self.names), rows)]
        self.clipped = np.pad(self.clipped, [(0, 0), (0, more)])
        self.observed = np.pad(self.observed, [(0, 0), (0, more)])

    def _merge_pairs(self) -> None:
        for counts in (self.clipped, self.observed):
            counts[: INTERVALS // 2] = counts[::2] + counts[1::2]
            counts[INTERVALS // 2 :] = 0
        self.width *= 2


def compute_rates(part: Array, total: Array) -> Array:
    """Return part / total; NaN where the total is 0."""
    rates: Array = np.where(total > 0, part / np.maximum(total, 1), np.nan)
    return rates
