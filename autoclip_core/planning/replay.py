"""A policy over a logged series of norms: what it would have done, step by step.

Nothing is reimplemented here: each norm goes through `decide`, the code that training
runs. What this file adds is the report.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from autoclip_core.checks import format_error
from autoclip_core.policy import Policy, check_policy, decide

from .spikes import LevelShift, find_shift, find_spikes

Array = npt.NDArray[Any]

Progress = Callable[[Iterable[Any]], Iterable[Any]]
"""Wraps an iterable that has a length, and shows how far it is: tqdm does."""

BLOCK = 500
"""Steps between two reports of progress."""


@dataclass(frozen=True, eq=False)
class Replay:
    """What a policy does to a series of norms; arrays have one entry per step."""

    policy: Policy
    """The policy that was replayed."""
    norms: Array
    """The series, in float32 as the policy saw it."""
    thresholds: Array
    """T of each step; +inf where there is none."""
    scales: Array
    """Norm after / norm before: 1 where nothing is clipped, 0 where it is removed."""
    clipped: Array
    """Whether the finite norm exceeded the threshold."""
    finite: Array
    """False where the norm is NaN or infinite."""
    skipped: Array
    """Whether the whole update would have been cancelled."""

    @property
    def clip_rate(self) -> float:
        """The clipped fraction of the steps with a finite norm; NaN without any."""
        measured = int(self.finite.sum())
        return float(self.clipped.sum() / measured) if measured else math.nan

    @property
    def mean_scale(self) -> float:
        """The mean scale of the steps with a finite norm; NaN without any."""
        known = self.scales[self.finite]
        return float(known.mean(dtype=np.float64)) if known.size else math.nan

    @property
    def median_threshold(self) -> float:
        """The median of the finite thresholds; +inf without any."""
        known = self.thresholds[np.isfinite(self.thresholds)]
        return float(np.median(known)) if known.size else math.inf

    @property
    def nonfinite(self) -> int:
        """Steps whose norm is NaN or infinite."""
        return int(np.sum(~self.finite))

    @cached_property
    def spikes(self) -> Array:
        """The steps that stand out from their neighbours, as indices."""
        return find_spikes(self.norms)

    @property
    def spikes_caught(self) -> Array:
        """Which of the `spikes` were clipped, as indices."""
        spikes = self.spikes
        return spikes[self.clipped[spikes]]

    @cached_property
    def shift(self) -> LevelShift | None:
        """The largest lasting change of level, if there is one."""
        return find_shift(self.norms)

    @property
    def recovery(self) -> float:
        """Steps from the shift until the policy treats the new level as it did the old.

        The first step from which the mean scale over 50 steps is above 90 % of what it
        was over the 50 steps before the shift; +inf if it never is, NaN without a
        shift.
        """
        shift = self.shift
        if shift is None:
            return math.nan
        known = np.where(self.finite, self.scales.astype(np.float64), 1.0)
        before = known[max(shift.step - WINDOW, 0) : shift.step].mean()
        ahead = known[shift.step :]
        sums = np.concatenate([[0.0], np.cumsum(ahead)])
        ends = np.minimum(np.arange(len(ahead)) + WINDOW, len(ahead))
        means = (sums[ends] - sums[:-1]) / (ends - np.arange(len(ahead)))
        good = np.flatnonzero(means > 0.9 * before)
        return float(good[0]) if good.size else math.inf

    def rates(self, stretches: int = 50) -> Array:
        """Return the clip rate over time: of so many stretches of equal length.

        Args:
          stretches: how many, >= 1.

        Returns:
          Shape (stretches,), in [0, 1]; NaN where a stretch has no finite norm.

        >>> from autoclip_core import Fixed
        >>> replay([1.0, 1.0, 1.0, 3.0], Fixed(2.0)).rates(stretches=2).tolist()
        [0.0, 0.5]
        """
        edges = np.linspace(0, len(self.norms), stretches + 1).astype(int)
        sums = np.concatenate([[0], np.cumsum(self.clipped)])
        known = np.concatenate([[0], np.cumsum(self.finite)])
        part, of = np.diff(sums[edges]), np.diff(known[edges])
        rates: Array = np.where(of > 0, part / np.maximum(of, 1), np.nan)
        return rates

    def __str__(self) -> str:
        """Return the numbers line by line."""
        return "\n".join(
            [
                f"policy            {self.policy!r}",
                f"steps             {len(self.norms)} ({self.nonfinite} non-finite)",
                f"clip rate         {100 * self.clip_rate:.3g} %",
                f"mean scale        {self.mean_scale:.4g}",
                f"median threshold  {self.median_threshold:.4g}",
                f"spikes caught     {len(self.spikes_caught)} of {len(self.spikes)}",
                f"level shift       {self._told_shift()}",
            ]
        )

    def _told_shift(self) -> str:
        shift = self.shift
        if shift is None:
            return "none"
        steps = f"recovered after {self.recovery:.0f} steps"
        steps = "not recovered" if math.isinf(self.recovery) else steps
        return f"x{shift.ratio:.3g} at step {shift.step}, {steps}"


WINDOW = 50
"""Steps over which a recovery is judged."""


class Taken(NamedTuple):
    """The arrays that a replay fills."""

    thresholds: Array
    scales: Array
    clipped: Array
    finite: Array
    skipped: Array


def replay(
    norms: Any,
    policy: Policy,
    *,
    nonfinite: str = "zero",
    progress: Progress | None = None,
) -> Replay:
    """Put a logged series of norms through a policy, by the code that training runs.

    Args:
      norms: norms before clipping, in the order of the steps, shape (steps,), >= 0.
        NaN and infinity are non-finite steps.
      policy: any policy that needs no parameter norms.
      nonfinite: what becomes of a non-finite step, as in `decide`.
      progress: what to wrap around the loop to show how far it is, such as `tqdm.tqdm`.

    Returns:
      A `Replay`: thresholds, scales, clip rate, spikes caught, recovery.

    Raises:
      TypeError: `policy` is not a policy, or the norms are not numbers.
      ValueError: there is no norm, one is negative, the series has two dimensions, or
        the policy needs the norms of parameters, which a series does not tell.

    >>> from autoclip_core import Quantile
    >>> report = replay([1.0, 2.0, 6.0, float("nan")], Quantile(0.5))
    >>> report.thresholds.tolist(), report.scales.tolist()
    ([inf, 1.0, 1.5, 2.0], [1.0, 0.5, 0.25, 0.0])
    >>> round(report.clip_rate, 3)
    0.667
    """
    check_policy(policy)
    if policy.needs_param_norms:
        way_out = "it can be watched in training only: see ClipLog"
        rule = "a policy of the gradient's norm alone"
        raise ValueError(format_error("policy", rule, policy, way_out))
    series = as_series(norms)
    size = len(series)
    kinds: list[type] = [np.float32, np.float32, np.bool_, np.bool_, np.bool_]
    taken = Taken(*(np.empty(size, kind) for kind in kinds))
    state = policy.init(1)
    starts = range(0, size, BLOCK)
    for start in progress(starts) if progress else starts:
        for at in range(start, min(start + BLOCK, size)):
            state, decision = decide(
                policy, state, series[at : at + 1], nonfinite=nonfinite
            )
            _, threshold, scale, clipped, finite, skipped = decision
            taken.thresholds[at] = threshold[0]
            taken.scales[at] = scale[0]
            taken.clipped[at] = clipped[0]
            taken.finite[at] = finite[0]
            taken.skipped[at] = skipped[0]
    return Replay(policy, series, *taken)


def as_series(norms: Any) -> Array:
    """Return a series of norms as float32; beyond its range a norm is infinite."""
    with np.errstate(over="ignore"):
        return as_float64(norms).astype(np.float32)


def as_float64(norms: Any) -> Array:
    """Return a series of norms as float64.

    Raises:
      TypeError: they are not real numbers.
      ValueError: there is none, one is negative, or there are two dimensions.
    """
    series = np.asarray(norms)
    if series.ndim != 1 or not series.size:
        way_out = "give one norm per step"
        raise ValueError(
            format_error("norms", "of shape (steps,)", series.shape, way_out)
        )
    if series.dtype.kind not in "fiu":
        raise TypeError(f"norms must be real numbers, got dtype {series.dtype}")
    negative = np.flatnonzero(series < 0)
    if negative.size:
        where = f"a norm is never negative; see step {negative[0]}"
        raise ValueError(
            format_error("norms", ">= 0", float(series[negative[0]]), where)
        )
    return series.astype(np.float64)
