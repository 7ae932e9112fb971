"""Suggests a threshold for a series of norms: a diagnosis, statistics and reasons."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from autoclip_core.log.formatting import format_number, wrap_text
from autoclip_core.policy import Policy, as_code
from autoclip_core.record.step import Array
from autoclip_core.series.diagnosis import Diagnosis, diagnose

from .constant import select_norms
from .reasons import (
    TRUST_FIRST,
    advise_on_calibration,
    advise_on_threshold,
    choose_policy,
)
from .replay import as_float64


@dataclass(frozen=True)
class Suggestion:
    """A diagnosis, statistics and a suggested threshold; `print` it.

    The statistics are over the healthy part. They are NaN if there is none.
    """

    diagnosis: Diagnosis
    """What the norms show of the run."""
    steps: int
    """The number of steps in the series."""
    healthy: int
    """The steps of the healthy part: finite, before any damage, and no spikes."""
    nonfinite: int
    """The steps whose norm is NaN or infinite."""
    mean: float
    """The mean norm."""
    std: float
    """The standard deviation (over n)."""
    min: float
    """The smallest norm."""
    max: float
    """The largest norm."""
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
    max_norm: float | None
    """The suggested constant threshold: p90, which clips 10 % of such steps; after a
    change of level, p90 of one level. None if the series supports none; the advice says
    why."""
    mean_range: tuple[float, float] | None
    """Half the mean and ten times the mean: thresholds from here to there can work.
    None if `max_norm` is None."""
    policy: Policy | None
    """The policy to start with, which follows the norms as they change, or None."""
    advice: tuple[str, ...]
    """Sentences, each with the numbers that support it."""

    @property
    def verdict(self) -> str:
        """The verdict of the diagnosis, such as "healthy"."""
        return self.diagnosis.verdict

    @property
    def diverged_at(self) -> int | None:
        """The step from which the run diverged, or None."""
        return self.diagnosis.step if self.verdict == "diverged" else None

    def __str__(self) -> str:
        """Return the verdict, one line per number, then the advice."""
        names = "mean", "std", "min", "median", "p90", "p95", "p99", "max"
        values = [(name, format_number(getattr(self, name))) for name in names]
        counts = f"{self.steps} ({self.healthy} healthy, {self.nonfinite} non-finite)"
        threshold = "none, because of what follows"
        if self.max_norm is not None:
            threshold = f"max_norm = {format_number(self.max_norm)}"
        rows = [("steps", counts), *(values if self.healthy else [])]
        rows += [("suggested", threshold)]
        if self.mean_range:
            low, high = map(format_number, self.mean_range)
            basis = f"0.5 to 10 times the mean; above {format_number(self.max)} "
            rows += [("mean range", f"{low} to {high} ({basis}clips nothing)")]
        rows += [("or a policy", as_code(self.policy))] if self.policy else []
        lines = [f"{name:<13} {value}" for name, value in rows]
        return wrap_text("\n".join([self.diagnosis.sentence, *lines, *self.advice]))


def suggest_threshold(
    norms: Any, *, steps: Any = None, thresholds: Any = None, losses: Any = None
) -> Suggestion:
    """Return a diagnosis of a series of norms, a threshold to start with, and advice.

    The suggestion is max_norm = quantile(norms, 0.9) over the healthy part, which clips
    10 % of such steps. It is None if the series supports no constant: there is no
    healthy part, it is shorter than 50 steps, its level rose in the middle, or the log
    holds norms after clipping. The range from 0.5 to 10 times the mean norm is an older
    rule of thumb.

    Args:
      norms: norms before clipping, shape (steps,), >= 0; NaN and infinity are counted
        and left out.
      steps: the step of each norm, for the sentences; None counts from 0.
      thresholds: the threshold of each norm, if the log has it, shape (steps,). They
        show whether the norms are from before or after clipping.
      losses: the loss of each step, if the log has it, shape (steps,), NaN where it is
        unknown. It shows whether a spike or another level was damage.

    Returns:
      A `Suggestion`.

    Raises:
      TypeError: the norms are not real numbers.
      ValueError: there is no norm, one is negative, or there are two dimensions.

    >>> norms = [1.0, 2.0, 3.0, 4.0, float("nan")] * 20 + [1e9] * 20
    >>> suggestion = suggest_threshold(norms)
    >>> suggestion.verdict, suggestion.diverged_at, suggestion.max_norm
    ('diverged', 100, 4.0)
    >>> suggestion.mean_range
    (1.25, 25.0)

    Reference:
      Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural
      networks", 2013, https://arxiv.org/abs/1211.5063 (the range)
    """
    series = as_float64(norms)
    names = np.arange(len(series)) if steps is None else np.asarray(steps)
    others = [
        None if column is None else np.asarray(column, np.float64)
        for column in (thresholds, losses)
    ]
    diagnosis = diagnose(series, steps=names, thresholds=others[0], losses=others[1])
    return make_suggestion(series, names, diagnosis)


def make_suggestion(series: Array, names: Array, diagnosis: Diagnosis) -> Suggestion:
    """Return the suggestion that a diagnosis supports; names are the steps."""
    healthy = series[diagnosis.healthy]
    numbers = measure_statistics(healthy)
    chosen, origin = select_norms(diagnosis, series, names)
    policy, reason = choose_policy(diagnosis, healthy, names[diagnosis.healthy])
    is_all = chosen is None or chosen.size == healthy.size
    basis = numbers if is_all else measure_statistics(np.asarray(chosen))
    mean, p90, p99 = basis["mean"], basis["p90"], basis["p99"]
    rates = [] if chosen is None else advise_on_threshold(healthy, p90, p99, mean)
    nonfinite = int(np.sum(~np.isfinite(series)))
    return Suggestion(
        diagnosis=diagnosis,
        steps=series.size,
        healthy=healthy.size,
        nonfinite=nonfinite,
        **numbers,
        max_norm=None if chosen is None else p90,
        mean_range=None if chosen is None else (0.5 * mean, 10 * mean),
        policy=policy,
        advice=(
            TRUST_FIRST,
            *origin,
            *rates,
            *reason,
            *advise_on_calibration(nonfinite, series.size, diagnosis.calibration),
        ),
    )


def measure_statistics(norms: Array) -> dict[str, float]:
    """Return the statistics of the healthy norms; NaN if there are none."""
    if not norms.size:
        names = "mean", "std", "min", "max", "median", "p90", "p95", "p99", "log_std"
        return dict.fromkeys(names, float("nan"))
    unit = float(norms.max()) or 1.0  # divided by it, no sum or square overflows
    positive = norms[norms > 0]
    quantiles = 2 * np.quantile(norms / 2, [0.5, 0.9, 0.95, 0.99])
    median, p90, p95, p99 = quantiles.tolist()
    return {
        "mean": unit * float((norms / unit).mean()),
        "std": unit * float((norms / unit).std()),
        "min": float(norms.min()),
        "max": float(norms.max()),
        "median": median,
        "p90": p90,
        "p95": p95,
        "p99": p99,
        "log_std": float(np.log(positive).std()) if positive.size else 0.0,
    }
