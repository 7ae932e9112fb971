"""Finds spikes and lasting changes of level in a series of norms."""

import math
from typing import NamedTuple

import numpy as np

from autoclip_core.record.step import Array

NEIGHBOURS = 101
"""The local level of a step is the median of this many steps around it."""

DEVIATIONS = 6.0
"""A spike is more than this many robust deviations above the local level."""

MIN_RATIO = 2.0
"""A spike is at least this many times the local level, even if the spread is 0."""

MIN_STEPS = 50
"""A lasting change of level has at least this many steps on either side."""

MIN_SHIFT = 3.0
"""The minimum ratio between the two levels of a shift."""

MAX_STEPS = 2**16
"""Longer series are processed in pieces, to bound the memory."""


class LevelShift(NamedTuple):
    """A lasting change of the norms' level."""

    step: int
    """The first step of the new level."""
    ratio: float
    """The median after / the median before."""


def find_spikes(norms: Array) -> Array:
    """Return the indices of spikes: norms far above the median of their neighbours.

    The logarithm of a spike is more than 6 robust deviations (1.4826 times the median
    absolute deviation) above the median of the 101 steps around it. A spike is also at
    least twice that median. A norm that is 0 or not finite is no spike.

    >>> norms = np.ones(200)
    >>> norms[[50, 120]] = 9.0
    >>> find_spikes(norms).tolist()
    [50, 120]
    """
    positive = np.flatnonzero(np.isfinite(norms) & (norms > 0))
    if len(positive) < 3:
        return np.empty(0, np.intp)
    logs = np.log(norms[positive].astype(np.float64))
    level, spread = measure_local_level(logs)
    above = logs - level
    is_spike = (above > DEVIATIONS * spread) & (above >= math.log(MIN_RATIO))
    return positive[is_spike]


def measure_local_level(logs: Array) -> tuple[Array, Array]:
    """Return the median around each entry, and the robust deviation from it."""
    half = min(NEIGHBOURS, len(logs) - 1) // 2
    padded = np.pad(logs, half, mode="reflect") if half else logs
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1)
    level, spread = np.empty(len(logs)), np.empty(len(logs))
    for start in range(0, len(logs), MAX_STEPS):
        part = windows[start : start + MAX_STEPS]
        median = np.median(part, axis=1)
        level[start : start + len(part)] = median
        deviation = np.median(abs(part - median[:, None]), axis=1)
        spread[start : start + len(part)] = 1.4826 * deviation
    return level, spread


def find_shift(norms: Array) -> LevelShift | None:
    """Return the largest lasting change of level by a ratio of 3 or more, or None.

    At its step the medians of the 50 steps before and after differ most.

    >>> find_shift(np.repeat([1.0, 10.0], 100))
    LevelShift(step=100, ratio=10.0)
    >>> find_shift(np.ones(200)) is None
    True
    """
    positive = np.flatnonzero(np.isfinite(norms) & (norms > 0))
    if len(positive) < 2 * MIN_STEPS:
        return None
    logs = np.log(norms[positive].astype(np.float64))
    windows = np.lib.stride_tricks.sliding_window_view(logs, MIN_STEPS)
    medians = np.concatenate(
        [
            np.median(windows[start : start + MAX_STEPS], axis=1)
            for start in range(0, len(windows), MAX_STEPS)
        ]
    )
    change = medians[MIN_STEPS:] - medians[:-MIN_STEPS]
    largest = abs(change).max()
    if largest < math.log(MIN_SHIFT) - 1e-9:
        return None
    # Near a sharp edge several steps have the largest change; the middle one is it.
    candidates = np.flatnonzero(abs(change) >= largest - 1e-9)
    middle = int(candidates[len(candidates) // 2])
    step = int(positive[middle + MIN_STEPS])
    return LevelShift(step, round(math.exp(change[middle]), 6))
