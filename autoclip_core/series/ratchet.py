"""Finds a threshold that fell although the norms did not."""

from typing import NamedTuple

import numpy as np

from autoclip_core.record.statistics import mean, median
from autoclip_core.record.step import Array

MIN_STEPS = 100
"""Fewer steps in a third of a run support no comparison."""


class Ratchet(NamedTuple):
    """Medians and clip rates of the first and the last third of a run."""

    thresholds: tuple[float, float]
    norms: tuple[float, float]
    clip_rates: tuple[float, float]


def find_ratchet(steps: Array) -> Ratchet | None:
    """Return the change from the first third to the last, if it is a ratchet.

    The median threshold fell by more than 30 %, the median norm by less than 10 %, and
    the clip rate rose by more than 10 %. A policy that records norms before clipping
    cannot do that: if norms fall, the threshold must fall too.
    """
    armed = steps[np.isfinite(steps["norm"]) & np.isfinite(steps["threshold"])]
    first, last = find_thirds(armed)
    if min(len(first), len(last)) < MIN_STEPS:
        return None
    before, after = median(first["threshold"]), median(last["threshold"])
    norms = median(first["norm"]), median(last["norm"])
    low, high = (mean(part["clipped"]) for part in (first, last))
    if not (after < 0.7 * before and high > low + 0.1 and norms[1] > 0.9 * norms[0]):
        return None
    return Ratchet((before, after), norms, (low, high))


def find_thirds(steps: Array) -> tuple[Array, Array]:
    """Return the steps of the first and of the last third of a run.

    They are thirds of the run, not of the array: most stored steps are recent.
    """
    if not len(steps):
        return steps, steps
    start, end = int(steps["step"][0]), int(steps["step"][-1]) + 1
    third = (end - start) / 3
    numbers = steps["step"]
    return steps[numbers < start + third], steps[numbers >= end - third]
