"""Advice about a run: sentences about its clip rate, thresholds and rows.

Each sentence contains the numbers that support it.
"""

import math
from collections.abc import Mapping

import numpy as np

from autoclip_core.record.row_counts import RowCounts
from autoclip_core.record.step import Array

from .formatting import format_number, format_percent
from .red_lights import diagnose_steps

MIN_STEPS = 100
"""Fewer steps than this do not support a statement about the clip rate."""

REGIMES = (
    ("spike filter", 0.001, 0.02),
    ("stabiliser", 0.05, 0.25),
    ("normaliser", 0.5, 1.0),
)
"""Names of ranges of the clip rate: name, lowest rate, highest rate."""


def mean(values: Array) -> float:
    """Return the mean in float64; NaN if there are no values."""
    return float(values.mean(dtype=np.float64)) if values.size else math.nan


def advise_on_rate(
    counts: Mapping[str, int],
    sums: Mapping[str, float],
    mean_scale: float,
    logged: Mapping[str, float] | None = None,
) -> list[str]:
    """Name the regime of the run, and what looks wrong.

    Args:
      counts: the steps that are "measured" and "armed", as `Totals` counts them.
      sums: the sums of their clipped fractions: "clipped" and "armed_clipped".
      mean_scale: mean of norm after / norm before.
      logged: "steps" and "clip_rate" of the whole run, if metrics have them.
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
    advice = [f"{name_regime(rate, total)}, {scale}."]
    if rate > 0.5:
        advice += [
            f"Clip rate {format_percent(rate)} is above 50 %: under SGD this acts "
            "like a smaller learning rate, so lower the learning rate instead. Under "
            "Adam and its variants, or if gradients explode, it can be intended."
        ]
    if total == measured and armed < 0.9 * measured:
        armed_rate = format_percent(sums["armed_clipped"] / armed)
        advice += [
            f"{measured - armed} of {measured} steps had no threshold; over the other "
            f"{armed} the clip rate is {armed_rate}."
        ]
    return advice


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


def name_regime(rate: float, steps: int) -> str:
    """Name the regime of a clip rate, with the numbers that support it.

    >>> name_regime(0.1, 5000)
    'Stabiliser (5 to 25 %): clip rate 10 % over 5000 steps'
    """
    names = [f"{name} ({100 * a:g} to {100 * b:g} %)" for name, a, b in REGIMES]
    within = [n for n, (_, a, b) in zip(names, REGIMES, strict=True) if a <= rate <= b]
    below = sum(rate > b for _, _, b in REGIMES)
    basis = f"clip rate {format_percent(rate)} over {steps} steps"
    if within:
        return f"{within[0].capitalize()}: {basis}"
    if below:
        return f"Between {names[below - 1]} and {names[below]}: {basis}"
    if steps < 1000:
        return f"Inert so far: {basis} (fewer than 1000 cannot show a rate of 0.1 %)"
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
