"""Which norms a constant threshold is computed from, or why none is suggested."""

import numpy as np

from autoclip_core.log.formatting import format_number, format_percent
from autoclip_core.record.step import Array
from autoclip_core.series.diagnosis import MIN_STEPS, Diagnosis

from .reasons import quantile

SHORT = 0.1
"""A level that has at most this share of the steps changes p90 of all steps little."""

WITHHELD = {
    "never healthy": "No threshold and no policy are suggested, because there is no "
    "healthy part: check the first batches and the learning rate, or train with "
    "TrustClip, and log again.",
    "clipped": "No threshold is suggested: log the norms before clipping, which "
    "clip_grad_norm_ returns.",
}
"""The reasons of verdicts without numbers."""

CONSTANT = (
    "max_norm is p90 of the {share} of the steps {where} step {step}, {norm}; p90 of "
    "the others is {other}."
)

NO_CONSTANT = (
    "No constant fits both levels: p90 is {before} before step {step} and {after} "
    "since; the policy follows such a change. If the loss shows no damage, {after} is "
    "a constant for the steps since then."
)


def select_norms(
    diagnosis: Diagnosis, norms: Array, steps: Array
) -> tuple[Array | None, list[str]]:
    """Return the norms whose p90 is the constant, or None, and the reason.

    They are the healthy norms. After a change of level they are those before it if it
    is a fall or late, and those since if it is early. So 80 to 99 % of the healthy
    norms are below their p90, whether or not the change was damage.

    Args:
      diagnosis: of the whole series.
      norms: the series.
      steps: the step of each norm.
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
    if diagnosis.verdict != "shifted":
        return healthy, []
    is_before = np.cumsum(steps == diagnosis.step)[diagnosis.healthy] == 0
    return select_level(healthy[is_before], healthy[~is_before], diagnosis.step)


def select_level(
    before: Array, after: Array, step: int | None
) -> tuple[Array | None, list[str]]:
    """Return the norms of one of two levels, or None, and the reason."""
    share = len(before) / (len(before) + len(after))
    texts = [format_number(quantile(part, 0.9)) for part in (before, after)]
    is_fall = quantile(after, 0.5) < quantile(before, 0.5)
    if share > SHORT and not is_fall and share < 1 - SHORT:
        text = NO_CONSTANT.format(before=texts[0], after=texts[1], step=step)
        return None, [text]
    is_early = share <= SHORT
    text = CONSTANT.format(
        share=format_percent(1 - share if is_early else share),
        where="since" if is_early else "before",
        step=step,
        norm=texts[is_early],
        other=texts[not is_early],
    )
    return (after if is_early else before), [text]
