"""Red lights: what went wrong in a run.

Each states the evidence, the suspected cause, and an action that the policy in use
allows.
"""

import re
from collections.abc import Iterable, Mapping

import numpy as np

from autoclip_core.record.step import Array, median
from autoclip_core.series.diagnosis import Diagnosis, diagnose

from .formatting import format_number, format_percent

MIN_STEPS = 100
"""Fewer steps than this do not support a red light."""

DIAGNOSED = 2048
"""Number of steps of the past that are diagnosed, and of the latest."""

LOW_SCALE = 0.3
"""A mean scale below this removes most of the gradient."""

ARGUMENTS = {
    **dict.fromkeys(("Quantile", "QuantileClip", "StreamingQuantile"), "quantile"),
    "TrustClip": "quantile",
    **dict.fromkeys(("MeanStd", "StandardClip"), "deviations"),
    **dict.fromkeys(("ZScore", "ZClip"), "z"),
    **dict.fromkeys(("EmaRatio", "AdaGC"), "ratio"),
    **dict.fromkeys(("Fixed", "NormClip"), "max_norm"),
    **dict.fromkeys(("ParamRatio", "AGC"), "clipping"),
    **{"TrustRatio": "clipping", "LARC": "trust_coefficient"},
    **{"ValueClip": "clip_value", "Scheduled": "the thresholds of the schedule"},
}
"""The argument that raises the threshold, by the name of a policy or a clipper."""

FOLLOWS_NO_NORM = {"Fixed", "NormClip", "ParamRatio", "AGC", "TrustRatio", "LARC"}
FOLLOWS_NO_NORM |= {"ValueClip", "Scheduled"}
"""Policies whose threshold does not depend on past norms."""


def find_policy(settings: Mapping[str, str]) -> str:
    """Return the policy or the clipper that the settings of a log name.

    `TrustClip` comes first, then the outermost that is no combinator; "" if there is
    none.

    >>> find_policy({"policy": "Cap(policy=ZScore(z=2.5), max_norm=1.0)"})
    'ZScore'
    """
    text = " ".join(settings.values())
    names = re.findall(r"\b[A-Z][A-Za-z]+(?=\()", text)
    if "TrustClip" in names:
        return "TrustClip"
    return next((name for name in names if name in ARGUMENTS), "")


def records_clipped_norms(settings: Mapping[str, str]) -> bool | None:
    """Return whether the policy records norms after clipping; None if it is unknown.

    >>> records_clipped_norms({"policy": "ZScore(z=2.5, record='applied')"})
    True
    >>> records_clipped_norms({"policy": "Quantile(quantile=0.5)"})
    False
    """
    policy = find_policy(settings)
    if policy in ("ZScore", "ZClip"):
        return any("record='applied'" in value for value in settings.values())
    return policy in ("EmaRatio", "AdaGC") if policy else None


def select_settings(settings: Mapping[str, str], is_update: bool) -> dict[str, str]:
    """Return the settings that can name the policy of the gradients, or of the updates.

    >>> settings = {"clipper": "UpdateClipper(ParamRatio(clipping=0.1))", "batch": "8"}
    >>> select_settings(settings, is_update=False)
    {'batch': '8'}
    """
    return {
        name: value
        for name, value in settings.items()
        if "TrustClip(" in value
        or is_update == ("UpdateClipper(" in value or "update" in name.lower())
    }


def is_dry_run(settings: Mapping[str, str], is_update: bool) -> bool:
    """Return whether the settings say that the clipper changed nothing.

    >>> is_dry_run({"clipper": "NormClip(max_norm=1.0, dry_run=True)"}, False)
    True
    """
    values = select_settings(settings, is_update).values()
    is_named = any("dry_run=True" in value for value in values)
    return is_named or settings.get("dry_run") == "True"


def name_argument(settings: Mapping[str, str]) -> str:
    """Return what to raise, so that the policy of the gradients clips less."""
    argument = ARGUMENTS.get(find_policy(settings), "the threshold")
    return argument if " " in argument else f"`{argument}`"


def warn_of_divergence(
    steps: Array, settings: Mapping[str, str], is_update: bool
) -> list[str]:
    """Say that the run diverged or was never healthy, if its norms show it."""
    table, diagnosis = diagnose_steps(steps)
    if diagnosis.verdict not in ("diverged", "never healthy", "non-finite"):
        return []
    policy = find_policy(settings)
    if is_update:
        cause = "The learning rate may be too high, or the data of that step broken."
        return [f"Red light: {diagnosis.sentence} {cause} {lower_rate(policy, True)}"]
    last = table[-DIAGNOSED // 10 :]
    rate = format_percent(float(last["clipped"].mean(dtype=np.float64)))
    verb = "would be" if is_dry_run(settings, is_update) else "were"
    cause = (
        "The learning rate may be too high, or the data of that step broken; of the "
        f"last {len(last)} steps {rate} {verb} clipped, and a threshold for the "
        "gradient does not bound the update."
    )
    return [f"Red light: {diagnosis.sentence} {cause} {lower_rate(policy, False)}"]


def diagnose_steps(steps: Array) -> tuple[Array, Diagnosis]:
    """Return the steps that a diagnosis is made from, and the diagnosis."""
    is_observed = np.isfinite(steps["norm"]) | ~steps["finite"]
    table = choose_steps(steps[is_observed])
    return table, diagnose(table["norm"], steps=table["step"])


def lower_rate(policy: str, is_update: bool) -> str:
    """Return the actions against a divergence that a policy allows."""
    if policy == "TrustClip":
        return "Lower the learning rate, or `ratio` of TrustClip."
    if is_update:
        return "Lower the learning rate, or the bound."
    bound = "bound the update with TrustClip"
    if policy in FOLLOWS_NO_NORM:
        return f"Lower the learning rate, or {bound}."
    return f"Lower the learning rate, {bound}, or set `max_threshold`."


def choose_steps(steps: Array) -> Array:
    """Return an even sample of the past, and the latest steps without a gap."""
    if len(steps) <= 2 * DIAGNOSED:
        return steps
    past, latest = steps[:-DIAGNOSED], steps[-DIAGNOSED:]
    stride = -(-len(past) // DIAGNOSED)
    chosen: Array = np.concatenate([past[::stride], latest])
    return chosen


def warn_of_ratchet(
    steps: Array, settings: Mapping[str, str], has_several_rows: bool
) -> list[str]:
    """Warn if the threshold fell while norms did not, and the clip rate rose.

    A policy that records norms before clipping cannot do that. If norms fall, the
    threshold must fall too. With several rows, threshold and norm are not of the same
    rows, so the policy must be one that records norms after clipping.
    """
    is_clipped = records_clipped_norms(settings)
    if is_clipped is False or (has_several_rows and not is_clipped):
        return []
    armed = steps[np.isfinite(steps["norm"]) & np.isfinite(steps["threshold"])]
    thirds = find_thirds(armed)
    if min(map(len, thirds)) < MIN_STEPS:
        return []
    before, after = (median(part["threshold"]) for part in thirds)
    norms = [median(part["norm"]) for part in thirds]
    low, high = (float(part["clipped"].mean(dtype=np.float64)) for part in thirds)
    if not (after < 0.7 * before and high > low + 0.1 and norms[1] > 0.9 * norms[0]):
        return []
    evidence = (
        "Red light: from the first third of the run to the last, the threshold fell "
        f"from {format_number(before)} to {format_number(after)}, although the median "
        f"norm went from {format_number(norms[0])} to {format_number(norms[1])}; the "
        f"clip rate rose from {format_percent(low)} to {format_percent(high)}."
    )
    return [f"{evidence} {explain_ratchet(find_policy(settings))}"]


def find_thirds(steps: Array) -> tuple[Array, Array]:
    """Return the steps of the first and of the last third of a run.

    They are thirds of the run, not of the array: most stored steps are recent.
    """
    if not len(steps):
        return steps, steps
    start, end = int(steps["step"][0]), int(steps["step"][-1]) + 1
    third = (end - start) / 3
    numbers = steps["step"]
    return steps[numbers < start + third], steps[numbers >= end - third]


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


def warn_of_low_scale(
    mean_scale: float, armed: int, settings: Mapping[str, str]
) -> list[str]:
    """Warn if clipping removes most of the gradient."""
    if armed < MIN_STEPS or not mean_scale < LOW_SCALE:
        return []
    return [
        f"Red light: mean scale {format_number(mean_scale)} is below {LOW_SCALE:g}: "
        "clipping removes most of the gradient. The threshold is far below the usual "
        f"norm, or the norms are too large. Raise {name_argument(settings)}, or lower "
        "the learning rate."
    ]


def find_red_lights(
    steps: Array,
    *,
    settings: Mapping[str, str],
    mean_scale: float,
    armed: int,
    has_several_rows: bool,
    is_update: bool,
) -> Iterable[str]:
    """Return the red lights of a run. A diverged run has no other one.

    A low mean scale of the updates is none: `advise_on_bound` explains it. Nor is that
    of a dry run, which removes nothing. The threshold of the updates follows the
    weights, so it may fall while they do not, unless the settings name another policy.

    Args:
      steps: the stored steps.
      settings: the settings of the log, which may name the policy.
      mean_scale: mean of norm after / norm before.
      armed: the steps with a finite norm and a threshold.
      has_several_rows: whether a step has several rows.
      is_update: whether the norms are those of updates.
    """
    has_effect = not (is_update or is_dry_run(settings, is_update))
    settings = select_settings(settings, is_update)
    divergence = warn_of_divergence(steps, settings, is_update)
    if divergence:
        return divergence
    return [
        *(warn_of_low_scale(mean_scale, armed, settings) if has_effect else []),
        *warn_of_ratchet(steps, settings, has_several_rows or is_update),
    ]
