"""The state of `skip_steps`, and the decision of its loss policy."""

from functools import partial
from typing import Any, NamedTuple

import jax
from jax import Array
from jax import numpy as jnp

from autoclip_core import Policy
from autoclip_core.loss import (
    LossDecision,
    decide_loss,
    empty_loss_decision,
    init_loss,
)

from .gradients.mesh import average
from .state import (
    ClipState,
    array_types,
    bound,
    rename_fields,
    restore_names,
    unbound,
)


class SkipLoss(NamedTuple):
    """The state of a loss policy, and its last decision."""

    skip_loss_state: Any
    """What the loss policy has recorded; the fields begin with `loss_`."""
    skip_loss_value: Array
    """Shape (1,): the last loss; NaN at first."""
    skip_loss_threshold: Array
    """Shape (1,): its threshold; +inf if there was none."""


class SkipState(NamedTuple):
    """The state of `skip_steps`."""

    skip_clip: ClipState
    """The policy state and the last decision."""
    skip_total: Array
    """Shape (): the number of skipped updates."""
    skip_in_a_row: Array
    """Shape (): the number of updates skipped since the last accepted update."""
    skip_most_in_a_row: Array
    """Shape (): the largest value that `skip_in_a_row` had."""
    skip_too_many: Array
    """Shape (): whether that value exceeds `max_consecutive`."""
    skip_inner_state: Any
    """The state of the wrapped optimizer."""
    skip_loss: SkipLoss | None = None
    """The state of the loss policy, and its last decision; None without one."""

    @property
    def inner_state(self) -> Any:
        """The earlier name of `skip_inner_state`."""
        return self.skip_inner_state


def init_skip_state(
    clip: ClipState, inner_state: Any, loss_policy: Policy | None
) -> SkipState:
    """Return the state before the first step; every array has its own buffer."""
    return SkipState(
        skip_clip=clip,
        skip_total=jnp.zeros((), jnp.int32),
        skip_in_a_row=jnp.zeros((), jnp.int32),
        skip_most_in_a_row=jnp.zeros((), jnp.int32),
        skip_too_many=jnp.zeros((), bool),
        skip_inner_state=inner_state,
        skip_loss=init_skip_loss(loss_policy),
    )


def init_skip_loss(policy: Policy | None) -> SkipLoss | None:
    """Return the state before the first loss, or None without a loss policy."""
    if policy is None:
        return None
    decision = empty_loss_decision(jnp)
    state = rename_fields(bound(init_loss(policy, jnp)), "loss_")
    return SkipLoss(state, decision.loss, decision.threshold)


def decide_on_value(
    policy: Policy | None, state: SkipLoss | None, value: Any, axis_name: Any
) -> tuple[SkipLoss | None, LossDecision | None]:
    """Decide on the loss of a step; return None twice without a loss policy.

    Args:
      policy: the loss policy.
      state: its state.
      value: the extra argument `value` of `update`.
      axis_name: as in `clip_by_policy`; the mean over these axes decides.

    Raises:
      ValueError: there is no value, or the state belongs to another loss policy.
    """
    _check_skip_loss(policy, state)
    if policy is None or state is None:
        return None, None
    if value is None:
        raise ValueError(
            "value must be given to `update`, got None: loss_policy decides on the "
            "loss; call tx.update(grads, state, params, value=loss)"
        )
    loss = average(jnp.asarray(value), axis_name)
    next_state, decision = _next_loss(policy, state, loss)
    return next_state, decision


@partial(jax.jit, static_argnums=0)
def _next_loss(
    policy: Policy, state: SkipLoss, value: Array
) -> tuple[SkipLoss, LossDecision]:
    recorded = restore_names(unbound(state.skip_loss_state))
    recorded, decision = decide_loss(policy, recorded, value, jnp)
    renamed = rename_fields(bound(recorded), "loss_")
    return SkipLoss(renamed, decision.loss, decision.threshold), decision


def _check_skip_loss(policy: Policy | None, state: Any) -> None:
    """Refuse a state of another loss policy, or of none; costs only tracing."""
    actual = array_types(state)
    expected = array_types(jax.eval_shape(partial(init_skip_loss, policy)))
    if actual != expected:
        raise ValueError(
            f"the state of skip_steps must fit its loss_policy: it holds {actual}, and "
            f"{policy!r} makes {expected}; restore it into the optimizer that saved "
            "it, or start without past losses: "
            "state._replace(skip_loss=tx.init(params).skip_loss); if an earlier "
            "version saved it, convert it: upgrade_state(opt_state)"
        )
