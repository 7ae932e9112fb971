"""Advice about the clip rate of a run and its mean scale."""

import re
from collections.abc import Mapping

from autoclip_core.record.totals import RunTotals

from .formatting import format_number, format_percent, format_rate
from .red_lights import MIN_STEPS
from .settings import find_policy, is_dry_run, name_argument, select_settings

HIGH_RATE, LOW_SCALE = 0.5, 0.3
"""A clip rate above this, or a mean scale below, changes the size of most steps. Of
updates only the scale counts: most may be bounded."""

MIN_ARMED = 90
"""Fewer steps with a threshold do not support a clip rate: the first steps have none.
"""

REGIMES = (
    ("Spike filter", 0.001, 0.02),
    ("Stabiliser", 0.05, 0.25),
    ("Normaliser", 0.5, 1.0),
    ("Moderate", 0.02, 0.05),
    ("High", 0.25, 0.5),
)
"""Ranges of the clip rate: name, lowest rate, highest rate. The first that fits
counts, so the limits of "moderate" and "high" belong to their neighbours."""

QUANTILES = {"Quantile", "QuantileClip", "StreamingQuantile", "TrustClip"}
"""Policies of the gradients whose clip rate aims at 1 - `quantile`."""


def advise_on_rate(
    totals: RunTotals,
    logged: Mapping[str, float] | None = None,
    settings: Mapping[str, str] | None = None,
    is_update: bool = False,
    has_several_rows: bool = False,
) -> list[str]:
    """Name the regime of the run, and what looks wrong.

    Args:
      totals: the totals of the recorded steps.
      logged: "steps" and "clip_rate" of the whole run, if metrics have them.
      settings: the settings of the log, which may name the policy.
      is_update: whether the norms are those of updates.
      has_several_rows: whether the clip rate is a share of the rows.
    """
    settings = settings or {}
    measured, armed = totals.counts["measured"], totals.counts["armed"]
    rate, mean_scale, total = totals.mean("clipped"), totals.mean("scale"), measured
    if logged and measured:  # the steps between the recorded ones were armed as often
        rate, total = logged["clip_rate"], int(logged["steps"])
        armed = round(armed / measured * total)
    if total < MIN_STEPS or armed < MIN_ARMED:
        return [explain_too_early(total, armed)]
    scale = f"mean scale {format_number(mean_scale)}"
    scale += f" over {measured} recorded steps" if total > measured else ""
    regime = name_regime(rate, total, is_update, has_several_rows)
    is_between = regime.startswith(("Moderate", "High"))
    aim = name_aim(select_settings(settings, is_update)) if is_between else ""
    advice = [f"{regime}, {scale}.{aim}"]
    if is_dry_run(settings, is_update):
        advice += explain_dry_run(rate, mean_scale, has_several_rows)
    elif is_update:
        advice += advise_on_bound(rate, mean_scale)
    else:
        advice += advise_on_high(rate, mean_scale, settings, has_several_rows)
    if total == measured and armed < 0.9 * measured:
        armed_rate = totals.sums["armed_clipped"] / armed
        advice += explain_unarmed(measured, armed, armed_rate, has_several_rows)
    return advice


def explain_unarmed(
    measured: int, armed: int, armed_rate: float, has_several_rows: bool
) -> list[str]:
    """Give the clip rate of the steps that had a threshold."""
    rate = format_rate(armed_rate, has_several_rows)
    return [
        f"{measured - armed} of {measured} steps had no threshold; over the other "
        f"{armed} the clip rate is {rate}."
    ]


def explain_dry_run(
    rate: float, mean_scale: float, has_several_rows: bool
) -> list[str]:
    """Say that the clip rate and the mean scale of a dry run are conditional."""
    share = format_rate(rate, has_several_rows)
    return [
        f"Nothing was clipped, because of dry_run=True: {share} would "
        f"be clipped, and the mean scale would be {format_number(mean_scale)}."
    ]


def advise_on_high(
    rate: float, mean_scale: float, settings: Mapping[str, str], has_several_rows: bool
) -> list[str]:
    """Say that clipping sets the size of most steps, if it does."""
    signs = []
    if rate > HIGH_RATE:
        share = format_rate(rate, has_several_rows)
        signs.append(f"clip rate {share} is above 50 %")
    if mean_scale < LOW_SCALE:
        signs.append(f"mean scale {format_number(mean_scale)} is below {LOW_SCALE:g}")
    if not signs:
        return []
    argument = name_argument(select_settings(settings, is_update=False))
    return [
        f"{' and '.join(signs).capitalize()}: under SGD this acts like a smaller "
        f"learning rate. Lower the learning rate instead, or raise {argument}. Under "
        "Adam and its variants, or if gradients explode, it can be intended."
    ]


def advise_on_bound(rate: float, mean_scale: float) -> list[str]:
    """Say what a bound that acts in most steps means for the learning rate."""
    if mean_scale < LOW_SCALE:
        return [
            "The bound sets the size of most steps, because the mean scale is below "
            f"{LOW_SCALE:g}: the learning rate is above what it allows. This is "
            "expected if TrustClip was added to a run that diverged. Lower the rate if "
            "the loss stops falling."
        ]
    if rate > HIGH_RATE:
        return [
            "A bound that acts in most steps is normal if the mean scale is above "
            f"{LOW_SCALE:g}."
        ]
    return []


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
    if measured < MIN_STEPS:
        return (
            f"Too early to judge: {measured} steps had a finite norm; a clip rate "
            f"needs at least {MIN_STEPS}."
        )
    if not armed:
        return (
            f"Nothing could be clipped: in all {measured} steps with a finite norm "
            "there was no threshold (warm-up, or no clipping)."
        )
    return (
        f"Too early to judge: {armed} of {measured} steps had a threshold; a clip "
        f"rate needs at least {MIN_ARMED}."
    )


def name_regime(
    rate: float, steps: int, is_update: bool = False, has_several_rows: bool = False
) -> str:
    """Name the regime of a clip rate, with the numbers that support it.

    Updates have none: a bound may act in each step.

    >>> name_regime(0.1, 5000)
    'Stabiliser (5 to 25 %): clip rate 10 % over 5000 steps'
    """
    basis = f"clip rate {format_rate(rate, has_several_rows)} over {steps} steps"
    if is_update and rate >= REGIMES[0][1]:
        return basis.capitalize()
    for name, low, high in REGIMES:
        if low <= rate <= high:
            return f"{name} ({100 * low:g} to {100 * high:g} %): {basis}"
    if steps < 1000:
        return f"Inert so far: {basis} (fewer than 1000 cannot show a rate of 0.1 %)"
    if is_update:
        return f"Inert: {basis}, below 0.1 %: the bound has almost no effect"
    return f"Inert: {basis}, below 0.1 %: the threshold has almost no effect, lower it"
