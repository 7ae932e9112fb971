"""The exact totals of a log, and the quantiles of all its norms in bounded memory.

A step is measured if its norm is finite. A measured step is armed if its threshold is
finite too, so that it could be clipped. These words are keys in the saved JSON lines.
"""

import math
from typing import Any

import numpy as np

from autoclip_core.checks import check_count

from .step import Array

OCTAVES = (-150, 130)
"""The histogram covers norms from 2**-150 to 2**130; float32 needs no more."""

PER_OCTAVE = 64
"""Bins per factor of 2: the relative error of a quantile is at most 0.55 %."""


class RunTotals:
    """Counts and sums over all steps of a log, updated as the steps arrive.

    >>> totals = RunTotals()
    >>> totals.counts["steps"]
    0
    """

    def __init__(self) -> None:
        names = ("steps", "measured", "armed", "nonfinite", "skipped", "dropped")
        self.counts = dict.fromkeys(names, 0)
        self.sums = dict.fromkeys(("norm", "scale", "clipped", "armed_clipped"), 0.0)
        self.largest = -math.inf
        bins = (OCTAVES[1] - OCTAVES[0]) * PER_OCTAVE
        self.histogram: Array = np.zeros(bins, np.int64)

    def add(self, steps: Array) -> None:
        """Add an array of steps (dtype `STEP`) to the totals."""
        measured = steps[np.isfinite(steps["norm"])]
        armed = measured[np.isfinite(measured["threshold"])]
        norms, scales = measured["norm"], measured["scale"]
        self.counts["steps"] += len(steps)
        self.counts["measured"] += len(measured)
        self.counts["armed"] += len(armed)
        self.counts["nonfinite"] += int(np.sum(~steps["finite"]))
        self.counts["skipped"] += int(np.sum(steps["skipped"]))
        self.counts["dropped"] += int(np.sum(steps["dropped"]))
        with np.errstate(over="ignore"):  # a sum that overflows is inf
            self.sums["norm"] += float(norms.sum())
        self.sums["scale"] += float(scales.sum())
        self.sums["clipped"] += float(measured["clipped"].sum(dtype=np.float64))
        self.sums["armed_clipped"] += float(armed["clipped"].sum(dtype=np.float64))
        self.largest = max(self.largest, float(norms.max(initial=-math.inf)))
        np.add.at(self.histogram, find_bins(norms), 1)

    def to_dict(self) -> dict[str, Any]:
        """Return the totals as plain Python, with the bins that are not empty."""
        indices = np.flatnonzero(self.histogram)
        return {
            "counts": self.counts,
            "sums": self.sums,
            "largest": self.largest,
            "histogram": [indices.tolist(), self.histogram[indices].tolist()],
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Restore the totals that `to_dict` returned."""
        for name in self.counts:
            self.counts[name] = check_count(name, saved["counts"].get(name, 0), 0)
        for name in self.sums:
            self.sums[name] = float(saved["sums"][name])
        self.largest = float(saved["largest"])
        indices, counts = saved["histogram"]
        self.histogram[:] = 0
        self.histogram[indices] = np.array(counts, np.int64)

    def mean(self, name: str) -> float:
        """Return the mean of a sum over the measured steps; NaN if there are none."""
        measured = self.counts["measured"]
        return self.sums[name] / measured if measured else math.nan

    def quantile(self, q: float) -> float:
        """Return the q-quantile of the measured norms, computed from the histogram."""
        if not self.counts["measured"]:
            return math.nan
        rank = q * (self.counts["measured"] - 1)
        index = int(np.searchsorted(np.cumsum(self.histogram), rank, side="right"))
        return float(compute_bin_centres()[index]) if index else 0.0


def find_bins(norms: Array) -> Array:
    """Return the bin of each finite norm; 0 and tiny norms are in the first."""
    low, high = OCTAVES
    logs = np.log2(np.clip(norms, 2.0**low, 2.0 ** (high - 1)))
    indices: Array = ((logs - low) * PER_OCTAVE).astype(np.int64)
    return indices


def compute_bin_centres() -> Array:
    """Return the norm at the centre of each bin."""
    count = (OCTAVES[1] - OCTAVES[0]) * PER_OCTAVE
    powers: Array = 2.0 ** ((np.arange(count) + 0.5) / PER_OCTAVE + OCTAVES[0])
    return powers
