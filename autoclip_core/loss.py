"""The loss of a step: another reason to skip an update.

A loss policy is any policy that works on values of any sign. It sets a threshold from
past losses. A loss above its threshold, or one that is not finite, skips the whole
update: `decide` follows the `LossDecision`. A loss is not a row.

| case                         | update  | loss         | norms        |
|------------------------------|---------|--------------|--------------|
| loss <= threshold            | applied | recorded     | recorded     |
| loss > threshold             | skipped | recorded     | recorded     |
| loss is NaN or infinite      | skipped | not recorded | not recorded |
"""

from typing import Any, NamedTuple

import numpy as np

from .checks import format_error
from .history.validation import find_invalid_value
from .policy import Policy, check_policy, limit_and_record, select_rows
from .scale import SMALLEST_NORMAL, XP, Array, find_level, ignore_overflow

LARGEST_LOSS = 1e38
"""Losses beyond it count as infinite: the difference of two losses must be finite."""


class LossState(NamedTuple):
    """What a loss policy has recorded, and a count."""

    loss_policy: Any
    """The state of the loss policy, for one row."""
    loss_skipped: Array
    """Shape (): updates that were skipped because of the loss."""

    def find_problem(self) -> str:
        """Return why a loaded count is invalid, or ""."""
        count = self.loss_skipped
        return find_invalid_value("loss_skipped", count, ">= 0", count >= 0)


class LossDecision(NamedTuple):
    """The decision on the loss of a step; every field has shape (1,)."""

    loss: Array
    """The loss, float32."""
    threshold: Array
    """The loss above which the update is skipped; +inf without a threshold."""
    finite: Array
    """False if the loss is NaN, infinite or beyond 1e38 in magnitude."""
    skipped: Array
    """Whether the whole update must be skipped because of the loss."""


def check_loss_policy(policy: Any) -> None:
    """Check that a policy works on losses, which may be 0 or negative.

    Raises:
      TypeError: the value is not a policy.
      ValueError: the policy works on positive numbers only.
    """
    check_policy(policy, "loss_policy")
    if not policy.can_limit_losses:
        rule = "a policy that works on values of any sign"
        way_out = (
            "use MeanStd(6.0, history_length=128), ZScore(6.0), "
            "Quantile(0.99, history_length=1000) or Fixed, without log and without "
            "include_current"
        )
        raise ValueError(format_error("loss_policy", rule, policy, way_out))


def init_loss(policy: Policy, xp: XP = np) -> LossState:
    """Return the state of a loss policy before the first loss.

    Args:
      policy: a policy that works on values of any sign.
      xp: the array namespace.

    >>> from autoclip_core import MeanStd
    >>> int(init_loss(MeanStd(6.0, history_length=128)).loss_skipped)
    0
    """
    return LossState(policy.init(1, xp), xp.zeros((), dtype=xp.int32))


def empty_loss_decision(xp: XP = np) -> LossDecision:
    """Return the decision before the first loss: no loss and no threshold."""
    loss = xp.full((1,), float("nan"), dtype=xp.float32)
    threshold = xp.full((1,), float("inf"), dtype=xp.float32)
    no = threshold == 0
    return LossDecision(loss, threshold, ~no, no)


def decide_loss(
    policy: Policy, state: LossState, loss: Array, xp: XP = np
) -> tuple[LossState, LossDecision]:
    """Decide whether the loss of a step skips the update, and record the loss.

    The threshold depends on past losses only. Every finite loss is recorded, also 0, a
    negative loss and a loss above the threshold: otherwise a lasting change of level
    would be skipped for ever.

    Args:
      policy: a policy that `check_loss_policy` accepts.
      state: the result of `init_loss`, or of the last step.
      loss: the mean loss of the step, without a loss scale; shape () or (1,), any sign.
      xp: the array namespace.

    Returns:
      The next state and the decision, which `decide` takes as `loss`.

    Raises:
      ValueError: the loss is not a single number.

    >>> from autoclip_core import MeanStd
    >>> policy = MeanStd(2.0, history_length=8)
    >>> state = init_loss(policy)
    >>> for loss in [-1.0, 0.0, 1.0, 4.0]:
    ...     state, decision = decide_loss(policy, state, loss)
    >>> float(decision.threshold[0]), bool(decision.skipped[0])
    (2.0, True)
    """
    loss = _as_loss(loss, xp)
    finite = (loss < LARGEST_LOSS) & (loss > -LARGEST_LOSS)
    valid_loss = xp.where(finite, loss, 0.0)
    limit, recorded = limit_and_record(policy, state.loss_policy, valid_loss, xp=xp)
    threshold = find_level(limit, xp)
    skipped = ~finite | (valid_loss > threshold)
    next_state = LossState(
        select_rows(finite, recorded, state.loss_policy, xp),
        state.loss_skipped + xp.asarray(xp.any(skipped), dtype=xp.int32),
    )
    return next_state, LossDecision(loss, threshold, finite, skipped)


def compute_loss_metrics(
    loss: Array, threshold: Array, state: LossState
) -> dict[str, Array]:
    """Return the metrics of the last loss and of the run, each a number.

    | name                    | value                                               |
    |-------------------------|-----------------------------------------------------|
    | clip/loss               | the last loss                                       |
    | clip/loss_threshold     | its threshold; +inf without one                     |
    | clip/loss_skipped_total | updates that were skipped because of the loss       |
    """
    return {
        "clip/loss": loss[0],
        "clip/loss_threshold": threshold[0],
        "clip/loss_skipped_total": state.loss_skipped,
    }


def _as_loss(loss: Array, xp: XP) -> Array:
    """Return the loss as float32 of shape (1,); subnormal as 0, as a norm.

    Raises:
      ValueError: the loss is not a single number.
    """
    with ignore_overflow(xp):
        loss = xp.asarray(loss, dtype=xp.float32)
    shape = tuple(loss.shape)
    if shape not in ((), (1,)):
        rule, way_out = "of shape () or (1,)", "reduce it first: loss.mean()"
        raise ValueError(format_error("loss", rule, shape, way_out))
    loss = loss if shape else loss[None]
    is_tiny = (loss < SMALLEST_NORMAL) & (loss > -SMALLEST_NORMAL)
    return xp.where(is_tiny, 0.0, loss)
