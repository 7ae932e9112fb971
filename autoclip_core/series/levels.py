"""The level that norms come from: the median of the block of steps before."""

from typing import NamedTuple

import numpy as np

from autoclip_core.record.step import Array

FIRST = 10
"""The first norms, whose lower quartile is the level of the first block."""


class Levels(NamedTuple):
    """The logarithms of the positive finite norms, each with the level before it."""

    places: Array
    """The index of each in the series."""
    logs: Array
    """The logarithm of the norm."""
    level: Array
    """The logarithm of the level before it."""
    spread: Array
    """The robust deviation of the logarithms from that level."""

    @property
    def excess(self) -> Array:
        """The logarithm of norm / level."""
        excess: Array = self.logs - self.level
        return excess


def measure_levels(norms: Array) -> Levels:
    """Return the levels of a series.

    A block has a twentieth of the norms, at least 10 and at most 50. The level of a
    norm is the median of the block before its block, so an explosion does not raise
    its own level.
    """
    places = np.flatnonzero(np.isfinite(norms) & (norms > 0))
    logs = np.log(norms[places].astype(np.float64))
    size = min(max(len(logs) // 20, 10), 50)
    count = len(logs) // size
    blocks = logs[: count * size].reshape(count, size)
    medians = np.median(blocks, axis=1)
    spreads = 1.4826 * np.median(abs(blocks - medians[:, None]), axis=1)
    first = np.quantile(logs[:FIRST], 0.25) if logs.size else 0.0
    first_spread = spreads[0] if count else 0.0
    level = np.repeat([first, *medians], size)[: len(logs)]
    spread = np.repeat([first_spread, *spreads], size)[: len(logs)]
    return Levels(places, logs, level, spread)
