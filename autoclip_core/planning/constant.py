"""Which norms a constant threshold is computed from, or why none is suggested."""

import numpy as np

from autoclip_core.log.formatting import format_number, format_percent
from autoclip_core.record.statistics import quantile
from autoclip_core.record.step import Array
from autoclip_core.series.diagnosis import MIN_STEPS, Diagnosis

SHORT = 0.1
"""A part that has at most this share of the steps changes p90 of all little."""

LEAST, MOST = 0.8, 0.99
"""The share of the norms that a constant leaves unclipped, from LEAST to MOST."""

WITHHELD = {
    "never healthy": "No threshold and no policy are suggested, because there is no "
    "healthy part: check the first batches and the learning rate, and log again.",
    "clipped": "No threshold is suggested: log the norms before clipping, which "
    "clip_grad_norm_ returns.",
}
"""The reasons of verdicts without numbers."""

CONSTANT = (
    "max_norm is p90 of the {share} of the healthy steps before step {step}, {norm}; "
    "p90 of the others is {other}."
)

NO_CONSTANT = (
    "No constant fits all healthy steps: p90 is {norm} before step {step} and {other} "
    "since; the policy follows such a change. If the loss shows no damage, {other} is "
    "a constant for the steps since then."
)


def select_norms(
    diagnosis: Diagnosis, norms: Array, steps: Array
) -> tuple[Array | None, list[str]]:
    """Return the norms whose p90 is the constant, or None, and the reason.

    They are the healthy norms, or else those before another level. They are withheld
    unless 80 to 99 % of the healthy norms are below their p90, and of those before the
    first sign of damage, a spike or another level. So the constant fits whether or not
    that was damage.
    """
    healthy = norms[diagnosis.healthy]
    if diagnosis.verdict in WITHHELD:
        return None, [WITHHELD[diagnosis.verdict]]
    count = np.count_nonzero(healthy)
    if count < MIN_STEPS:
        reason = (
            f"No threshold is suggested: the healthy part has {count} norms above 0; "
            f"log at least {MIN_STEPS} steps, better 1000, after the warm-up of the "
            "learning rate."
        )
        return None, [reason]
    sign = diagnosis.sign
    if sign is None:
        return healthy, []
    is_before = np.flatnonzero(diagnosis.healthy) < sign
    is_shifted = diagnosis.verdict == "shifted"
    return select_part(healthy, is_before, is_shifted, int(steps[sign]))


def select_part(
    healthy: Array, is_before: Array, is_shifted: bool, step: int
) -> tuple[Array | None, list[str]]:
    """Return the norms whose p90 fits all of them and those before a step, or None."""
    before, after = healthy[is_before], healthy[~is_before]
    share = len(before) / len(healthy)
    if len(before) < MIN_STEPS or share <= SHORT:
        return healthy, []
    norm, other = (format_number(quantile(part, 0.9)) for part in (before, after))
    texts = {"share": format_percent(share), "norm": norm, "other": other, "step": step}
    for part in (healthy, before) if is_shifted else (healthy,):
        limit = quantile(part, 0.9)
        if all(LEAST <= np.mean(n <= limit) <= MOST for n in (healthy, before)):
            return part, [CONSTANT.format(**texts)] if part is before else []
    return None, [NO_CONSTANT.format(**texts)]
