"""Finds lasting changes of level, which are no proof of damage."""

import math
from typing import NamedTuple

import numpy as np

from autoclip_core.record.step import Array

from .damage import AFTER, LAST, NEIGHBOUR, find_start_of_end
from .levels import Levels
from .spikes import MAX_STEPS, bound_medians

MIN_STEPS = 50
"""A lasting change of level has at least this many steps on either side."""

MIN_SHIFT = 3.0
"""The minimum ratio between the two levels of a shift."""

LASTING = math.log(2)
"""The least rise of the level of all later steps."""

FALL = 5.0
"""A fall of the level to a fifth may be of units that died."""

BLOCK, BEFORE = 20, 5
"""A rise at the end is the median of 20 norms over that of 5 such blocks before."""

ABOVE = math.log(1.5)
"""The median is so far above each block in the later half of the series."""


class LevelShift(NamedTuple):
    """A lasting change of the norms' level."""

    step: int
    """The first step of the new level."""
    ratio: float
    """The median after / the median before."""


def find_level_change(levels: Levels) -> tuple[int, float] | None:
    """Return the place of a change of level, and the median since / before, or None."""
    change = (
        find_lasting_shift(levels)
        or find_change_after_spike(levels)
        or find_rise_at_end(levels)
    )
    if change is None:
        return None
    before, after = np.split(levels.logs, [np.searchsorted(levels.places, change[0])])
    ratio = np.exp(np.median(after) - np.median(before))
    return change[0], float(f"{ratio:.7g}")


def find_change_after_spike(levels: Levels) -> tuple[int, float] | None:
    """Return place and ratio of a change of level after a spike, or None.

    The spike is 100 times the level. The norms after it are twice the level, or half,
    and the median of the rest is half as far away.
    """
    is_spike = levels.excess >= np.maximum(NEIGHBOUR, 8 * levels.spread)
    for place in (LAST + np.flatnonzero(is_spike[LAST:]))[:1000].tolist():
        after = levels.logs[place + LAST // 2 :][:AFTER]
        change = np.median(after) - levels.level[place] if len(after) == AFTER else 0.0
        rest = np.median(levels.logs[place:]) - levels.level[place]
        is_lasting = rest * np.sign(change) >= LASTING / 2
        if is_lasting and abs(change) >= max(LASTING, 2 * levels.spread[place]):
            return int(levels.places[place]), float(np.exp(change))
    return None


def find_lasting_shift(levels: Levels) -> tuple[int, float] | None:
    """Return place and ratio of a lasting change of level, or None.

    After a rise, 50 steps are 3 times those before, and all later steps twice. A fall
    is to a fifth, and to half. Falls in the first 100 steps are usual.
    """
    shift = find_shift_in_logs(levels.logs)
    if shift is None:
        return None
    logs = levels.logs
    sign = 1.0 if shift.ratio >= 1 else -1.0
    is_usual = shift.ratio > 1 / FALL or shift.step < 2 * MIN_STEPS
    if sign < 0 and is_usual:
        return None
    after = np.median(logs[shift.step :])
    for start in (0, shift.step - MIN_STEPS):  # a dip before the step is no shift
        if sign * (after - np.median(logs[start : shift.step])) < LASTING:
            return None
    return int(levels.places[shift.step]), shift.ratio


def find_rise_at_end(levels: Levels) -> tuple[int, float] | None:
    """Return place and ratio of a rise that is too late for a lasting shift, or None.

    The median of the last 20 norms is 3 times that of the 100 before, and 1.5 times
    that of each 20 in the later half of the series. A healthy series seldom strays so.
    """
    logs = levels.logs
    count = len(logs) // BLOCK
    if count < BEFORE:
        return None
    medians = np.median(logs[-count * BLOCK :].reshape(count, BLOCK), axis=1)
    usual = np.median(medians[-1 - BEFORE : -1])
    rise = float(medians[-1] - usual)
    above = medians[-1] - medians[count // 2 : -1].max()
    if rise < math.log(MIN_SHIFT) or above < ABOVE:
        return None
    start = find_start_of_end(logs, usual + rise / 2)
    return int(levels.places[start]), round(math.exp(rise), 6)


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
