"""What a run's numbers say: a summary to print, and advice that names its numbers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from autoclip_core.record.row_counts import RowCounts
from autoclip_core.record.store import Store

Array = npt.NDArray[Any]

ENOUGH = 100
"""Steps below which a clipping rate says nothing."""

LATELY = 1000
"""Recorded steps whose clipping rate is the recent one."""

REGIMES = (
    ("spike filter", 0.001, 0.02),
    ("stabiliser", 0.05, 0.25),
    ("normaliser", 0.5, 1.0),
)
"""What a clipping rate stands for: name, lowest rate, highest rate."""


@dataclass(frozen=True)
class Summary:
    """What the clipper did in a run; `print` it.

    Rates and means are over the measured steps, those with a finite observed norm, and
    NaN where there is none. A step of several rows counts as the fraction clipped.
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
    """How many of those were measured."""
    mean_scale: float
    """Mean of norm after / norm before."""
    mean_norm: float
    """Mean norm before clipping."""
    median_norm: float
    """Median norm before clipping; of a thinned log to 0.6 %, as the next two."""
    p90_norm: float
    """The norm that 90 % of the steps do not exceed."""
    p99_norm: float
    """The norm that 99 % of the steps do not exceed."""
    max_norm: float
    """Largest finite norm before clipping."""
    nonfinite: int
    """Steps in which a norm was NaN or infinite."""
    skipped: int
    """Steps whose whole update was cancelled."""
    worst_rows: tuple[tuple[str, float], ...]
    """Up to five rows by clipping rate, the highest first; empty with a single row."""
    threshold: float
    """The latest threshold; +inf where there is none, NaN where nothing is recorded."""
    advice: tuple[str, ...]
    """Sentences, each with the numbers it rests on."""

    def __str__(self) -> str:
        """Return the numbers line by line, then the advice."""
        threshold = "none" if self.threshold == math.inf else number(self.threshold)
        lines = [
            f"total steps       {self.steps} ({self.measured} with a finite norm)",
            f"clipping rate     {percent(self.clip_rate)} "
            f"({percent(self.recent_clip_rate)} over the last {self.recent})",
            f"mean scale        {number(self.mean_scale)}",
            f"mean norm         {number(self.mean_norm)}",
            f"norm quantiles    median {number(self.median_norm)}, "
            f"p90 {number(self.p90_norm)}, p99 {number(self.p99_norm)}",
            f"max norm          {number(self.max_norm)}",
            f"threshold now     {threshold}",
            f"non-finite steps  {self.nonfinite}",
            f"skipped steps     {self.skipped}",
        ]
        if self.worst_rows:
            worst = ", ".join(f"{n} {percent(rate)}" for n, rate in self.worst_rows)
            lines.append(f"most clipped rows {worst}")
        lines += self.advice
        return "\n".join(lines)


def summarise(store: Store, rows: RowCounts, told: Mapping[str, int]) -> Summary:
    """Return what the steps of a log say.

    Args:
      store: the steps and their totals.
      rows: the counts of the rows, if there are several.
      told: totals that logged metrics brought along, for the steps in between.
    """
    kept, totals, counts = store.kept(), store.totals, store.totals.counts
    recent = store.recent()[-LATELY:]
    recent = recent[np.isfinite(recent["norm"])]
    scale = totals.mean("scale")
    steps = max(counts["steps"], told.get("steps", 0))
    nonfinite = max(counts["nonfinite"], told.get("nonfinite", 0))
    median, p90, p99 = norm_quantiles(store, kept)
    return Summary(
        steps=steps,
        measured=counts["measured"],
        clip_rate=totals.mean("clipped"),
        recent_clip_rate=mean(recent["clipped"]),
        recent=len(recent),
        mean_scale=scale,
        mean_norm=totals.mean("norm"),
        median_norm=median,
        p90_norm=p90,
        p99_norm=p99,
        max_norm=totals.largest if counts["measured"] else math.nan,
        nonfinite=nonfinite,
        skipped=max(counts["skipped"], told.get("skipped", 0)),
        worst_rows=worst_rows(rows),
        threshold=float(kept["threshold"][-1]) if len(kept) else math.nan,
        advice=(
            *advise_on_rate(counts, totals.sums, scale),
            *advise_on_thresholds(kept),
            *advise_on_rows(rows),
            *advise_on_nonfinite(nonfinite, steps),
        ),
    )


def norm_quantiles(store: Store, kept: Array) -> tuple[float, float, float]:
    """Return the median, p90 and p99 of the measured norms."""
    if store.thinned:
        q = store.totals.quantile
        return q(0.5), q(0.9), q(0.99)
    norms = kept["norm"][np.isfinite(kept["norm"])]
    if not norms.size:
        return math.nan, math.nan, math.nan
    median, p90, p99 = np.quantile(norms / 2, [0.5, 0.9, 0.99]).tolist()
    return 2 * median, 2 * p90, 2 * p99  # norms near the largest float do not overflow


def worst_rows(rows: RowCounts, most: int = 5) -> tuple[tuple[str, float], ...]:
    """Return the rows that were clipped most often, and how often."""
    rates = np.nan_to_num(rows.rates())
    order = np.argsort(-rates, kind="stable")[:most].tolist()
    return tuple((rows.names[row], float(rates[row])) for row in order if rates[row])


def mean(values: Array) -> float:
    """Return the mean in float64; NaN of nothing."""
    return float(values.mean(dtype=np.float64)) if values.size else math.nan


def percent(rate: float) -> str:
    """Return a rate in [0, 1] as a person writes it."""
    return "unknown" if math.isnan(rate) else f"{100 * rate:.3g} %"


def number(value: float) -> str:
    """Return a number as a person writes it."""
    return "unknown" if math.isnan(value) else f"{value:.4g}"


def advise_on_rate(
    counts: Mapping[str, int], sums: Mapping[str, float], mean_scale: float
) -> list[str]:
    """Say which regime the run is in and what looks wrong.

    Args:
      counts: how many steps were measured, and how many of them had a threshold.
      sums: their clipped fractions, added up.
      mean_scale: mean of norm after / norm before.
    """
    measured, able = counts["measured"], counts["armed"]
    rate = sums["clipped"] / measured if measured else math.nan
    if able < ENOUGH:
        return [too_early(measured, able)]
    advice = [f"{regime(rate, measured)}, mean scale {number(mean_scale)}."]
    if rate > 0.5:
        advice += [
            f"Clipping rate {percent(rate)} is above 50 %: under SGD this is a smaller "
            "learning rate by another name, so lower the learning rate instead. Under "
            "Adam and its kin, or where gradients explode, it can be meant."
        ]
    if mean_scale < 0.3:
        advice += [
            f"Red light: mean scale {number(mean_scale)} is below 0.3, most of the "
            "gradient is removed: raise the threshold or lower the learning rate."
        ]
    if able < 0.9 * measured:
        advice += [
            f"{measured - able} of {measured} steps had no threshold; over the other "
            f"{able} the clipping rate is {percent(sums['armed_clipped'] / able)}."
        ]
    return advice


def too_early(measured: int, able: int) -> str:
    """Say why a clipping rate says nothing yet."""
    if measured >= ENOUGH and not able:
        return (
            f"Nothing could be clipped: in all {measured} steps with a finite norm "
            "there was no threshold (warm-up, or no clipping)."
        )
    return (
        f"Too early to judge: {able} steps had a finite norm and a threshold; a "
        f"clipping rate needs at least {ENOUGH}."
    )


def regime(rate: float, steps: int) -> str:
    """Name what a clipping rate stands for, with the numbers it rests on.

    >>> regime(0.1, 5000)
    'Stabiliser (5 to 25 %): clipping rate 10 % over 5000 steps'
    """
    names = [f"{name} ({100 * a:g} to {100 * b:g} %)" for name, a, b in REGIMES]
    within = [n for n, (_, a, b) in zip(names, REGIMES, strict=True) if a <= rate <= b]
    below = sum(rate > b for _, _, b in REGIMES)
    basis = f"clipping rate {percent(rate)} over {steps} steps"
    if within:
        return f"{within[0].capitalize()}: {basis}"
    if below:
        return f"Between {names[below - 1]} and {names[below]}: {basis}"
    if steps < 1000:
        return f"Inert so far: {basis} (fewer than 1000 cannot show a rate of 0.1 %)"
    return f"Inert: {basis}, below 0.1 %: the threshold does next to nothing, lower it"


def advise_on_nonfinite(nonfinite: int, steps: int) -> list[str]:
    """Say what NaN and infinite norms mean, if there were any."""
    if not nonfinite:
        return []
    return [
        f"{nonfinite} of {steps} steps ({percent(nonfinite / steps)}) had a NaN or "
        "infinite norm, which no threshold mends: look at the loss, the data of those "
        "steps and, in float16, the loss scale."
    ]


def advise_on_thresholds(kept: Array) -> list[str]:
    """Say so if the threshold ran away, up or down, while much was clipped."""
    armed = kept[np.isfinite(kept["norm"]) & np.isfinite(kept["threshold"])]
    if len(armed) < ENOUGH:
        return []
    # By step and not by place: of a long run mostly the recent steps are kept.
    start, end = int(armed["step"][0]), int(armed["step"][-1]) + 1
    third = (end - start) / 3
    first = armed[armed["step"] < start + third]
    last = armed[armed["step"] >= end - third]
    if not len(first) or not len(last):
        return []
    return [*advise_on_climb(first, last), *advise_on_ratchet(first, last)]


def advise_on_climb(first: Array, last: Array) -> list[str]:
    """Say so if the threshold rose, and yet most steps were clipped."""
    before, after = (float(np.median(part["threshold"])) for part in (first, last))
    rate = mean(last["clipped"])
    if not (after > 10 * before and rate > 0.5):
        return []
    return [
        f"Red light: from the first third of the run to the last, the threshold rose "
        f"from {number(before)} to {number(after)}, and {percent(rate)} of the last "
        "steps were clipped: the run may be diverging, and the threshold follows it; "
        "lower the learning rate, or bound the threshold."
    ]


def advise_on_ratchet(first: Array, last: Array) -> list[str]:
    """Say so if the threshold fell while more and more steps were clipped."""
    if min(len(first), len(last)) < ENOUGH:
        return []
    before, after = (float(np.median(part["threshold"])) for part in (first, last))
    low, high = mean(first["clipped"]), mean(last["clipped"])
    if not (after < 0.7 * before and high > low + 0.1):
        return []
    return [
        f"Red light: from the first third of the run to the last, the threshold fell "
        f"from {number(before)} to {number(after)} while the clipping rate rose from "
        f"{percent(low)} to {percent(high)}: the policy may be learning what it has "
        "clipped, which only falls; record raw or winsorized norms."
    ]


def advise_on_rows(rows: RowCounts) -> list[str]:
    """Say so if one row owns most of the clips."""
    clips = rows.clips()
    total = int(clips.sum())
    if len(clips) < 2 or total < ENOUGH or clips.max() <= 0.5 * total:
        return []
    row = int(clips.argmax())
    return [
        f"One row owns {percent(clips[row] / total)} of the {total} clips of "
        f"{len(clips)} rows: {rows.names[row]}; look at that layer, give it its own "
        "policy, or exclude it."
    ]
