"""Why a threshold or a policy is suggested, or withheld: sentences with numbers."""

import numpy as np

from autoclip_core.log.advice import advise_on_nonfinite
from autoclip_core.log.formatting import format_number, format_percent
from autoclip_core.log.rate_advice import LOW_SCALE
from autoclip_core.policies.quantile import Quantile
from autoclip_core.policy import Policy
from autoclip_core.record.statistics import quantile
from autoclip_core.record.step import Array
from autoclip_core.series.diagnosis import MIN_STEPS, Diagnosis
from autoclip_core.series.shifts import find_shift

HEAVY_TAIL = 1.0
"""Norms are heavy-tailed if the deviation of ln(norm) is larger than this."""

DRIFT = 2.0
"""The level moves if the medians of the first and last third differ by more."""

MIN_DRIFT_STEPS = 100
"""Fewer norms than this have no drift."""

TRUST_FIRST = (
    "Begin with TrustClip, which needs no number: it filters the gradient and bounds "
    "the update, the change of the weights in one step. A series of norms has no "
    "weights, so the numbers here are for a clipper of the gradient alone."
)
"""The first advice for every series."""

DAMAGED = {"diverged", "never healthy", "non-finite"}
"""The verdicts of a run that a bound of the update did not keep healthy."""

NO_POLICY = {"never healthy", "clipped"}
"""The verdicts without numbers."""

HEAVY = (
    "The norms are heavy-tailed (deviation of ln(norm) {noise} from step to step, "
    "above {limit:g}): use the median of a window, which clips half of the steps and "
    "is the safest choice for such tails."
)

MOVES = (
    "The level moves (the median of the last third is {drift} times that of the "
    "first): a constant would clip nothing or everything in one of them; use a short "
    "window."
)

CHANGES = (
    "The level is steady in the long run (last third over first third {drift}), but "
    "changes {change}: a window of 1000 steps follows a lasting change, "
    "a constant does not; `replay --compare` shows how soon."
)

STEADY = (
    "The level is steady (last third over first third {drift}, deviation of ln(norm) "
    "{noise} from step to step): use a window of 1000 steps or the constant; the "
    "window also follows another learning rate or loss scale."
)


def choose_policy(
    diagnosis: Diagnosis, norms: Array, steps: Array
) -> tuple[Policy | None, list[str]]:
    """Return the policy to start with and the reason; None without a healthy part."""
    if diagnosis.verdict in NO_POLICY or np.count_nonzero(norms) < MIN_STEPS:
        return None, []
    drift, noise, shift = measure_drift(norms), measure_noise(norms), find_shift(norms)
    texts = {"drift": format_number(drift), "noise": format_number(noise)}
    if noise > HEAVY_TAIL:
        return Quantile(0.5), [HEAVY.format(**texts, limit=HEAVY_TAIL)]
    if max(drift, 1 / drift) > DRIFT:
        return Quantile(0.9, history_length=128), [MOVES.format(**texts)]
    if diagnosis.verdict == "shifted":
        change = f"at step {diagnosis.step}"
        return Quantile(0.9), [CHANGES.format(**texts, change=change)]
    if shift:
        change = f"x{format_number(shift.ratio)} at step {steps[shift.step]}"
        return Quantile(0.9), [CHANGES.format(**texts, change=change)]
    return Quantile(0.9), [STEADY.format(**texts)]


def measure_noise(norms: Array) -> float:
    """Return the deviation of ln(norm) around a level that may move.

    `std(ln n_t+1 - ln n_t) / sqrt(2)`: a trend, a shift or a warm-up has little effect.
    """
    steps = np.diff(np.log(norms[norms > 0]))
    return float(np.sqrt(np.mean(steps**2) / 2)) if steps.size else 0.0


def measure_drift(norms: Array) -> float:
    """Return median of the last third / median of the first; 1 if unknown."""
    third = len(norms) // 3
    if len(norms) < MIN_DRIFT_STEPS:
        return 1.0
    first, last = quantile(norms[:third], 0.5), quantile(norms[-third:], 0.5)
    return last / first if first > 0 and last > 0 else 1.0


def advise_on_threshold(norms: Array, p90: float, p99: float, mean: float) -> list[str]:
    """Say how many of the healthy norms the suggested threshold would have clipped."""
    rates = float(np.mean(norms > p90)), float(np.mean(norms > p99))
    p90_rate, p99_rate = map(format_percent, rates)
    advice = [
        f"max_norm = {format_number(p90)} (p90) would have clipped {p90_rate} of the "
        f"healthy steps, p99 = {format_number(p99)} as a spike filter {p99_rate}."
    ]
    if p90 < 0.5 * mean:  # p90 is never above ten times the mean
        advice.append(
            f"p90 is below half the mean ({format_number(0.5 * mean)}): a few huge "
            "norms dominate the mean, so do not rely on it."
        )
    return advice


def advise_on_bound(verdict: str, scales: Array) -> list[str]:
    """Say what the bound of the update did in a run; a scale is NaN without an update.

    >>> advise_on_bound("healthy", np.array([0.9, 0.8]))
    []
    """
    if verdict in DAMAGED:
        return [
            "The update has a bound: if the log is of a dry run, set dry_run=False, so "
            "that TrustClip bounds the update; else lower the learning rate first."
        ]
    scales = scales[np.isfinite(scales)]
    scale = float(np.mean(scales)) if scales.size else 1.0
    if scale >= LOW_SCALE:
        return []
    return [
        "Unless the log is of a dry run, the bound of the update keeps this run "
        f"healthy (mean scale {format_number(scale)}, below {LOW_SCALE:g}): use the "
        "numbers here together with the bound, or lower the learning rate first."
    ]


def advise_on_calibration(nonfinite: int, steps: int, calibration: int) -> list[str]:
    """Count the norms that are not finite, and set those at the start apart."""
    if not calibration:
        return advise_on_nonfinite(nonfinite, steps)
    advice = [
        f"{nonfinite} of {steps} steps ({format_percent(nonfinite / steps)}) had a NaN "
        f"or infinite norm, {calibration} of them at the start: if a loss scaler is in "
        "use, this is its calibration, and no fault."
    ]
    if nonfinite > calibration:
        advice.append(
            f"No threshold repairs the other {nonfinite - calibration}: check the "
            "loss, the data of these steps and, in float16, the loss scale."
        )
    return advice
