"""The summary of a run: its totals, rates and quantiles, ready to print."""

import math
from dataclasses import dataclass

import numpy as np

from autoclip_core.record.recorder import StepRecorder
from autoclip_core.record.row_counts import RowCounts
from autoclip_core.record.statistics import mean, quantile
from autoclip_core.record.step import Array
from autoclip_core.record.store import Store

from .advice import advise, has_rate_of_more
from .formatting import format_number, format_percent, format_rate, wrap_text

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
    """Mean clipped fraction, in [0, 1]; that of the metrics, if not each step
    was recorded."""
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

    recorded: int = 0
    """The steps that the log has read; metrics also count the others."""
    has_several_rows: bool = False
    """Whether a step has several rows: norms are then of all rows, and the threshold
    is that of the median row."""
    updates: "Summary | None" = None
    """The summary of the updates, if the metrics have both gradients and updates."""
    repeated: int = 0
    """The records that repeated a step, which are not counted in the other numbers."""

    def __str__(self) -> str:
        """Return one line per number, then the advice; the updates come last."""
        lines = [f"{name:<17} {value}" for name, value in self.rows()]
        lines += self.advice
        if self.updates is not None:
            lines = ["Gradients", *lines, "", "Updates", str(self.updates)]
        return wrap_text("\n".join(lines))

    def rows(self) -> list[tuple[str, str]]:
        """Return the names and the values of the numbers, formatted."""
        note = f"{self.measured} with a finite norm"
        if self.recorded < self.steps:
            note = f"{self.recorded} recorded, {note}"
        rate = format_rate(self.clip_rate, self.has_several_rows)
        recent = format_percent(self.recent_clip_rate)
        all_rows = " (all rows)" * self.has_several_rows
        rows = [
            ("total steps", f"{self.steps} ({note})"),
            ("clip rate", f"{rate} ({recent} over the last {self.recent})"),
            ("mean scale", format_number(self.mean_scale)),
            ("mean norm", format_number(self.mean_norm) + all_rows),
            (
                "norm quantiles",
                f"median {format_number(self.median_norm)}, "
                f"p90 {format_number(self.p90_norm)}, "
                f"p99 {format_number(self.p99_norm)}",
            ),
            ("max norm", format_number(self.max_norm)),
            ("threshold now", self._threshold()),
            ("non-finite steps", str(self.nonfinite)),
            ("skipped steps", str(self.skipped)),
        ]
        if self.dropped:
            rows.append(("dropped steps", str(self.dropped)))
        if self.repeated:
            cause = (
                "no update: gradients accumulate, or a loss scale skips updates that "
                "are not finite"
            )
            rows.append(("repeated records", f"{self.repeated} ({cause})"))
        if self.worst_rows:
            pairs = (f"{name} {format_percent(rate)}" for name, rate in self.worst_rows)
            rows.append(("most clipped rows", ", ".join(pairs)))
        return rows

    def _threshold(self) -> str:
        """Return the latest threshold, which with several rows is not of the norms."""
        if self.threshold == math.inf:
            return "none"
        return format_number(self.threshold) + " (median row)" * self.has_several_rows


def summarise(log: StepRecorder) -> Summary:
    """Return the summary of a log."""
    store, logged = log._store, log._run_totals()
    steps, totals, counts = store.steps(), store.totals, store.totals.counts
    recent = store.recent()[-RECENT_STEPS:]
    recent = recent[np.isfinite(recent["norm"])]
    run = {name: max(count, int(logged.get(name, 0))) for name, count in counts.items()}
    median, p90, p99 = measure_quantiles(store, steps)
    return Summary(
        steps=run["steps"],
        measured=counts["measured"],
        clip_rate=(
            logged["clip_rate"] if has_rate_of_more(log) else totals.mean("clipped")
        ),
        recent_clip_rate=mean(recent["clipped"]),
        recent=len(recent),
        mean_scale=totals.mean("scale"),
        mean_norm=totals.mean("norm"),
        median_norm=median,
        p90_norm=p90,
        p99_norm=p99,
        max_norm=totals.largest if counts["measured"] else math.nan,
        nonfinite=run["nonfinite"],
        skipped=run["skipped"],
        dropped=run["dropped"],
        worst_rows=find_worst_rows(log._rows),
        threshold=float(steps["threshold"][-1]) if len(steps) else math.nan,
        advice=tuple(advise(log)),
        recorded=counts["steps"],
        has_several_rows=log._has_several_rows,
        repeated=log._repeats.total,
        updates=None if log.updates is None else summarise(log.updates),
    )


def measure_quantiles(store: Store, steps: Array) -> tuple[float, ...]:
    """Return the median, p90 and p99 of the measured norms."""
    shares = 0.5, 0.9, 0.99
    if store.is_thinned:
        return tuple(store.totals.quantile(share) for share in shares)
    norms = steps["norm"][np.isfinite(steps["norm"])]
    return tuple(quantile(norms, share) for share in shares)


def find_worst_rows(rows: RowCounts, count: int = 5) -> tuple[tuple[str, float], ...]:
    """Return the names and clip rates of the rows that were clipped most often."""
    rates = np.nan_to_num(rows.rates())
    if len(rates) < 2:
        return ()
    order = np.argsort(-rates, kind="stable")[:count].tolist()
    return tuple((rows.names[row], float(rates[row])) for row in order if rates[row])
