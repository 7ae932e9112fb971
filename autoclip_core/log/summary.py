"""The summary of a run: its totals, rates and quantiles, ready to print."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from autoclip_core.record.row_counts import RowCounts
from autoclip_core.record.step import Array
from autoclip_core.record.store import Store

from . import advice
from .formatting import format_number, format_percent, wrap_text

RECENT_STEPS = 1000
"""Recorded steps that the recent clip rate covers."""


@dataclass(frozen=True)
class Summary:
    """What the clipper did in a run; `print` it.

    Rates and means are over the measured steps: those with a finite observed norm. They
    are NaN if there are none. A step of several rows counts as the fraction clipped.
    """

    steps: int
    """All recorded steps."""
    measured: int
    """Steps with a finite observed norm."""
    clip_rate: float
    """Mean clipped fraction, in [0, 1]."""
    recent_clip_rate: float
    """The same over the last 1000 recorded steps."""
    recent: int
    """How many of those steps were measured."""
    mean_scale: float
    """Mean of norm after / norm before."""
    mean_norm: float
    """Mean norm before clipping."""
    median_norm: float
    """Median norm before clipping. If the log is thinned, it and the next two fields
    have a relative error of up to 0.6 %."""
    p90_norm: float
    """The norm that 90 % of the steps do not exceed."""
    p99_norm: float
    """The norm that 99 % of the steps do not exceed."""
    max_norm: float
    """Largest finite norm before clipping."""
    nonfinite: int
    """Steps in which a norm was NaN or infinite."""
    skipped: int
    """Steps whose whole update was skipped."""
    dropped: int
    """Steps in which a row was dropped: set to 0, not scaled to a target."""
    worst_rows: tuple[tuple[str, float], ...]
    """Up to five rows with the highest clip rates, highest first; empty with a
    single row."""
    threshold: float
    """The latest threshold; +inf if there is none, NaN if nothing is recorded."""
    advice: tuple[str, ...]
    """Sentences, each with the numbers that support it."""

    def __str__(self) -> str:
        """Return one line per number, then the advice."""
        threshold = (
            "none" if self.threshold == math.inf else format_number(self.threshold)
        )
        lines = [
            f"total steps       {self.steps} ({self.measured} with a finite norm)",
            f"clip rate         {format_percent(self.clip_rate)} "
            f"({format_percent(self.recent_clip_rate)} over the last {self.recent})",
            f"mean scale        {format_number(self.mean_scale)}",
            f"mean norm         {format_number(self.mean_norm)}",
            f"norm quantiles    median {format_number(self.median_norm)}, "
            f"p90 {format_number(self.p90_norm)}, p99 {format_number(self.p99_norm)}",
            f"max norm          {format_number(self.max_norm)}",
            f"threshold now     {threshold}",
            f"non-finite steps  {self.nonfinite}",
            f"skipped steps     {self.skipped}",
        ]
        if self.dropped:
            lines.append(f"dropped steps     {self.dropped}")
        if self.worst_rows:
            worst = ", ".join(
                f"{n} {format_percent(rate)}" for n, rate in self.worst_rows
            )
            lines.append(f"most clipped rows {worst}")
        lines += self.advice
        return wrap_text("\n".join(lines))


def summarise(
    store: Store, rows: RowCounts, logged_totals: Mapping[str, int]
) -> Summary:
    """Return the summary of a log.

    Args:
      store: the steps and their totals.
      rows: the counts of the rows, if there are several.
      logged_totals: totals read from metrics, which also count steps that were not
        recorded; and "dropped", which is also counted from decisions.
    """
    steps, totals, counts = store.steps(), store.totals, store.totals.counts
    recent = store.recent()[-RECENT_STEPS:]
    recent = recent[np.isfinite(recent["norm"])]
    scale = totals.mean("scale")
    total = max(counts["steps"], logged_totals.get("steps", 0))
    nonfinite = max(counts["nonfinite"], logged_totals.get("nonfinite", 0))
    median, p90, p99 = norm_quantiles(store, steps)
    return Summary(
        steps=total,
        measured=counts["measured"],
        clip_rate=totals.mean("clipped"),
        recent_clip_rate=advice.mean(recent["clipped"]),
        recent=len(recent),
        mean_scale=scale,
        mean_norm=totals.mean("norm"),
        median_norm=median,
        p90_norm=p90,
        p99_norm=p99,
        max_norm=totals.largest if counts["measured"] else math.nan,
        nonfinite=nonfinite,
        skipped=max(counts["skipped"], logged_totals.get("skipped", 0)),
        dropped=logged_totals.get("dropped", 0),
        worst_rows=worst_rows(rows),
        threshold=float(steps["threshold"][-1]) if len(steps) else math.nan,
        advice=(
            *advice.advise_on_rate(counts, totals.sums, scale),
            *advice.advise_on_thresholds(steps),
            *advice.advise_on_rows(rows),
            *advice.advise_on_nonfinite(nonfinite, total),
        ),
    )


def norm_quantiles(store: Store, steps: Array) -> tuple[float, float, float]:
    """Return the median, p90 and p99 of the measured norms."""
    if store.is_thinned:
        quantile = store.totals.quantile
        return quantile(0.5), quantile(0.9), quantile(0.99)
    norms = steps["norm"][np.isfinite(steps["norm"])]
    if not norms.size:
        return math.nan, math.nan, math.nan
    median, p90, p99 = np.quantile(norms / 2, [0.5, 0.9, 0.99]).tolist()
    return 2 * median, 2 * p90, 2 * p99  # halved, so that no norm overflows


def worst_rows(rows: RowCounts, count: int = 5) -> tuple[tuple[str, float], ...]:
    """Return the names and clip rates of the rows that were clipped most often."""
    rates = np.nan_to_num(rows.rates())
    order = np.argsort(-rates, kind="stable")[:count].tolist()
    return tuple((rows.names[row], float(rates[row])) for row in order if rates[row])
