"""Diagnoses a run from its gradient norms: is it healthy, and which part of it is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from autoclip_core.record.step import Array

from .ceiling import find_ceiling, find_ceiling_of_thresholds, has_norm_above
from .damage import DIVERGED, FIRST_STEPS, find_damage, is_recovering
from .levels import Levels, measure_levels
from .losses import find_loss_rise
from .shifts import find_level_change
from .spikes import find_spikes

MIN_STEPS = 50
"""Fewer norms above 0 do not support a verdict."""

START = 50
"""NaN and infinity in the first steps alone are no verdict."""

GAP = 5
"""A loss scaler calibrates from the start, with at most five finite norms in a row."""

WEIGHT = 9
"""The weight of a non-finite norm; that of a finite one is -1."""

NAMED = 5
"""The number of spikes whose steps the sentence names."""

LOSS = "Norms do not show the loss: compare it."
"""The end of a verdict without damage: a run whose loss rose may have such norms."""

SENTENCES = {
    "healthy": "Healthy: {count} norms show neither damage nor a spike. " + LOSS,
    "spikes": "Spikes at steps {spikes}, up to {high:.3g} times the median of the "
    "others; the norms show no damage. " + LOSS,
    "shifted": "From step {step} on, the level is {number:.3g} times the earlier one: "
    "other data or another loss, or damage, which only the loss shows.",
    "diverged": "The run diverged at step {step}: from there on the norms reach "
    "{largest:.4g}; the median before is {median:.4g}.",
    "never healthy": "The run was never healthy: the norms from step {step} on reach "
    "{largest:.4g}, or jump from step to step.",
    "non-finite": "From step {step} to the end, {number:.3g} % of the norms are NaN or "
    "infinite.",
    "vanished": "The norms are 0 from step {step} to the end: no gradient changes the "
    "weights.",
    "clipped": "The log holds norms after clipping, which do not show the run: they "
    "stop at {number:.4g}.",
    "too short": "Too short for a verdict: {number} finite norms above 0; it takes "
    "{minimum}.",
}
"""The verdicts in words."""

ALL_ZERO = (
    "All norms are 0: nothing is trained, or gradients are set to 0 before they are "
    "measured, as by zero_grad()."
)
"""The sentence of "vanished" if no norm is above 0."""


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What a series of norms shows of its run; `print` it."""

    verdict: str
    """One of "healthy", "spikes", "shifted" (another level), "diverged",
    "non-finite", "never healthy", "vanished" (0 to the end), "clipped" (the log holds
    norms after clipping) and "too short"."""
    sentence: str
    """The verdict in words, with its steps and numbers."""
    healthy: Array
    """Whether each norm belongs to the healthy part, shape (steps,). Such norms are
    finite and no spikes."""
    step: int | None
    """The step at which the damage, the new level or the zeros begin, or None."""
    spikes: tuple[int, ...]
    """The steps of the spikes before the damage."""
    sign: int | None
    """The index in the series of the first sign of possible damage: another level, or
    else a spike. Steps may repeat, as in each epoch; an index does not."""
    calibration: int
    """The non-finite norms at the start, as a loss scaler causes. Before each are at
    most five finite norms in a row."""

    def __str__(self) -> str:
        """Return the sentence."""
        return self.sentence


class Finding(NamedTuple):
    """A verdict that leaves spikes out."""

    verdict: str
    place: int | None = None
    """Where the damage, the new level or the zeros begin."""
    number: float = 0.0
    """The ratio of a rise, the ceiling of a clipped log, the number of norms, or the
    share of those that are not finite, in percent."""


def diagnose(
    norms: Array,
    *,
    steps: Sequence[int] | Array | None = None,
    thresholds: Array | None = None,
    losses: Array | None = None,
) -> Diagnosis:
    """Return the diagnosis of a run, from its gradient norms and, if known, its loss.

    Norms do not show everything: after a damaged layer they may be as before. So
    "healthy", "spikes" and "shifted" are no verdict on the weights; the loss is.
    If it ends far above its level before a spike or another level, the run diverged.

    Args:
      norms: norms before clipping, in the order of the steps, shape (n,), >= 0. NaN and
        infinity are non-finite steps; empty cells must be left out.
      steps: the step of each norm, for the sentence; None counts from 0.
      thresholds: the threshold of each norm, if the log has it. Norms that stop there
        are norms after clipping; if one exceeds its threshold, they are not.
      losses: the loss of each step, NaN where it is unknown.

    Returns:
      A `Diagnosis`.

    >>> diagnosis = diagnose(np.repeat([1.0, 1e6, np.nan], [90, 20, 5]))
    >>> diagnosis.verdict, diagnosis.step, int(diagnosis.healthy.sum())
    ('diverged', 90, 90)
    """
    names = np.arange(len(norms)) if steps is None else np.asarray(steps)
    levels = measure_levels(norms)
    finding, spikes = find_verdict(norms, levels, thresholds), find_spikes(levels)
    rise = None
    if losses is not None and finding.verdict in ("healthy", "shifted"):
        places = spikes if finding.place is None else [finding.place]
        rise = find_loss_rise(losses, places)
    if rise:
        finding = Finding("diverged", rise.place)
    place = finding.place
    healthy = np.isfinite(norms)
    calibration = count_calibration(healthy[:START][:place])
    if place is not None and finding.verdict != "shifted":
        healthy[0 if finding.verdict == "never healthy" else place :] = False
    spikes = spikes[healthy[spikes]]
    healthy[spikes] = False
    if finding.verdict == "healthy" and spikes.size:
        finding = Finding("spikes")
    signs = spikes.tolist() if finding.verdict != "shifted" else [place]
    return Diagnosis(
        verdict=finding.verdict,
        sentence=write_sentence(norms, names, finding, healthy, spikes)
        + str(rise or ""),
        healthy=healthy,
        step=None if place is None else int(names[place]),
        spikes=tuple(names[spikes].tolist()),
        sign=signs[0] if signs else None,
        calibration=calibration,
    )


def find_verdict(norms: Array, levels: Levels, thresholds: Array | None) -> Finding:
    """Return the verdict; spikes are left out."""
    start = find_damage(levels)
    if start is not None:
        is_early = np.searchsorted(levels.places, start) < FIRST_STEPS
        return Finding("never healthy" if is_early else "diverged", start)
    start = find_non_finite_start(norms)
    if start is not None:
        share = 100 * float(np.mean(~np.isfinite(norms[start:])))
        return Finding("non-finite", start, share)
    start = find_vanishing(norms)
    if start is not None:
        return Finding("vanished", start)
    if len(levels.logs) < MIN_STEPS:
        return Finding("too short", number=len(levels.logs))
    ceiling = find_any_ceiling(norms, levels, thresholds)
    if ceiling is not None:
        return Finding("clipped", number=ceiling)
    change = find_level_change(levels)
    if change is None:
        return Finding("healthy")
    rest = levels.logs[levels.places >= change[0]]
    is_damage = change[1] > np.exp(DIVERGED) and not is_recovering(rest)
    return Finding("diverged" if is_damage else "shifted", *change)


def find_any_ceiling(
    norms: Array, levels: Levels, thresholds: Array | None
) -> float | None:
    """Return where norms after clipping stop, or None if they are from before it."""
    if thresholds is None:
        return find_ceiling(levels.logs)
    if has_norm_above(norms, thresholds):
        return None
    ceiling = find_ceiling(levels.logs)
    return ceiling or find_ceiling_of_thresholds(norms, thresholds)


def find_non_finite_start(norms: Array) -> int | None:
    """Return the place from which a tenth of the norms is NaN or infinite, or None.

    A non-finite norm weighs 9, a finite one -1. From that place to the end the sum is
    largest, and at least 18: two in the last two steps are enough. Those of the first
    50 steps do not count, unless they reach up to that place.
    """
    is_finite = np.isfinite(norms)
    first = min(START, max(len(norms) - 2, 0))
    weight = np.cumsum(np.where(is_finite, -1, WEIGHT)[::-1])[::-1][first:]
    if weight.max(initial=0) < 2 * WEIGHT:
        return None
    finite_before = np.flatnonzero(is_finite[: first + int(weight.argmax())])
    return int(finite_before[-1]) + 1 if finite_before.size else 0


def find_vanishing(norms: Array) -> int | None:
    """Return the place from which all norms are 0, or None.

    They are at least 50, and at most half of the norms before are 0: where many are,
    as of rare rewards, a row of zeros is no sign.
    """
    positive = np.flatnonzero(norms)
    start = int(positive[-1]) + 1 if positive.size else 0
    is_long = len(norms) - start >= MIN_STEPS
    return start if is_long and 2 * positive.size >= start else None


def count_calibration(is_finite: Array) -> int:
    """Return the number of non-finite norms before six finite ones in a row."""
    places = np.flatnonzero(~is_finite)
    is_late = np.diff(places, prepend=-1) > GAP + 1
    return int(np.argmax(np.append(is_late, True)))


def write_sentence(
    norms: Array, names: Any, finding: Finding, healthy: Array, spikes: Array
) -> str:
    """Return the verdict with its steps and numbers."""
    place = finding.place
    if finding.verdict == "vanished" and place == 0:
        return ALL_ZERO
    rest = norms[slice(place, None)]
    median = np.median(norms[healthy] / 2) * 2 if healthy.any() else 0.0
    with np.errstate(over="ignore"):
        high = np.max(norms[spikes], initial=0.0) / (median or 1.0)
    listed = ", ".join(map(str, names[spikes[:NAMED]].tolist()))
    return SENTENCES[finding.verdict].format(
        count=int(healthy.sum()),
        minimum=MIN_STEPS,
        step=None if place is None else names[place],
        largest=np.max(rest[np.isfinite(rest)], initial=0.0),
        median=median,
        spikes=listed + (" and more" if len(spikes) > NAMED else ""),
        high=high,
        number=finding.number,
    )
