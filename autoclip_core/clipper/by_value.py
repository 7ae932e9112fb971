"""The decision of clipping by value, which limits each element without a policy."""

import numpy as np

from autoclip_core.decision import Decision, find_skips
from autoclip_core.loss import LossDecision
from autoclip_core.scale import XP, Array, as_norms


def decide_by_value(
    norms: Array,
    after: Array,
    changed: Array,
    *,
    thresholds: Array,
    observed: Array,
    nonfinite: str = "zero",
    loss: LossDecision | None = None,
    xp: XP = np,
) -> Decision:
    """Return the decision that describes the effect of clamping the elements.

    Args:
      norms: each row's norm before clamping, shape (rows,).
      after: each row's norm after clamping.
      changed: whether any element of the row changes.
      thresholds: the largest magnitude that an element may have.
      observed: which rows have a gradient.
      nonfinite: as in `decide`.
      loss: as in `decide`.
      xp: the array namespace.

    >>> norm, true = np.float32([5.0]), np.array([True])
    >>> decide_by_value(norm, norm / 2, true, thresholds=norm, observed=true).scale
    array([0.5], dtype=float32)
    """
    norms, after = as_norms(norms, xp), as_norms(after, xp)
    finite = xp.isfinite(norms) | ~observed
    clipped = finite & observed & changed
    scale = xp.where(clipped, after, 1.0) / xp.where(clipped, norms, 1.0)
    if nonfinite == "zero":
        scale = xp.where(finite, scale, 0.0)
    dropped = ~(observed | ~observed)
    skipped, _ = find_skips(~finite, nonfinite, loss, xp)
    scale = xp.where(skipped & observed, 0.0, scale)
    norms = xp.where(observed, norms, float("nan"))
    return Decision(norms, thresholds, scale, clipped, finite, skipped, dropped)
