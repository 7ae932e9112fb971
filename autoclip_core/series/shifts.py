"""Finds lasting changes of level, which are no proof of damage."""

import math

import numpy as np

from .damage import AFTER, LAST, NEIGHBOUR, find_start_of_end
from .levels import Levels
from .spikes import MIN_SHIFT, MIN_STEPS, find_shift_in_logs

LASTING = math.log(2)
"""The least rise of the level of all later steps."""

FALL = 5.0
"""A fall of the level to a fifth may be of units that died."""

BLOCK, BEFORE = 20, 5
"""A rise at the end is the median of 20 norms over that of 5 such blocks before."""

ABOVE = math.log(1.5)
"""The median is so far above each block in the later half of the series."""


def find_level_change(levels: Levels) -> tuple[int, float] | None:
    """Return the place and the ratio of a change of level, or None."""
    return (
        find_lasting_shift(levels)
        or find_change_after_spike(levels)
        or find_rise_at_end(levels)
    )


def find_change_after_spike(levels: Levels) -> tuple[int, float] | None:
    """Return place and ratio of a change of level after a spike, or None.

    The spike is 100 times the level. The norms after it are twice the level, or half,
    and the median of the rest is half as far away.
    """
    is_spike = levels.excess >= np.maximum(NEIGHBOUR, 8 * levels.spread)
    for place in np.flatnonzero(is_spike)[:1000].tolist():
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
