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


def find_spikes(norms: Array, ratio: float | None = None) -> Array:
    """Return the indices of spikes: norms far above the median of their neighbours.

    The logarithm of a spike is more than 6 robust deviations (1.4826 times the median
    absolute deviation) above the median of the 101 steps around it. A spike is also at
    least twice that median, or `ratio` times. A norm that is 0 or not finite is no
    spike.

    >>> norms = np.ones(200)
    >>> norms[[50, 120]] = 9.0
    >>> find_spikes(norms).tolist()
    [50, 120]
    """
    positive = np.flatnonzero(np.isfinite(norms) & (norms > 0))
    logs = np.log(norms[positive].astype(np.float64))
    return positive[find_spikes_in_logs(logs, MIN_RATIO if ratio is None else ratio)]


def find_spikes_in_logs(logs: Array, ratio: float) -> Array:
    """Return the indices of spikes in the logarithms of norms above 0."""
    if len(logs) < 3:
        return np.empty(0, np.intp)
    least = math.log(ratio)
    places = find_high_places(logs, least)
    level, spread = measure_local_level(logs, places)
    above = logs[places] - level
    return places[(above > DEVIATIONS * spread) & (above >= least)]


def find_high_places(logs: Array, least: float) -> Array:
    """Return the places that may be this far above their local level."""
    half = NEIGHBOURS // 2
    if len(logs) < 4 * half:
        return np.arange(len(logs))
    padded = np.pad(logs, half, mode="reflect")
    lowest, _ = bound_medians(padded, NEIGHBOURS, half)
    level = np.repeat(lowest, half)[: len(logs)]
    return np.flatnonzero(logs - level >= least - 1e-9)


def bound_medians(values: Array, window: int, block: int) -> tuple[Array, Array]:
    """Return bounds of the medians of all windows, for each block of their starts.

    All windows of a block lie in `window + block` values. Their medians are between two
    ranks of these values, which costs less than a median for each window.
    """
    size, count = window + block, len(values) - window + 1
    starts = np.minimum(np.arange(0, count, block), len(values) - size)
    windows = np.lib.stride_tricks.sliding_window_view(values, size)
    ranks = (window - 1) // 2, window // 2 + block
    lowest, highest = np.empty(len(starts)), np.empty(len(starts))
    for first in range(0, len(starts), MAX_STEPS // block):
        part = slice(first, first + MAX_STEPS // block)
        sorted_part = np.partition(windows[starts[part]], ranks, axis=1)
        lowest[part], highest[part] = sorted_part[:, ranks[0]], sorted_part[:, ranks[1]]
    return lowest, highest


def measure_local_level(
    logs: Array, places: Array | None = None
) -> tuple[Array, Array]:
    """Return the median around each place, and the robust deviation from it."""
    places = np.arange(len(logs)) if places is None else places
    half = min(NEIGHBOURS, len(logs) - 1) // 2
    padded = np.pad(logs, half, mode="reflect") if half else logs
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1)
    level, spread = np.empty(len(places)), np.empty(len(places))
    for start in range(0, len(places), MAX_STEPS):
        part = windows[places[start : start + MAX_STEPS]]
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
    shift = find_shift_in_logs(np.log(norms[positive].astype(np.float64)))
    return shift and LevelShift(int(positive[shift.step]), shift.ratio)


def find_shift_in_logs(logs: Array) -> LevelShift | None:
    """Return the shift in the logarithms of norms above 0; its step is an index."""
    if len(logs) < 2 * MIN_STEPS:
        return None
    starts = find_candidate_starts(logs)
    change = measure_medians(logs, starts + MIN_STEPS) - measure_medians(logs, starts)
    largest = abs(change).max(initial=0.0)
    if largest < math.log(MIN_SHIFT) - 1e-9:
        return None
    # Near a sharp edge several steps have the largest change; the middle one is it.
    candidates = np.flatnonzero(abs(change) >= largest - 1e-9)
    middle = int(candidates[len(candidates) // 2])
    step = int(starts[middle]) + MIN_STEPS
    return LevelShift(step, float(f"{math.exp(change[middle]):.7g}"))


def find_candidate_starts(logs: Array) -> Array:
    """Return the starts of 50 steps that may end at a shift; no shift is left out."""
    block, count = MIN_STEPS // 2, len(logs) - 2 * MIN_STEPS + 1
    lowest, highest = bound_medians(logs, MIN_STEPS, block)
    rise, fall = highest[2:] - lowest[:-2], highest[:-2] - lowest[2:]
    may_shift = np.maximum(rise, fall) >= math.log(MIN_SHIFT) - 1e-9
    return np.flatnonzero(np.repeat(may_shift, block)[:count])


def measure_medians(logs: Array, starts: Array) -> Array:
    """Return the median of the 50 values from each start on."""
    windows = np.lib.stride_tricks.sliding_window_view(logs, MIN_STEPS)
    pieces = [
        np.median(windows[starts[first : first + MAX_STEPS]], axis=1)
        for first in range(0, len(starts), MAX_STEPS)
    ]
    return np.concatenate([np.empty(0), *pieces])
