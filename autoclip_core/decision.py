"""`decide()`: the one step that every adapter calls, and its result.

It computes the limit and the scale of each row, records the norms, and says whether the
update is skipped: because a row was dropped, because a norm is not finite, or because
of the loss (`loss.py`).
"""

from typing import NamedTuple, TypeVar

import numpy as np

from . import scalars
from .checks import check_choice, format_error
from .loss import LossDecision
from .policy import Policy, limit_and_record, select_rows
from .scale import (
    NONFINITE,
    XP,
    Array,
    as_norms,
    find_level,
    refine_scale,
    scale_rows,
)

State = TypeVar("State")


class Decision(NamedTuple):
    """The result of one step; every field has one entry per row."""

    norm: Array
    """The norm before scaling; NaN if the row was not observed."""
    threshold: Array
    """min(T, D), the norm above which the row is changed; +inf without a limit."""
    scale: Array
    """The factor for the gradient of the row: 1 keeps it, 0 removes it. In a clipper
    with `scale_only`, the norm after scaling divided by the norm before."""
    clipped: Array
    """Whether the norm is finite and exceeds the threshold; a dropped row, too."""
    finite: Array
    """False if the observed norm is NaN or infinite."""
    skipped: Array
    """Whether the whole update must be skipped; the same in every row."""
    dropped: Array
    """Whether a finite norm exceeds the drop level D, or its scale rounds to 0."""


def decide(
    policy: Policy,
    state: State,
    norms: Array,
    *,
    observed: Array = None,
    param_norms: Array = None,
    precise_norms: Array = None,
    nonfinite: str = "zero",
    loss: LossDecision | None = None,
    xp: XP = np,
) -> tuple[State, Decision]:
    """Take one step: limit, scale, record, with the numeric rules of `scale.py`.

    The policy sets the threshold before it records the norm, unless it includes the
    current norm. Only finite, positive norms of observed rows are recorded. This
    function applies that rule to every policy, so a policy need not check it.

    Args:
      policy: any `Policy`.
      state: the state of the policy, from `policy.init(rows)` or from the last step.
      norms: the norm of each row, shape (rows,), any float type.
      observed: which rows have a gradient, booleans of shape (rows,); None means all.
      param_norms: norms of the parameters, shape (rows,), if the policy needs them.
      precise_norms: the norms in float64, shape (rows,), or None. With them the scale
        is float64: target / precise norm. All else is float32, also the threshold.
      nonfinite: the rule for a row whose norm is NaN or infinite: "zero" (scale 0),
        "skip" (every scale is 0 and no row records), "propagate" (scale 1), "raise".
      loss: the decision of `decide_loss` on this step. If it skips the update, every
        scale is 0; if the loss is not finite, no row records.
      xp: the array namespace; `state` and `norms` belong to it.

    Returns:
      The next state and the `Decision`.

    Raises:
      FloatingPointError: a norm is not finite and `nonfinite="raise"`.
      ValueError: `nonfinite` is another word, or a shape is not (rows,).

    >>> from autoclip_core import Quantile
    >>> policy = Quantile(0.5, history_length=3)
    >>> state = policy.init(rows=1)
    >>> for norm in [1.0, 3.0, float("nan"), 8.0]:
    ...     state, decision = decide(policy, state, [norm])
    ...     print(decision.threshold[0], decision.scale[0])
    inf 1.0
    1.0 0.33333334
    2.0 0.0
    2.0 0.25
    """
    check_choice("nonfinite", nonfinite, NONFINITE)
    rows = _check_shapes(norms, observed=observed, param_norms=param_norms)
    arrays = norms, observed, precise_norms
    if xp is not np or rows != (1,):
        return _decide(policy, state, arrays, param_norms, nonfinite, loss, xp)
    row = tuple(map(scalars.take_row, arrays))
    loss = None if loss is None else LossDecision(*map(scalars.take_row, loss))
    state, decision = _decide(policy, state, row, param_norms, nonfinite, loss, scalars)
    return state, Decision(*map(scalars.as_row, decision))


def _decide(
    policy: Policy,
    state: State,
    arrays: tuple[Array, ...],
    param_norms: Array,
    nonfinite: str,
    loss: LossDecision | None,
    xp: XP,
) -> tuple[State, Decision]:
    """Compute `decide` on arrays, or with `scalars` on a single row."""
    norms, observed, precise_norms = arrays
    norms, finite, is_observed = _read_norms(norms, observed, xp)
    is_valid = is_observed & finite
    is_nonfinite = is_observed & ~finite
    _check_finite(is_nonfinite, nonfinite, xp)
    # A policy receives 0 instead of NaN, infinity and a row without a gradient.
    valid_norms = xp.where(is_valid, norms, 0.0)
    limit, recorded = limit_and_record(policy, state, valid_norms, param_norms, xp)
    scale, clipped, dropped = scale_rows(
        valid_norms, limit.threshold, limit.target, limit.drop, xp
    )
    if precise_norms is not None:
        scale = refine_scale(scale, limit.target, precise_norms, xp)
    if nonfinite == "zero":
        scale = xp.where(is_nonfinite, 0.0, scale)
    skipped, is_void = find_skips(is_nonfinite, nonfinite, loss, xp)
    if limit.cancels:
        skipped = skipped | xp.any(dropped)
    state = select_rows((valid_norms > 0) & ~is_void, recorded, state, xp)
    return state, Decision(
        norm=xp.where(is_observed, norms, float("nan")),
        threshold=find_level(limit, xp),
        scale=xp.where(skipped & is_observed, 0.0, scale),
        clipped=clipped,
        finite=~is_nonfinite,
        skipped=skipped,
        dropped=dropped,
    )


def find_skips(
    is_nonfinite: Array, nonfinite: str, loss: LossDecision | None, xp: XP = np
) -> tuple[Array, Array]:
    """Return whether norms or loss skip the update, and whether no row then records.

    Both are the same in every row. A spike of the loss skips the update, but the rows
    record. A loss that is not finite lets no row record, and so does a norm that is not
    finite, if `nonfinite="skip"`.
    """
    is_void = is_nonfinite & ~is_nonfinite
    if nonfinite == "skip":
        is_void = is_void | xp.any(is_nonfinite)
    if loss is None:
        return is_void, is_void
    is_void = is_void | ~loss.finite
    return is_void | loss.skipped, is_void


def _read_norms(norms: Array, observed: Array, xp: XP) -> tuple[Array, Array, Array]:
    """Return the norms as float32, which are finite, and which were observed."""
    norms = as_norms(norms, xp)
    finite = xp.isfinite(norms)
    return norms, finite, finite | ~finite if observed is None else xp.asarray(observed)


def _check_finite(is_nonfinite: Array, nonfinite: str, xp: XP) -> None:
    """Raise a FloatingPointError if any row is not finite and the rule is "raise"."""
    if nonfinite == "raise" and bool(xp.any(is_nonfinite)):
        raise FloatingPointError(
            'a gradient norm is not finite and nonfinite="raise"; '
            'to continue without that gradient, set nonfinite="zero" or "skip"'
        )


def _check_shapes(norms: Array, **others: Array) -> tuple[int, ...]:
    """Return (rows,); raise a ValueError if an array has another shape."""
    rows = tuple(np.shape(norms))
    if len(rows) != 1:
        rule, way_out = "of shape (rows,)", "one norm per row"
        raise ValueError(format_error("norms", rule, rows, way_out))
    for name, array in others.items():
        shape = rows if array is None else tuple(np.shape(array))
        if shape != rows:
            rule, way_out = f"of shape {rows}", "give one entry per row, as in norms"
            raise ValueError(format_error(name, rule, shape, way_out))
    return rows
