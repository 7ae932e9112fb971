"""What stands out in a series of norms: spikes, and a lasting change of level."""

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

AROUND = 101
"""Steps whose median and spread tell what is usual around a step."""

DEVIATIONS = 6.0
"""Robust deviations of the logarithm above the median that make a spike."""

LEAST_RATIO = 2.0
"""A spike is at least so many times the median around it, however calm it is there."""

LEAST_STEPS = 50
"""Steps on either side that make a change of level a lasting one."""

LEAST_SHIFT = 3.0
"""The ratio between two levels that counts as a shift."""

MOST_STEPS = 2**16
"""Longer series are looked at in pieces, to bound the memory."""


class LevelShift(NamedTuple):
    """A lasting change of the norms' level."""

    step: int
    """The first step of the new level."""
    ratio: float
    """The median after / the median before."""


def find_spikes(norms: Array) -> Array:
    """Return the indices of spikes: norms far above the median of their neighbours.

    A spike is more than 6 robust deviations (1.4826 times the median absolute
    deviation, of the logarithm) above the median of the 101 steps around it, and at
    least twice that median. What is not finite or is 0 is no spike.

    >>> norms = np.ones(200)
    >>> norms[[50, 120]] = 9.0
    >>> find_spikes(norms).tolist()
    [50, 120]
    """
    known = np.flatnonzero(np.isfinite(norms) & (norms > 0))
    if len(known) < 3:
        return np.empty(0, np.intp)
    logs = np.log(norms[known].astype(np.float64))
    middle, spread = local_level(logs)
    above = logs - middle
    high = (above > DEVIATIONS * spread) & (above >= math.log(LEAST_RATIO))
    return known[high]


def local_level(logs: Array) -> tuple[Array, Array]:
    """Return the median around each entry, and the robust deviation from it."""
    half = min(AROUND, len(logs) - 1) // 2
    padded = np.pad(logs, half, mode="reflect") if half else logs
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1)
    middle, spread = np.empty(len(logs)), np.empty(len(logs))
    for start in range(0, len(logs), MOST_STEPS):
        part = windows[start : start + MOST_STEPS]
        centre = np.median(part, axis=1)
        middle[start : start + len(part)] = centre
        apart = np.median(abs(part - centre[:, None]), axis=1)
        spread[start : start + len(part)] = 1.4826 * apart
    return middle, spread


def find_shift(norms: Array) -> LevelShift | None:
    """Return the largest lasting change of level, a ratio of 3 or more, or None.

    The step is where the medians of the 50 steps before and after differ most.

    >>> find_shift(np.repeat([1.0, 10.0], 100))
    LevelShift(step=100, ratio=10.0)
    >>> find_shift(np.ones(200)) is None
    True
    """
    known = np.flatnonzero(np.isfinite(norms) & (norms > 0))
    if len(known) < 2 * LEAST_STEPS:
        return None
    logs = np.log(norms[known].astype(np.float64))
    windows = np.lib.stride_tricks.sliding_window_view(logs, LEAST_STEPS)
    medians = np.concatenate(
        [
            np.median(windows[start : start + MOST_STEPS], axis=1)
            for start in range(0, len(windows), MOST_STEPS)
        ]
    )
    change = medians[LEAST_STEPS:] - medians[:-LEAST_STEPS]
    largest = abs(change).max()
    if largest < math.log(LEAST_SHIFT) - 1e-9:
        return None
    # Around a sharp edge several places differ as much: the edge is in their middle.
    places = np.flatnonzero(abs(change) >= largest - 1e-9)
    place = int(places[len(places) // 2])
    return LevelShift(
        int(known[place + LEAST_STEPS]), round(math.exp(change[place]), 6)
    )
