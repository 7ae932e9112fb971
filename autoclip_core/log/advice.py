"""Advice about a run: sentences about its clip rate, thresholds and rows.

Each sentence contains the numbers that support it.
"""

import math
import re
from collections.abc import Mapping

import numpy as np

from autoclip_core.record.row_counts import RowCounts
from autoclip_core.record.step import Array

from .formatting import format_number, format_percent
from .red_lights import (
    LOW_SCALE,
    diagnose_steps,
    find_policy,
    is_dry_run,
    select_settings,
)

MIN_STEPS = 100
"""Fewer steps than this do not support a statement about the clip rate."""

REGIMES = (
    ("spike filter", 0.001, 0.02),
    ("moderate", 0.02, 0.05),
    ("stabiliser", 0.05, 0.25),
    ("high", 0.25, 0.5),
    ("normaliser", 0.5, 1.0),
)
"""Names of ranges of the clip rate: name, lowest rate, highest rate. The limits of
"moderate" and "high" belong to their neighbours."""

QUANTILES = {"Quantile", "QuantileClip", "StreamingQuantile", "TrustClip"}
"""Policies whose clip rate aims at 1 - `quantile`."""


def mean(values: Array) -> float:
    """Return the mean in float64; NaN if there are no values."""
    return float(values.mean(dtype=np.float64)) if values.size else math.nan


def advise_on_rate(
    counts: Mapping[str, int],
    sums: Mapping[str, float],
    mean_scale: float,
    logged: Mapping[str, float] | None = None,
    settings: Mapping[str, str] | None = None,
    is_update: bool = False,
) -> list[str]:
    """Name the regime of the run, and what looks wrong.

    Args:
      counts: the steps that are "measured" and "armed", as `Totals` counts them.
      sums: the sums of their clipped fractions: "clipped" and "armed_clipped".
      mean_scale: mean of norm after / norm before.
      logged: "steps" and "clip_rate" of the whole run, if metrics have them.
      settings: the settings of the log, which may name the policy.
      is_update: whether the norms are those of updates.
    """
    measured, armed = counts["measured"], counts["armed"]
    rate = sums["clipped"] / measured if measured else math.nan
    total = measured
    if logged and measured:  # the steps between the recorded ones were armed as often
        rate, total = logged["clip_rate"], int(logged["steps"])
        armed = round(armed / measured * total)
    if armed < MIN_STEPS:
        return [explain_too_early(total, armed)]
    scale = f"mean scale {format_number(mean_scale)}"
    scale += f" over {measured} recorded steps" if total > measured else ""
    regime = name_regime(rate, total, is_update)
    advice = [f"{regime}, {scale}."]
    if regime.startswith(("Moderate", "High")):
        advice[0] += name_aim(select_settings(settings or {}, is_update))
    if is_dry_run(settings or {}, is_update):
        advice += explain_dry_run(rate, mean_scale)
    elif is_update:
        advice += advise_on_bound(rate, mean_scale)
    else:
        advice += advise_on_high(rate)
    if total == measured and armed < 0.9 * measured:
        armed_rate = format_percent(sums["armed_clipped"] / armed)
        advice += [
            f"{measured - armed} of {measured} steps had no threshold; over the other "
            f"{armed} the clip rate is {armed_rate}."
        ]
    return advice


def explain_dry_run(rate: float, mean_scale: float) -> list[str]:
    """Say that the clip rate and the mean scale of a dry run are conditional."""
    return [
        f"Nothing was clipped, because of dry_run=True: {format_percent(rate)} would "
        f"be clipped, and the mean scale would be {format_number(mean_scale)}."
    ]


def advise_on_bound(rate: float, mean_scale: float) -> list[str]:
    """Say that the bound of the updates sets the size of most steps, if it does.

    This is no red light: it is what the bound does if the learning rate is too high.
    """
    if not (rate > 0.5 or mean_scale < LOW_SCALE):
        return []
    return [
        "The bound sets the size of most steps: the learning rate is above what it "
        "allows. This is expected if TrustClip was added to a run that diverged. Lower "
        "the rate if the loss stops falling."
    ]


def advise_on_high(rate: float) -> list[str]:
    """Say that most gradients are clipped, if they are."""
    if not rate > 0.5:
        return []
    return [
        f"Clip rate {format_percent(rate)} is above 50 %: under SGD this acts "
        "like a smaller learning rate, so lower the learning rate instead. Under "
        "Adam and its variants, or if gradients explode, it can be intended."
    ]


def name_aim(settings: Mapping[str, str]) -> str:
    """Return the clip rate that a quantile aims at; "" for any other policy.

    >>> name_aim({"policy": "Quantile(quantile=0.9)"})
    ' A quantile of 0.9 aims at 10 %.'
    """
    text = " ".join(settings.values())
    match = re.search(r"\bquantile=([01](?:\.\d+)?)\b", text)
    is_changed = re.search(r"\b(Warmup|Cap|Floor|Drop)\(|max_threshold=", text)
    if match is None or is_changed or find_policy(settings) not in QUANTILES:
        return ""
    aim = format_percent(1 - float(match[1]))
    return f" A quantile of {match[1]} aims at {aim}."


def explain_too_early(measured: int, armed: int) -> str:
    """Explain why the clip rate cannot be judged yet."""
    if measured >= MIN_STEPS and not armed:
        return (
            f"Nothing could be clipped: in all {measured} steps with a finite norm "
            "there was no threshold (warm-up, or no clipping)."
        )
    return (
        f"Too early to judge: {armed} steps had a finite norm and a threshold; a "
        f"clip rate needs at least {MIN_STEPS}."
    )


def name_regime(rate: float, steps: int, is_update: bool = False) -> str:
    """Name the regime of a clip rate, with the numbers that support it.

    >>> name_regime(0.1, 5000)
    'Stabiliser (5 to 25 %): clip rate 10 % over 5000 steps'
    """
    basis = f"clip rate {format_percent(rate)} over {steps} steps"
    inner = "moderate", "high"
    for name, low, high in REGIMES:
        if low < rate < high or (name not in inner and rate in (low, high)):
            return f"{name.capitalize()} ({100 * low:g} to {100 * high:g} %): {basis}"
    if steps < 1000:
        return f"Inert so far: {basis} (fewer than 1000 cannot show a rate of 0.1 %)"
    if is_update:
        return f"Inert: {basis}, below 0.1 %: the bound has almost no effect"
    return f"Inert: {basis}, below 0.1 %: the threshold has almost no effect, lower it"


def advise_on_level(steps: Array) -> list[str]:
    """Name a lasting change of the level of gradient norms, which is no red light."""
    diagnosis = diagnose_steps(steps)[1]
    return [diagnosis.sentence] if diagnosis.verdict == "shifted" else []


def advise_on_nonfinite(nonfinite: int, steps: int) -> list[str]:
    """Name the number of NaN and infinite norms and their usual causes, if any."""
    if not nonfinite:
        return []
    return [
        f"{nonfinite} of {steps} steps ({format_percent(nonfinite / steps)}) had a NaN "
        "or infinite norm, which no threshold repairs: check the loss, the data of "
        "these steps and, in float16, the loss scale."
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
