"""Finds the step from which a series of norms shows lasting damage of the weights."""

import math

import numpy as np

from autoclip_core.record.step import Array

from .levels import Levels

DIVERGED = math.log(100)
"""A run diverged if its last norms are more than 100 times the usual."""

EXPLODED, NEIGHBOUR = math.log(1000), math.log(100)
"""An explosion: 1000 times the level, next to 100 times the level. A bad batch is
alone, unless it damages the weights."""

ALONE = math.log(50)
"""A bad batch that is alone has 50 times the norms of both neighbours."""

WRECKED = math.log(30)
"""Norms that stay 30 times above the first ones show damage in the first steps."""

FAR = math.log(1e6)
"""Small initial weights cause no rise to a million times the first norm."""

HIGH = math.log(10)
"""An explosion begins and ends below ten times the level."""

RAISED = math.log(3)
"""An end that diverged begins where 90 % of the norms are above three times."""

CALM = 0.3
"""After small initial weights ln(norm) changes by less from step to step."""

LAST = 10
"""The norms at the end whose median counts."""

LATE = 8
"""The norms at the end that an explosion raises if it begins late."""

AFTER = 30
"""The steps after damage that are compared with those before."""

FIRST_STEPS = 20
"""Damage before this step is found by what follows it."""

ERRATIC, CALMER = 1.5, 4.0
"""A start is erratic if a quarter of the first steps change ln(norm) by more, and this
many times as much as later steps do."""


def find_damage(levels: Levels) -> int | None:
    """Return the place in the series where lasting damage begins, or None."""
    starts = [
        find_explosion(levels),
        find_high_end(levels.logs),
        find_early_damage(levels.logs),
        0 if is_start_erratic(levels.logs, ERRATIC, CALMER) else None,
    ]
    places = [start for start in starts if start is not None]
    return int(levels.places[min(places)]) if places else None


def find_explosion(levels: Levels) -> int | None:
    """Return the start of the first explosion, or None.

    After it, norms jump or fall at once. Bad batches in a row are none.
    """
    excess = levels.excess
    is_near = excess >= np.maximum(NEIGHBOUR, 8 * levels.spread)
    has_neighbour = np.zeros(len(excess), np.bool_)
    has_neighbour[1:] = is_near[:-1]
    has_neighbour[:-1] |= is_near[1:]
    is_hot = (excess >= np.maximum(EXPLODED, 10 * levels.spread)) & has_neighbour
    for hot in np.flatnonzero(is_hot)[:1000].tolist():
        normal = np.flatnonzero(excess[:hot] < HIGH)
        start = int(normal[-1]) + 1 if normal.size else 0
        place = levels.logs, hot, levels.level[hot]
        if not stays_smooth(*place) and not are_bad_batches(*place):
            return start
    return None


def stays_smooth(logs: Array, start: int, level: float) -> bool:
    """Return whether norms stay high after an explosion, without jumps.

    Then the weights may recover, or the data or the loss are others. If units died, the
    norms come down at once. If a run is chaotic, they jump.
    """
    excess = logs[start:] - level
    if len(excess) < 2 * AFTER:
        return False
    before, after = measure_jump(logs[:start]), measure_jump(excess[: 2 * AFTER])
    is_high = np.median(excess[LAST : 2 * LAST]) >= WRECKED
    return bool(is_high and after < max(0.5, 2 * before))


def are_bad_batches(logs: Array, start: int, level: float) -> bool:
    """Return whether an explosion is of bad batches that follow each other.

    The run had such a batch before, alone: a norm 50 times both neighbours. After ten
    steps the level is as before, within a factor of two.
    """
    before, after = logs[: max(start - 1, 0)], logs[start + LAST :][:AFTER]
    if len(before) < LAST or len(after) < AFTER:
        return False
    above = before[1:-1] - np.maximum(before[:-2], before[2:])
    is_as_before = abs(np.median(after) - level) < math.log(2)
    return bool(is_as_before and (above > ALONE).any())


def measure_jump(logs: Array) -> float:
    """Return the median change of ln(norm) from step to step; 0 of a single norm."""
    return float(np.median(abs(np.diff(logs)))) if len(logs) > 1 else 0.0


def find_high_end(logs: Array) -> int | None:
    """Return the start of an end that is 100 times the usual norm, or None.

    Of an explosion that begins late, the last two norms are, after six above 3 times.
    """
    if len(logs) < 2 * AFTER:
        return None
    usual = np.median(logs[: len(logs) // 2])
    is_late = logs[-LATE:].min() > usual + RAISED
    end = logs[-2:].min() if is_late else np.median(logs[-LAST:])
    if end - usual <= DIVERGED:
        return None
    start = find_start_of_end(logs, usual + RAISED)
    return None if is_recovering(logs[start:]) else start


def is_recovering(logs: Array) -> bool:
    """Return whether the last norms are a third of the first, or less."""
    return bool(np.median(logs[-LAST:]) < np.median(logs[:AFTER]) - HIGH / 2)


def find_start_of_end(logs: Array, least: float) -> int:
    """Return the first place from which 90 % are above a limit.

    If the last ones are below it, take the place from which most are above.
    """
    is_high = logs > least
    shares = np.cumsum(is_high[::-1])[::-1] / np.arange(len(logs), 0, -1)
    enough = min(0.9, shares[is_high].max())
    return int(np.flatnonzero(is_high & (shares >= enough))[0])


def find_early_damage(logs: Array) -> int | None:
    """Return the step of the start after which norms stay far above the first, or None.

    They jump to 30 times the level, from below three times, and stay there for 30
    steps. A slower rise is of small initial weights, unless it is a million times. So
    is a jump after the first norm, if the next norms are calm.
    """
    for place in range(1, min(FIRST_STEPS, len(logs) - LAST)):
        level = np.median(logs[:place])
        after = np.median(logs[place : place + AFTER])
        is_jump = logs[place - 1] - level < RAISED
        if is_jump and min(after, logs[place]) - level > WRECKED:
            is_calm = place == 1 and measure_jump(logs[1:AFTER]) < CALM
            return None if is_calm else place
    later = logs[AFTER : 2 * AFTER], logs[-AFTER:]
    rises = [np.median(part) - logs[0] for part in later if part.size >= LAST]
    return 1 if len(rises) == 2 and min(rises) > FAR else None


def is_start_erratic(logs: Array, least: float, calmer: float) -> bool:
    """Return whether the first 30 norms jump, and the later ones do not."""
    jumps = abs(np.diff(logs))
    if len(jumps) < 3 * AFTER:
        return False
    first, later = np.quantile(jumps[:AFTER], 0.75), np.quantile(jumps[AFTER:], 0.75)
    return bool(first >= max(least, calmer * later))
