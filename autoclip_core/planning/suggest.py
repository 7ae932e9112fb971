"""Which threshold suits a series of norms: statistics, a suggestion and the reasons."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from autoclip_core.log.summary import ENOUGH, number, percent
from autoclip_core.policies.quantile import Quantile
from autoclip_core.policy import Policy

from .replay import as_float64
from .spikes import find_shift, find_spikes

Array = npt.NDArray[Any]

HEAVY_TAIL = 1.0
"""The deviation of ln(norm) from which a few steps dominate the mean."""

DRIFT = 2.0
"""The ratio of the medians of the last and the first third that calls for a window."""

DIVERGED = 1000.0
"""How many times the usual norm the last norms are where a run diverged."""


@dataclass(frozen=True)
class Suggestion:
    """What a series of norms says about a threshold; `print` it.

    The statistics are over the finite norms.
    """

    steps: int
    """All steps of the series."""
    nonfinite: int
    """Those whose norm is NaN or infinite."""
    mean: float
    """The mean norm."""
    std: float
    """The standard deviation (over n)."""
    min: float
    """The smallest norm."""
    max: float
    """The largest finite norm."""
    median: float
    """The norm that half of the steps exceed."""
    p90: float
    """The norm that 10 % of the steps exceed."""
    p95: float
    """The norm that 5 % of the steps exceed."""
    p99: float
    """The norm that 1 % of the steps exceed."""
    log_std: float
    """The deviation of ln(norm): 0.1 is calm, 1 is heavy-tailed."""
    max_norm: float
    """The suggested constant threshold: p90, which clips 10 % of such steps."""
    mean_range: tuple[float, float]
    """Half the mean and ten times the mean: thresholds from here to there can work."""
    policy: Policy
    """The policy to start with, which follows the norms as they change; from those
    before a divergence."""
    advice: tuple[str, ...]
    """Sentences, each with the numbers it rests on."""
    diverged_at: int | None
    """The step from which the norms left for good, if they did; a suggestion from all
    steps is worth nothing then."""

    def __str__(self) -> str:
        """Return the numbers line by line, then the advice; a divergence first."""
        low, high = map(number, self.mean_range)
        left = [] if self.diverged_at is None else [about_divergence(self.diverged_at)]
        lines = [
            *left,
            f"steps         {self.steps} ({self.nonfinite} non-finite)",
            f"mean          {number(self.mean)}",
            f"std           {number(self.std)}",
            f"min           {number(self.min)}",
            f"median        {number(self.median)}",
            f"p90           {number(self.p90)}",
            f"p95           {number(self.p95)}",
            f"p99           {number(self.p99)}",
            f"max           {number(self.max)}",
            f"suggested     max_norm = {number(self.max_norm)}",
            f"mean range    {low} to {high} (0.5 to 10 times the mean)",
            f"or a policy   {self.policy!r}",
        ]
        return "\n".join([*lines, *self.advice])


def suggest_threshold(norms: Any) -> Suggestion:
    """Return statistics of a series of norms, a threshold to start with, and advice.

    max_norm = quantile(norms, 0.9), which clips a tenth of such steps, is suggested.
    The range from half to ten times the mean norm is an older rule of thumb.

    Args:
      norms: norms before clipping, shape (steps,), >= 0; NaN and infinity are counted
        and left out.

    Returns:
      A `Suggestion`.

    Raises:
      TypeError: the norms are not real numbers.
      ValueError: there is no finite norm, one is negative, or there are two dimensions.

    >>> found = suggest_threshold([1.0, 2.0, 3.0, 4.0, float("nan")])
    >>> found.mean, found.median, round(found.max_norm, 3), found.mean_range
    (2.5, 2.5, 3.7, (1.25, 25.0))

    Reference:
      Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural
      networks", 2013, https://arxiv.org/abs/1211.5063 (the range)
    """
    series = as_float64(norms)
    known = series[np.isfinite(series)]
    if not known.size:
        raise ValueError(
            f"norms must have at least one finite norm, got {series.size} NaN or "
            "infinite ones; look at the loss and the data of the run"
        )
    positive = known[known > 0]
    log_std = float(np.log(positive).std()) if positive.size else 0.0
    median, p90, p95, p99 = quantiles(known)
    unit = float(known.max()) or 1.0  # so that no sum and no square overflows
    mean = unit * float((known / unit).mean())
    diverged_at = divergence(series)
    policy, why = choose_policy(series[:diverged_at])
    return Suggestion(
        steps=series.size,
        nonfinite=series.size - known.size,
        mean=mean,
        std=unit * float((known / unit).std()),
        min=float(known.min()),
        max=float(known.max()),
        median=median,
        p90=p90,
        p95=p95,
        p99=p99,
        log_std=log_std,
        max_norm=p90,
        mean_range=(0.5 * mean, 10 * mean),
        policy=policy,
        advice=(*too_few(known), *about_threshold(known, p90, mean), why,
                *about_spikes(known), *about_lost(series)),
        diverged_at=diverged_at,
    )  # fmt: skip


def quantiles(norms: Array) -> tuple[float, float, float, float]:
    """Return median, p90, p95 and p99; halved first, so that none overflows."""
    found = (2 * np.quantile(norms / 2, [0.5, 0.9, 0.95, 0.99])).tolist()
    return found[0], found[1], found[2], found[3]


def choose_policy(series: Array) -> tuple[Policy, str]:
    """Return the policy to start with, and why."""
    norms = series[np.isfinite(series)]
    drift, noise = drift_of(norms), noise_of(norms)
    if noise > HEAVY_TAIL:
        return Quantile(0.5), (
            f"The norms are heavy-tailed (deviation of ln(norm) {number(noise)} from "
            f"step to step, above {HEAVY_TAIL:g}): take the median of a window, which "
            "clips half of the steps and is the safest under such tails."
        )
    if max(drift, 1 / drift) > DRIFT:
        return Quantile(0.9, history_length=128), (
            f"The level moves (the median of the last third is {number(drift)} times "
            "that of the first): a constant would be inert or clip everything in one "
            "of them; take a short window."
        )
    level = f"last third over first third {number(drift)}"
    shift = find_shift(series)
    if shift:
        return Quantile(0.9), (
            f"The level is steady in the long run ({level}), but changes "
            f"x{number(shift.ratio)} at step {shift.step}: a window of 1000 steps "
            "follows a lasting change, a constant does not; `replay --compare` shows "
            "how soon."
        )
    return Quantile(0.9), (
        f"The level is steady ({level}, deviation of ln(norm) {number(noise)} from "
        "step to step): a window of 1000 steps or the constant will both do; the "
        "window also follows another learning rate or loss scale."
    )


def divergence(series: Array) -> int | None:
    """Return the step from which the norms left for good, or None.

    They did if the last ten are a thousand times the median of the first half. Where
    is told by the last norm below ten times that median.

    >>> divergence(np.concatenate([np.ones(90), np.geomspace(1, 1e9, 30)]))
    94
    >>> divergence(np.ones(100)) is None
    True
    """
    known = np.flatnonzero(np.isfinite(series))
    if len(known) < ENOUGH:
        return None
    norms = series[known]
    usual = float(np.median(norms[: len(norms) // 2] / 2)) * 2
    if not 0 < usual * DIVERGED < np.median(norms[-10:] / 2) * 2:
        return None
    return int(known[norms <= 10 * usual][-1]) + 1


def about_divergence(step: int) -> str:
    """Say that the numbers are of a run that diverged, and what to do."""
    return (
        f"The run diverged: from step {step} on the norms are more than ten times the "
        "usual one, and never less. A threshold from all steps is worth nothing: take "
        f"those before, `--until {step}` or norms[:{step}]."
    )


def noise_of(norms: Array) -> float:
    """Return the deviation of ln(norm) around a level that may move.

    `std(ln n_t+1 - ln n_t) / sqrt(2)`: a trend, a shift or a warm-up hardly counts.
    """
    steps = np.diff(np.log(norms[norms > 0]))
    return float(np.sqrt(np.mean(steps**2) / 2)) if steps.size else 0.0


def drift_of(norms: Array) -> float:
    """Return the median of the last third over that of the first; 1 if unknown."""
    third = len(norms) // 3
    if len(norms) < ENOUGH:
        return 1.0
    halves = norms / 2  # of which no two overflow
    first, last = np.median(halves[:third]), np.median(halves[-third:])
    return float(last / first) if first > 0 and last > 0 else 1.0


def too_few(norms: Array) -> list[str]:
    """Say so if the series is too short to rely on."""
    if len(norms) >= ENOUGH:
        return []
    return [
        f"Too early to judge: {len(norms)} finite norms; log at least {ENOUGH} steps, "
        "better 1000, past the warm-up of the learning rate."
    ]


def about_threshold(norms: Array, p90: float, mean: float) -> list[str]:
    """Say what the suggested threshold would do."""
    p99 = quantiles(norms)[3]
    rate, rare = float(np.mean(norms > p90)), float(np.mean(norms > p99))
    advice = [
        f"max_norm = {number(p90)} (p90) would have clipped {percent(rate)} of these "
        f"steps, p99 = {number(p99)} as a spike filter {percent(rare)}."
    ]
    if p90 < 0.5 * mean:  # no tenth of the norms can lie above ten times the mean
        advice.append(
            f"p90 lies below half the mean ({number(0.5 * mean)}): a few huge norms "
            "make the mean, so distrust it."
        )
    return advice


def about_spikes(norms: Array) -> list[str]:
    """Say how many spikes there are, if any."""
    spikes = find_spikes(norms)
    if not spikes.size:
        return []
    largest = float(norms[spikes].max() / 2 / np.median(norms / 2))
    return [
        f"{len(spikes)} spikes stand out from their neighbours, the largest "
        f"{number(largest)} times the median: clipping matters there."
    ]


def about_lost(series: Array) -> list[str]:
    """Say that no threshold mends a non-finite norm, if there is one."""
    lost = int(np.sum(~np.isfinite(series)))
    if not lost:
        return []
    return [
        f"{lost} of {len(series)} steps ({percent(lost / len(series))}) had a NaN or "
        "infinite norm, which no threshold mends."
    ]
