"""Red lights: the norms of a run show damage, or another clip before this one.

Each states the evidence, the suspected cause, and an action that the policy in use
allows. What a policy does in a healthy run, too, is no red light: see `advice.py`.
"""

from collections.abc import Mapping

import numpy as np

from autoclip_core.clipper.metrics_checks import find_repeated_limit
from autoclip_core.record.statistics import mean
from autoclip_core.record.step import Array
from autoclip_core.series.ceiling import CLOSE, find_ceiling, has_norm_above
from autoclip_core.series.diagnosis import Diagnosis, diagnose

from .formatting import format_number, format_percent
from .settings import (
    CAP,
    FOLLOWS_NO_NORM,
    TRUST,
    find_policy,
    is_dry_run,
    select_settings,
)

MIN_STEPS = 100
"""Fewer steps do not support the advice of a summary."""

OTHER_CLIP = (
    "Remove the other clip, or log the norms before it. If it is a clipper of this "
    "package, too, record metrics, which say so."
)
"""The action against another clip. A decision does not show whose it is."""

DIAGNOSED = 2048
"""Number of steps of the past that are diagnosed, and of the latest."""


def find_red_lights(
    table: Array,
    diagnosis: Diagnosis,
    settings: Mapping[str, str],
    is_update: bool,
    is_bounded: bool = False,
    has_other_clipper: bool = False,
) -> list[str]:
    """Say if the norms show damage, or that another clip acts before this one.

    If another clipper of this package may act first, its limit is no red light.
    """
    is_dry = is_dry_run(settings, is_update)
    lights = []
    if not (is_update or is_dry or has_other_clipper):
        lights = warn_of_other_clip(table["norm"], diagnosis)
    if diagnosis.verdict not in ("diverged", "never healthy", "non-finite"):
        return lights
    policy = find_policy(select_settings(settings, is_update))
    cause = "The learning rate may be too high, or the data of that step broken"
    if not is_update:
        last = table[-DIAGNOSED // 10 :]
        rate = format_percent(mean(last["clipped"]))
        verb = "would be" if is_dry else "was"
        cause += (
            f"; the clip rate of the last {len(last)} steps {verb} {rate}, and a "
            "threshold for the gradient does not bound the update"
        )
    action = lower_rate(policy, is_update or is_bounded, is_dry)
    return [*lights, f"Red light: {diagnosis.sentence} {cause}. {action}"]


def warn_of_other_clip(norms: Array, diagnosis: Diagnosis) -> list[str]:
    """Say that another clip acts before this one, if the norms show it.

    They stop at its limit, or lie next to it again and again. A dry run may measure
    what another clip left, and an optimizer may normalize the update.
    """
    if diagnosis.verdict == "clipped" and (lights := find_cut(norms)):
        return lights
    limit = find_repeated_limit(norms.tolist())
    if limit is None:
        return []
    return [
        "Red light: the gradients were clipped or normalized before: some norms are "
        f"{format_number(limit)} again and again. {OTHER_CLIP}"
    ]


def find_cut(norms: Array) -> list[str]:
    """Say where norms stop that another clip has cut off; none is above.

    Equal norms show no other clip: the gradient may never change.
    """
    logs = np.log(norms[np.isfinite(norms) & (norms > 0)].astype(np.float64))
    ceiling = find_ceiling(logs)
    if ceiling is None or len(norms) < MIN_STEPS or np.ptp(logs) == 0:
        return []
    if has_norm_above(norms, np.full(len(norms), ceiling)):
        return []
    count = int(np.sum(abs(logs - np.log(ceiling)) <= CLOSE))
    return [
        "Red light: the gradients were clipped before: the norm is "
        f"{format_number(ceiling)} in {count} of {len(norms)} steps. {OTHER_CLIP}"
    ]


def diagnose_steps(steps: Array) -> tuple[Array, Diagnosis]:
    """Return the steps that a diagnosis is made from, and the diagnosis."""
    is_observed = np.isfinite(steps["norm"]) | ~steps["finite"]
    table = choose_steps(steps[is_observed])
    return table, diagnose(table["norm"], steps=table["step"])


def lower_rate(policy: str, is_bounded: bool, is_dry: bool) -> str:
    """Return the actions against a divergence that a policy allows."""
    if is_dry and (is_bounded or policy == "TrustClip"):
        return "Set dry_run=False, so that the update is bounded, or lower the rate."
    if policy == "TrustClip":
        return "Lower the learning rate, or `ratio` of TrustClip."
    if is_bounded:
        dry = "" if policy else "; after a dry run, set dry_run=False"
        return f"Lower the learning rate, or the bound{dry}."
    if policy in FOLLOWS_NO_NORM:
        return f"Lower the learning rate, or {TRUST}."
    return f"Lower the learning rate, {TRUST}, or {CAP}."


def choose_steps(steps: Array) -> Array:
    """Return an even sample of the past, and the latest steps without a gap."""
    if len(steps) <= 2 * DIAGNOSED:
        return steps
    past, latest = steps[:-DIAGNOSED], steps[-DIAGNOSED:]
    stride = -(-len(past) // DIAGNOSED)
    chosen: Array = np.concatenate([past[::stride], latest])
    return chosen
