"""Advice about a run: sentences, each with the numbers that support it."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from autoclip_core.record.recorder import StepRecorder
from autoclip_core.record.repeats import Repeats
from autoclip_core.record.row_counts import RowCounts
from autoclip_core.record.statistics import median
from autoclip_core.record.step import Array
from autoclip_core.series.ratchet import find_ratchet

from .formatting import format_number, format_percent
from .rate_advice import advise_on_rate
from .red_lights import MIN_STEPS, diagnose_steps, find_red_lights
from .settings import (
    WARMUP,
    find_policy,
    is_dry_run,
    records_clipped_norms,
    select_settings,
)


def advise(log: StepRecorder) -> Iterator[str]:
    """Yield the advice about a run."""
    totals, logged, is_update = log._store.totals, log._run_totals(), log._is_of_updates
    run = logged if has_rate_of_more(log) else None
    yield from advise_on_rate(
        totals, run, log.settings, is_update, log._has_several_rows
    )
    yield from warn_of_no_update(log._repeats, len(log))
    table, diagnosis = diagnose_steps(steps := log._store.steps())
    is_bounded = is_update or log.updates is not None
    settings = select_settings(log.settings, is_update)
    has_other_clipper = "other_clippers" in logged
    kind = is_update, is_bounded, has_other_clipper
    yield from find_red_lights(table, diagnosis, log.settings, *kind)
    yield from advise_on_start(table, diagnosis.spikes, is_bounded)
    yield from advise_on_ratchet(steps, settings, log._has_several_rows or is_update)
    # The level of updates follows the learning rate.
    if not is_update and diagnosis.verdict in ("shifted", "vanished"):
        yield diagnosis.sentence
    yield from advise_on_rows(log._rows)
    counts = logged if {"nonfinite", "steps"} <= logged.keys() else totals.counts
    yield from advise_on_nonfinite(int(counts["nonfinite"]), int(counts["steps"]))
    if not is_dry_run(log.settings, is_update):
        yield from advise_on_skips(counts)


def warn_of_no_update(repeats: Repeats, steps: int) -> list[str]:
    """Say that the run ended without updates, unless gradients accumulate as before."""
    usual = (repeats.total - repeats.latest) / max(1, steps)
    if repeats.latest < max(MIN_STEPS, 10 * usual):
        return []
    return [
        f"Red light: the last {repeats.latest} records repeat one step: there was no "
        "update. If a loss scale skips each update, no gradient is finite: check the "
        "loss and the data. Otherwise another optimizer steps, or each step begins "
        "with a new state of the clipper."
    ]


def has_rate_of_more(log: StepRecorder) -> bool:
    """Return whether metrics have the clip rate of more steps than were recorded."""
    logged = log._run_totals()
    return "clip_rate" in logged and logged.get("steps", 0) > len(log)


def advise_on_start(steps: Array, spikes: Sequence[int], is_bounded: bool) -> list[str]:
    """Name the largest spike before the first threshold, which nothing clipped."""
    is_armed = np.isfinite(steps["threshold"])
    first_armed = int(is_armed.argmax()) if is_armed.any() else 0
    start = steps["norm"][:first_armed]
    passed = start[np.isin(steps["step"][:first_armed], spikes)]
    if not passed.size:
        return []
    later = steps["norm"][is_armed]
    typical = format_number(median(later[np.isfinite(later)]))
    evidence = (
        f"A spike of {format_number(passed.max())} came before the first threshold and "
        f"was not clipped; the median norm after it is {typical}."
    )
    return [evidence if is_bounded else f"{evidence} To clip it, {WARMUP}."]


def advise_on_ratchet(
    steps: Array, settings: Mapping[str, str], has_several_rows: bool
) -> list[str]:
    """Name a threshold that fell while norms did not, and a clip rate that rose.

    With several rows, threshold and norm are not of the same rows, so the policy must
    be one that records norms after clipping.
    """
    is_clipped = records_clipped_norms(settings)
    if is_clipped is False or (has_several_rows and not is_clipped):
        return []
    ratchet = find_ratchet(steps)
    if ratchet is None:
        return []
    before, after = map(format_number, ratchet.thresholds)
    first, last = map(format_number, ratchet.norms)
    low, high = map(format_percent, ratchet.clip_rates)
    evidence = (
        "From the first third of the run to the last, the threshold fell from "
        f"{before} to {after}, although the median norm went from {first} to {last}; "
        f"the clip rate rose from {low} to {high}."
    )
    return [f"{evidence} {explain_ratchet(find_policy(settings))}"]


def explain_ratchet(policy: str) -> str:
    """Return the cause of a falling threshold, and the action that a policy allows."""
    if policy in ("EmaRatio", "AdaGC"):
        return (
            f"{policy} records norms after clipping, which draws the threshold down. "
            "Raise `ratio`, or take a quantile, which records norms before clipping."
        )
    if policy in ("ZScore", "ZClip"):
        return (
            f"{policy} records norms after clipping, which draws the threshold down. "
            "Set record='winsorized'."
        )
    return (
        "The threshold may follow norms after clipping, which can only fall. Give the "
        "policy the norms before clipping."
    )


def advise_on_nonfinite(nonfinite: int, steps: int) -> list[str]:
    """Name the number of NaN and infinite norms and their usual causes, if any."""
    if not nonfinite:
        return []
    return [
        f"{nonfinite} of {steps} steps ({format_percent(nonfinite / steps)}) had a NaN "
        "or infinite norm, which no threshold repairs: check the loss, the data of "
        "these steps and, in float16, the loss scale."
    ]


def advise_on_skips(counts: Mapping[str, float]) -> list[str]:
    """Say that most updates were skipped, and not because of a NaN or infinity."""
    steps, skipped = int(counts["steps"]), int(counts.get("skipped", 0))
    if steps < MIN_STEPS or skipped - counts["nonfinite"] <= 0.5 * steps:
        return []
    return [
        f"{skipped} of {steps} updates ({format_percent(skipped / steps)}) were "
        "skipped: the run hardly trains. Raise the level above which the policy skips, "
        "or check the loss and the data."
    ]


def advise_on_rows(rows: RowCounts) -> list[str]:
    """Warn if more than half of the clips are of one row."""
    clips = rows.clips()
    total = int(clips.sum())
    if len(clips) < 2 or total < MIN_STEPS or clips.max() <= 0.5 * total:
        return []
    row = int(clips.argmax())
    return [
        f"One row has {format_percent(clips[row] / total)} of the {total} clips of "
        f"{len(clips)} rows: {rows.names[row]}. Check that layer, give it its own "
        "policy, or exclude it."
    ]
