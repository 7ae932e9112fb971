"""Applies a policy to a logged series of norms and reports what it would have done.

Each norm goes through `decide`, the same code as in training. This file only adds the
report.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from autoclip_core.checks import format_error
from autoclip_core.decision import decide
from autoclip_core.log.formatting import format_number, format_percent, wrap_text
from autoclip_core.policy import Policy, check_policy
from autoclip_core.record.row_counts import compute_rates
from autoclip_core.record.statistics import mean, median
from autoclip_core.record.step import Array
from autoclip_core.series.diagnosis import diagnose
from autoclip_core.series.shifts import LevelShift, find_shift

Progress = Callable[[Iterable[Any]], Iterable[Any]]
"""Wraps an iterable that has a length and shows the progress, such as `tqdm`."""

BLOCK = 500
"""Steps between two updates of the progress."""


@dataclass(frozen=True, eq=False)
class Replay:
    """The result of a replay; arrays have one entry per step."""

    policy: Policy
    """The policy that was replayed."""
    norms: Array
    """The series in float32, as the policy received it."""
    thresholds: Array
    """The threshold of each step; +inf if there is none."""
    scales: Array
    """Norm after / norm before: 1 if not clipped, 0 if the gradient is set to 0."""
    clipped: Array
    """Whether the finite norm exceeded the threshold."""
    finite: Array
    """False if the norm is NaN or infinite."""
    skipped: Array
    """Whether the whole update would have been skipped."""
    dropped: Array
    """Whether the finite norm exceeded the drop level, so that the scale is 0."""

    @property
    def clip_rate(self) -> float:
        """The fraction of steps with a finite norm that was clipped; NaN if none is."""
        measured = int(self.finite.sum())
        return float(self.clipped.sum() / measured) if measured else math.nan

    @property
    def mean_scale(self) -> float:
        """The mean scale of the steps with a finite norm; NaN if there are none."""
        return mean(self.scales[self.finite])

    @property
    def median_threshold(self) -> float:
        """The median of the finite thresholds; +inf if there are none."""
        return median(self.thresholds[np.isfinite(self.thresholds)])

    @property
    def nonfinite(self) -> int:
        """The number of steps whose norm is NaN or infinite."""
        return int(np.sum(~self.finite))

    @cached_property
    def spikes(self) -> Array:
        """The indices of the spikes that the diagnosis of the norms names."""
        return np.array(diagnose(self.norms).spikes, np.intp)

    @property
    def spikes_caught(self) -> Array:
        """The indices of the `spikes` that were clipped."""
        spikes = self.spikes
        return spikes[self.clipped[spikes]]

    @cached_property
    def shift(self) -> LevelShift | None:
        """The largest lasting change of the norms' level, or None."""
        return find_shift(self.norms)

    @property
    def recovery(self) -> float:
        """Steps from a rise of the level until the policy has adapted to it.

        If the run diverged, a policy that adapts to it is no help.

        It has adapted at the first step whose next 50 steps have a mean scale above
        90 % of that of the 50 steps before the shift. +inf if that never happens, NaN
        if the level does not rise.
        """
        shift = self.shift
        if shift is None or shift.ratio < 1:
            return math.nan
        scales = np.where(self.finite, self.scales.astype(np.float64), 1.0)
        before = scales[max(shift.step - WINDOW, 0) : shift.step].mean()
        after = scales[shift.step :]
        sums = np.concatenate([[0.0], np.cumsum(after)])
        ends = np.minimum(np.arange(len(after)) + WINDOW, len(after))
        means = (sums[ends] - sums[:-1]) / (ends - np.arange(len(after)))
        recovered = np.flatnonzero(means > 0.9 * before)
        return float(recovered[0]) if recovered.size else math.inf

    def rates(self, stretches: int = 50) -> Array:
        """Return the clip rate of each interval; all intervals have the same length.

        Args:
          stretches: the number of intervals, >= 1.

        Returns:
          Shape (stretches,), in [0, 1]; NaN if an interval has no finite norm.

        >>> from autoclip_core import Fixed
        >>> replay([1.0, 1.0, 1.0, 3.0], Fixed(2.0)).rates(stretches=2).tolist()
        [0.0, 0.5]
        """
        edges = np.linspace(0, len(self.norms), stretches + 1).astype(int)
        sums = np.concatenate([[0], np.cumsum(self.clipped)])
        counts = np.concatenate([[0], np.cumsum(self.finite)])
        clipped, total = np.diff(sums[edges]), np.diff(counts[edges])
        return compute_rates(clipped, total)

    def __str__(self) -> str:
        """Return one line per number."""
        count = int(self.dropped.sum())
        dropped = f", {count} of the steps dropped to 0" if count else ""
        return wrap_text(
            f"policy            {self.policy!r}\n"
            f"steps             {len(self.norms)} ({self.nonfinite} non-finite)\n"
            f"clip rate         {format_percent(self.clip_rate)}{dropped}\n"
            f"mean scale        {format_number(self.mean_scale)}\n"
            f"median threshold  {self.median_threshold:.4g}\n"
            f"spikes caught     {self.describe_spikes()}\n"
            f"level shift       {self._describe_shift()}"
        )

    def describe_spikes(self) -> str:
        """Return how many spikes were caught, such as "1 of 2", or "none" without any.

        >>> from autoclip_core import Fixed
        >>> replay([1.0, 1.0], Fixed(2.0)).describe_spikes()
        'none'
        """
        count = len(self.spikes)
        return f"{len(self.spikes_caught)} of {count}" if count else "none"

    def _describe_shift(self) -> str:
        shift = self.shift
        if shift is None:
            return "none"
        text = f"x{shift.ratio:.3g} at step {shift.step}"
        if shift.ratio < 1:
            return text
        after = f"followed after {self.recovery:.0f} steps"
        return f"{text}, {'not followed' if math.isinf(self.recovery) else after}"


WINDOW = 50
"""The number of steps whose mean scale decides whether the policy has recovered."""


def replay(
    norms: Any,
    policy: Policy,
    *,
    nonfinite: str = "zero",
    progress: Progress | None = None,
) -> Replay:
    """Apply a policy to a logged series of norms, with the same code as in training.

    Args:
      norms: norms before clipping, in the order of the steps, shape (steps,), >= 0.
        NaN and infinity are non-finite steps.
      policy: any policy that needs no parameter norms.
      nonfinite: how a non-finite step is handled, as in `decide`.
      progress: a function that wraps the loop and shows its progress, such as
        `tqdm.tqdm`.

    Returns:
      A `Replay`: thresholds, scales, clip rate, spikes caught, recovery.

    Raises:
      TypeError: `policy` is not a policy, or the norms are not numbers.
      ValueError: there is no norm, one is negative, the series has two dimensions, or
        the policy needs the norms of parameters, which a series does not contain.

    >>> from autoclip_core import Quantile
    >>> report = replay([1.0, 2.0, 6.0, float("nan")], Quantile(0.5))
    >>> report.thresholds.tolist(), report.scales.tolist()
    ([inf, 1.0, 1.5, 2.0], [1.0, 0.5, 0.25, 0.0])
    >>> round(report.clip_rate, 3)
    0.667
    """
    check_policy(policy)
    if policy.needs_param_norms:
        way_out = "watch this policy in training with ClipLog"
        rule = "a policy of the gradient's norm alone"
        raise ValueError(format_error("policy", rule, policy, way_out))
    series = as_series(norms)
    size = len(series)
    # In the order of the fields of a decision behind the norm.
    columns = [*np.empty((2, size), np.float32), *np.empty((4, size), np.bool_)]
    state = policy.init(1)
    starts = range(0, size, BLOCK)
    for start in progress(starts) if progress else starts:
        for step in range(start, min(start + BLOCK, size)):
            norm = series[step : step + 1]
            state, decision = decide(policy, state, norm, nonfinite=nonfinite)
            for column, field in zip(columns, decision[1:], strict=True):
                column[step] = field[0]
    return Replay(policy, series, *columns)


def as_series(norms: Any) -> Array:
    """Return a series of norms as float32; norms beyond its range become infinite."""
    with np.errstate(over="ignore"):
        return as_float64(norms).astype(np.float32)


def as_float64(norms: Any) -> Array:
    """Return a series of norms as float64.

    Raises:
      TypeError: the norms are not real numbers.
      ValueError: there is no norm, one is negative, or there are two dimensions.
    """
    series = np.asarray(norms)
    if series.ndim != 1 or not series.size:
        rule, way_out = "of shape (steps,)", "pass one norm per step"
        raise ValueError(format_error("norms", rule, series.shape, way_out))
    if series.dtype.kind not in "fiu":
        raise TypeError(f"norms must be real numbers, got dtype {series.dtype}")
    negative = np.flatnonzero(series < 0)
    if negative.size:
        norm = float(series[negative[0]])
        way_out = f"a norm is never negative; see step {negative[0]}"
        raise ValueError(format_error("norms", ">= 0", norm, way_out))
    return series.astype(np.float64, copy=False)
