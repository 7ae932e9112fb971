"""Finds spikes in a series of norms: norms far above those around them."""

import math

import numpy as np

from autoclip_core.record.step import Array

from .damage import is_start_erratic
from .levels import Levels

SPIKE = 5.0
"""A spike is at least this many times the level around it."""

START = 50
"""The first steps, which may be erratic."""

NEIGHBOURS = 101
"""The local level of a step is the median of this many steps around it."""

DEVIATIONS = 6.0
"""A spike is more than this many robust deviations above the local level."""

MAX_STEPS = 2**16
"""Longer series are processed in pieces, to bound the memory."""


def find_spikes(levels: Levels) -> Array:
    """Return the places of the spikes of a series; none if it has fewer than 50 norms.

    A spike is five times its level, and the median of the 101 norms around it. It is
    also 6 robust deviations above. If norms leave the level for some steps, they are
    spikes from ten times the level on. In an erratic start, they are spikes from five
    times the norms that follow it.

    >>> from autoclip_core.series.levels import measure_levels
    >>> norms = np.ones(200)
    >>> norms[[50, 120]] = 9.0
    >>> find_spikes(measure_levels(norms)).tolist()
    [50, 120]
    """
    logs, excess = levels.logs, levels.excess
    if len(logs) < START:
        return np.empty(0, np.intp)
    is_spike = excess >= np.maximum(math.log(2 * SPIKE), DEVIATIONS * levels.spread)
    alone = find_local_spikes(logs)
    is_spike[alone] |= excess[alone] >= math.log(SPIKE)
    if is_start_erratic(logs, 1.0, 2.5):
        later = np.median(logs[START : 2 * START])
        is_spike[:START] |= logs[:START] >= later + math.log(SPIKE)
    return levels.places[is_spike]


def find_local_spikes(logs: Array) -> Array:
    """Return the places that are five times the median of the norms around them."""
    places = find_high_places(logs, math.log(SPIKE))
    level, spread = measure_local_level(logs, places)
    above = logs[places] - level
    return places[(above > DEVIATIONS * spread) & (above >= math.log(SPIKE))]


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
