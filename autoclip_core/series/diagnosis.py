"""Diagnoses a run from its gradient norms: is it healthy, and which part of it is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from autoclip_core.record.step import Array

from .spikes import find_spikes

MIN_STEPS = 50
"""Fewer finite norms do not support a verdict."""

DIVERGED = 30.0
"""A run diverged if its last norms are more than this many times the usual."""


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What a series of norms shows of its run; `print` it."""

    verdict: str
    """"healthy", "spikes", "diverged", "non-finite", "never healthy", "clipped" (the
    log holds norms after clipping) or "too short"."""
    sentence: str
    """The verdict with its steps and numbers, in one sentence."""
    healthy: Array
    """Whether each norm belongs to the healthy part, shape (steps,). Such norms are
    finite."""
    step: int | None
    """The step at which the damage begins: of "diverged", "non-finite" and "never
    healthy". Otherwise None."""
    spikes: tuple[int, ...]
    """The steps of the spikes in the healthy part of the run."""

    def __str__(self) -> str:
        """Return the sentence."""
        return self.sentence


def diagnose(
    norms: Array,
    *,
    steps: Sequence[int] | Array | None = None,
    thresholds: Array | None = None,
) -> Diagnosis:
    """Return the diagnosis of a run, from its gradient norms alone.

    Args:
      norms: norms before clipping, in the order of the steps, shape (n,), >= 0. NaN and
        infinity are non-finite steps; empty cells must be left out.
      steps: the step of each norm, for the sentence; None counts from 0.
      thresholds: the threshold of each norm, if the log has it; norms that never exceed
        it are norms after clipping.

    Returns:
      A `Diagnosis`.

    >>> diagnosis = diagnose(np.repeat([1.0, 1e6, np.nan], [90, 20, 5]))
    >>> diagnosis.verdict, diagnosis.step, int(diagnosis.healthy.sum())
    ('diverged', 90, 90)
    """
    names = np.arange(len(norms)) if steps is None else np.asarray(steps)
    finite = np.isfinite(norms)
    places = np.flatnonzero(finite)
    tail = int(places[-1]) + 1 if places.size else 0
    end = find_explosion(norms[places])
    if end is not None:
        start = int(places[end])
        return judge("diverged", names, finite & (np.arange(len(norms)) < start), start)
    if tail < len(norms):
        return judge("non-finite", names, finite, tail)
    if len(places) < MIN_STEPS:
        return judge("too short", names, finite)
    spikes = find_spikes(norms)
    healthy = finite.copy()
    healthy[spikes] = False
    return judge("spikes" if spikes.size else "healthy", names, healthy, None, spikes)


def judge(
    verdict: str, names: Any, healthy: Array, start: int | None = None, spikes: Any = ()
) -> Diagnosis:
    """Return a diagnosis with its sentence."""
    step = None if start is None else int(names[start])
    at = "" if step is None else f" at step {step}"
    return Diagnosis(
        verdict,
        f"Verdict: {verdict}{at}.",
        healthy,
        step,
        tuple(int(names[place]) for place in spikes),
    )


def find_explosion(norms: Array) -> int | None:
    """Return the first norm of an explosion that lasts, or None."""
    if len(norms) < MIN_STEPS:
        return None
    usual = float(np.median(norms[: len(norms) // 2] / 2)) * 2
    if not 0 < usual * DIVERGED < np.median(norms[-10:] / 2) * 2:
        return None
    return int(np.flatnonzero(norms <= 10 * usual)[-1]) + 1
