"""The exact totals of a log, and the quantiles of all its norms in bounded memory."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

OCTAVES = (-150, 130)
"""The powers of 2 between which norms are told apart; float32 needs no more."""

PER_OCTAVE = 64
"""Bins for a factor of 2: a quantile is off by at most 0.55 %."""


class Totals:
    """Sums over all steps of a log, taken as they come.

    >>> totals = Totals()
    >>> totals.counts["steps"]
    0
    """

    def __init__(self) -> None:
        self.counts = dict.fromkeys(("steps", "measured", "armed", "nonfinite"), 0)
        self.counts["skipped"] = 0
        self.sums = dict.fromkeys(("norm", "scale", "clipped", "armed_clipped"), 0.0)
        self.largest = -math.inf
        bins = (OCTAVES[1] - OCTAVES[0]) * PER_OCTAVE
        self.histogram: Array = np.zeros(bins, np.int64)

    def add(self, steps: Array) -> None:
        """Count steps, an array with the fields of `STEP`."""
        measured = steps[np.isfinite(steps["norm"])]
        armed = measured[np.isfinite(measured["threshold"])]
        norms, scales = measured["norm"], measured["scale"]
        self.counts["steps"] += len(steps)
        self.counts["measured"] += len(measured)
        self.counts["armed"] += len(armed)
        self.counts["nonfinite"] += int(np.sum(~steps["finite"]))
        self.counts["skipped"] += int(np.sum(steps["skipped"]))
        with np.errstate(over="ignore"):  # inf is the answer where the sum overflows
            self.sums["norm"] += float(norms.sum())
        self.sums["scale"] += float(scales.sum())
        self.sums["clipped"] += float(measured["clipped"].sum(dtype=np.float64))
        self.sums["armed_clipped"] += float(armed["clipped"].sum(dtype=np.float64))
        self.largest = max(self.largest, float(norms.max(initial=-math.inf)))
        np.add.at(self.histogram, bins_of(norms), 1)

    def to_plain(self) -> dict[str, Any]:
        """Return all of it as plain Python; of the histogram, the bins that count."""
        places = np.flatnonzero(self.histogram)
        return {
            "counts": self.counts,
            "sums": self.sums,
            "largest": self.largest,
            "histogram": [places.tolist(), self.histogram[places].tolist()],
        }

    def restore(self, plain: dict[str, Any]) -> None:
        """Set what `to_plain` described."""
        self.counts, self.sums = plain["counts"], plain["sums"]
        self.largest = plain["largest"]
        places, counts = plain["histogram"]
        self.histogram[:] = 0
        self.histogram[places] = counts

    def mean(self, name: str) -> float:
        """Return a sum over the measured steps as a mean; NaN of nothing."""
        measured = self.counts["measured"]
        return self.sums[name] / measured if measured else math.nan

    def quantile(self, q: float) -> float:
        """Return the q-quantile of the measured norms, from the bins."""
        if not self.counts["measured"]:
            return math.nan
        rank = q * (self.counts["measured"] - 1)
        place = int(np.searchsorted(np.cumsum(self.histogram), rank, side="right"))
        return float(centres()[place]) if place else 0.0


def bins_of(norms: Array) -> Array:
    """Return the bin of each finite norm; 0 and its like are in the first."""
    low, high = OCTAVES
    logs = np.log2(np.clip(norms, 2.0**low, 2.0 ** (high - 1)))
    bins: Array = ((logs - low) * PER_OCTAVE).astype(np.int64)
    return bins


def centres() -> Array:
    """Return the norm in the middle of each bin."""
    count = (OCTAVES[1] - OCTAVES[0]) * PER_OCTAVE
    powers: Array = 2.0 ** ((np.arange(count) + 0.5) / PER_OCTAVE + OCTAVES[0])
    return powers
