"""Suggests a threshold for a series of norms, with statistics and reasons."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from autoclip_core.log.advice import MIN_STEPS, advise_on_nonfinite
from autoclip_core.log.formatting import format_number, format_percent
from autoclip_core.policies.quantile import Quantile
from autoclip_core.policy import Policy
from autoclip_core.record.step import Array
from autoclip_core.series.spikes import find_shift, find_spikes

from .replay import as_float64

HEAVY_TAIL = 1.0
"""Norms are heavy-tailed if the deviation of ln(norm) is larger than this."""

DRIFT = 2.0
"""The level moves if the medians of the first and last third differ by more."""

DIVERGED = 1000.0
"""A run has diverged if its last norms are more than this many times the usual."""

TRUST_FIRST = (
    "Begin with TrustClip, which needs no number: it filters the gradient and bounds "
    "the update, the change of the weights in one step. A series of norms has no "
    "weights, so the numbers here are for a clipper of the gradient alone."
)
"""The first advice for every series."""


@dataclass(frozen=True)
class Suggestion:
    """Statistics of a series of norms and a suggested threshold; `print` it.

    The statistics are over the finite norms.
    """

    steps: int
    """The number of steps in the series."""
    nonfinite: int
    """The steps whose norm is NaN or infinite."""
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
    """The policy to start with, which follows the norms as they change. It is chosen
    from the norms before a divergence."""
    advice: tuple[str, ...]
    """Sentences, each with the numbers that support it."""
    diverged_at: int | None
    """The step from which the run diverged, or None. If it did, a threshold from all
    steps is of no use."""

    def __str__(self) -> str:
        """Return one line per number, then the advice; a divergence comes first."""
        low, high = map(format_number, self.mean_range)
        step = self.diverged_at
        lines = [
            *([] if step is None else [advise_on_divergence(step)]),
            f"steps         {self.steps} ({self.nonfinite} non-finite)",
            f"mean          {format_number(self.mean)}",
            f"std           {format_number(self.std)}",
            f"min           {format_number(self.min)}",
            f"median        {format_number(self.median)}",
            f"p90           {format_number(self.p90)}",
            f"p95           {format_number(self.p95)}",
            f"p99           {format_number(self.p99)}",
            f"max           {format_number(self.max)}",
            f"suggested     max_norm = {format_number(self.max_norm)}",
            f"mean range    {low} to {high} (0.5 to 10 times the mean)",
            f"or a policy   {self.policy!r}",
        ]
        return "\n".join([*lines, *self.advice])


def suggest_threshold(norms: Any) -> Suggestion:
    """Return statistics of a series of norms, a threshold to start with, and advice.

    The suggestion is max_norm = quantile(norms, 0.9), which clips 10 % of such steps.
    The range from 0.5 to 10 times the mean norm is an older rule of thumb.

    Args:
      norms: norms before clipping, shape (steps,), >= 0; NaN and infinity are counted
        and left out.

    Returns:
      A `Suggestion`.

    Raises:
      TypeError: the norms are not real numbers.
      ValueError: there is no finite norm, one is negative, or there are two dimensions.

    >>> suggestion = suggest_threshold([1.0, 2.0, 3.0, 4.0, float("nan")])
    >>> suggestion.mean, suggestion.median, round(suggestion.max_norm, 3)
    (2.5, 2.5, 3.7)
    >>> suggestion.mean_range
    (1.25, 25.0)

    Reference:
      Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural
      networks", 2013, https://arxiv.org/abs/1211.5063 (the range)
    """
    series = as_float64(norms)
    finite = series[np.isfinite(series)]
    if not finite.size:
        raise ValueError(
            f"norms must have at least one finite norm, got {series.size} NaN or "
            "infinite ones; check the loss and the data of the run"
        )
    nonfinite = series.size - finite.size
    positive = finite[finite > 0]
    log_std = float(np.log(positive).std()) if positive.size else 0.0
    median, p90, p95, p99 = quantiles(finite)
    unit = float(finite.max()) or 1.0  # divided by it, no sum or square overflows
    mean = unit * float((finite / unit).mean())
    diverged_at = find_divergence(series)
    policy, reason = choose_policy(series[:diverged_at])
    return Suggestion(
        steps=series.size,
        nonfinite=nonfinite,
        mean=mean,
        std=unit * float((finite / unit).std()),
        min=float(finite.min()),
        max=float(finite.max()),
        median=median,
        p90=p90,
        p95=p95,
        p99=p99,
        log_std=log_std,
        max_norm=p90,
        mean_range=(0.5 * mean, 10 * mean),
        policy=policy,
        advice=(
            TRUST_FIRST,
            *advise_on_length(finite),
            *advise_on_threshold(finite, p90, mean),
            reason,
            *advise_on_spikes(finite),
            *advise_on_nonfinite(nonfinite, series.size),
        ),
        diverged_at=diverged_at,
    )


def quantiles(norms: Array) -> tuple[float, float, float, float]:
    """Return median, p90, p95 and p99; norms are halved first to avoid overflow."""
    halves = np.quantile(norms / 2, [0.5, 0.9, 0.95, 0.99])
    median, p90, p95, p99 = (2 * halves).tolist()
    return median, p90, p95, p99


def choose_policy(series: Array) -> tuple[Policy, str]:
    """Return the policy to start with, and the reason."""
    norms = series[np.isfinite(series)]
    drift, noise = measure_drift(norms), measure_noise(norms)
    drift_text, noise_text = format_number(drift), format_number(noise)
    if noise > HEAVY_TAIL:
        return Quantile(0.5), (
            f"The norms are heavy-tailed (deviation of ln(norm) {noise_text} from "
            f"step to step, above {HEAVY_TAIL:g}): use the median of a window, which "
            "clips half of the steps and is the safest choice for such tails."
        )
    if max(drift, 1 / drift) > DRIFT:
        return Quantile(0.9, history_length=128), (
            f"The level moves (the median of the last third is {drift_text} times "
            "that of the first): a constant would clip nothing or everything in one "
            "of them; use a short window."
        )
    level = f"last third over first third {drift_text}"
    shift = find_shift(series)
    if shift:
        return Quantile(0.9), (
            f"The level is steady in the long run ({level}), but changes "
            f"x{format_number(shift.ratio)} at step {shift.step}: a window of 1000 "
            "steps follows a lasting change, a constant does not; `replay --compare` "
            "shows how soon."
        )
    return Quantile(0.9), (
        f"The level is steady ({level}, deviation of ln(norm) {noise_text} from step "
        "to step): use a window of 1000 steps or the constant; the window also follows "
        "another learning rate or loss scale."
    )


def find_divergence(series: Array) -> int | None:
    """Return the step from which the run diverged, or None if it did not.

    It diverged if the median of the last ten norms is more than a thousand times the
    median of the first half. The step follows the last norm that is at most ten times
    the median of the first half.

    >>> find_divergence(np.concatenate([np.ones(90), np.geomspace(1, 1e9, 30)]))
    94
    >>> find_divergence(np.ones(100)) is None
    True
    """
    finite = np.flatnonzero(np.isfinite(series))
    if len(finite) < MIN_STEPS:
        return None
    norms = series[finite]
    usual = float(np.median(norms[: len(norms) // 2] / 2)) * 2
    if not 0 < usual * DIVERGED < np.median(norms[-10:] / 2) * 2:
        return None
    return int(finite[norms <= 10 * usual][-1]) + 1


def advise_on_divergence(step: int) -> str:
    """Say that the run diverged, and how to read only the steps before."""
    return (
        f"The run diverged: from step {step} on all norms are more than ten times the "
        "usual norm. A threshold from all steps is of no use: read only the steps "
        f"before, with `--until {step}` or norms[:{step}]."
    )


def measure_noise(norms: Array) -> float:
    """Return the deviation of ln(norm) around a level that may move.

    `std(ln n_t+1 - ln n_t) / sqrt(2)`: a trend, a shift or a warm-up has little effect.
    """
    steps = np.diff(np.log(norms[norms > 0]))
    return float(np.sqrt(np.mean(steps**2) / 2)) if steps.size else 0.0


def measure_drift(norms: Array) -> float:
    """Return median of the last third / median of the first; 1 if unknown."""
    third = len(norms) // 3
    if len(norms) < MIN_STEPS:
        return 1.0
    halves = norms / 2  # the sum of two of them does not overflow
    first, last = np.median(halves[:third]), np.median(halves[-third:])
    return float(last / first) if first > 0 and last > 0 else 1.0


def advise_on_length(norms: Array) -> list[str]:
    """Warn if the series is too short to rely on."""
    if len(norms) >= MIN_STEPS:
        return []
    return [
        f"Too early to judge: {len(norms)} finite norms; log at least {MIN_STEPS} "
        "steps, better 1000, after the warm-up of the learning rate."
    ]


def advise_on_threshold(norms: Array, p90: float, mean: float) -> list[str]:
    """Say how many steps the suggested threshold would have clipped."""
    p99 = quantiles(norms)[3]
    rates = float(np.mean(norms > p90)), float(np.mean(norms > p99))
    p90_rate, p99_rate = map(format_percent, rates)
    advice = [
        f"max_norm = {format_number(p90)} (p90) would have clipped {p90_rate} of these "
        f"steps, p99 = {format_number(p99)} as a spike filter {p99_rate}."
    ]
    if p90 < 0.5 * mean:  # p90 is never above ten times the mean
        advice.append(
            f"p90 is below half the mean ({format_number(0.5 * mean)}): a few huge "
            "norms dominate the mean, so do not rely on it."
        )
    return advice


def advise_on_spikes(norms: Array) -> list[str]:
    """Say how many spikes there are, if any."""
    spikes = find_spikes(norms)
    if not spikes.size:
        return []
    largest = float(norms[spikes].max() / 2 / np.median(norms / 2))
    return [
        f"{len(spikes)} spikes stand out from their neighbours, the largest "
        f"{format_number(largest)} times the median: clipping has an effect there."
    ]
