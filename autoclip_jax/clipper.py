"""Gradient transformations that clip, for `optax.chain`."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from autoclip_core import Policy, decide
from autoclip_core.checks import check_choice
from autoclip_core.clipper import metrics
from autoclip_core.clipper.parts import (
    get_part_scales,
    join_norms,
    join_observed,
    measure_scale,
)
from autoclip_core.clipper.settings import check_traceable
from autoclip_core.loss import LossDecision

from .arguments import explain_arguments
from .gradients import namespace
from .gradients.example_axis import warn_if_not_averaged
from .gradients.leaves import count_elements, has_gradient, list_leaves
from .gradients.measure import measure_norms
from .gradients.rows import Labels, Mask, Rows, Scope, choose_scope
from .gradients.scale import scale_updates
from .state import (
    ClipState,
    bound,
    check_state_matches,
    init_state,
    rename_fields,
    restore_names,
    unbound,
)


@explain_arguments()
def clip_by_policy(
    policy: Policy,
    *,
    scope: str | None = None,
    global_clipping: bool | None = None,
    labels: Labels = None,
    scale_only: Mask = None,
    norm: str = "l2",
    nonfinite: str = "zero",
    axis_name: Any = None,
    rule: str = "flax",
) -> optax.GradientTransformationExtraArgs:
    """Clip updates by any policy of `autoclip_core`.

    First in a chain, it clips the gradients. Last in a chain, it clips the change of
    the weights: `optax.chain(optax.adamw(1e-3), clip_by_policy(policy))`.

    Args:
      policy: the policy; it runs unchanged inside `jax.jit`.
      scope: the updates that share one norm: each "parameter" (the default), all of
        them ("global"), or each output "unit" of each parameter.
      global_clipping: the older spelling of `scope="global"`.
      labels: groups in place of a scope: a pytree of labels (a prefix of the updates'
        tree) or a function that returns one, as for `optax.partition`. Updates with
        equal labels share a norm.
      scale_only: the parameters that clipping scales, as the mask of `optax.masked`: a
        pytree of booleans (a prefix of the updates' tree) or a function that returns
        one; by default all. The others belong to the norm of their row and are not
        scaled. A row that is not finite or dropped is still set to 0 as a whole.
      norm: the norm of a row: "l2"; "rms", the l2 norm divided by the square root of
        the number of elements; or "max", the largest magnitude. Thresholds, recorded
        norms and the norms of parameters are norms of this kind.
      nonfinite: what happens to a row whose norm is NaN or infinite: "zero" sets it to
        0, "propagate" leaves it unchanged. Its norm is never recorded.
      axis_name: mesh axes that cut an update into pieces, inside `shard_map`. Under
        `jit` with sharded arrays, leave it out.
      rule: how a parameter is cut at scope "unit": "flax" (the last axis is that of the
        outputs, as in Haiku, but in weights of Equinox modules the first), "equinox"
        (the first axis), "layer" (the whole parameter) or "nfnets" (optax's rule).

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` whose state is a `ClipState`.

    Raises:
      TypeError, ValueError: an argument breaks its rule; the message says which.

    >>> from autoclip_core import Fixed
    >>> tx = clip_by_policy(Fixed(1.0), scope="global")
    >>> state = tx.init(jnp.zeros(2))
    >>> updates, state = tx.update(jnp.array([3.0, 4.0]), state)
    >>> updates.tolist(), state.clip_norm.tolist()
    ([0.6000000238418579, 0.800000011920929], [5.0])
    """
    name = choose_scope(scope, global_clipping, labels)
    row_scope = Scope(name, labels, rule, scale_only, norm, axis_name)
    return make_transformation(policy, row_scope, nonfinite)


def make_transformation(
    policy: Policy, scope: Scope, nonfinite: str
) -> optax.GradientTransformationExtraArgs:
    """Return the pair of `init` and `update`."""
    check_traceable(policy, jnp, "wrap the optimizer: skip_steps(optimizer, policy)")
    way_out = (
        "to cancel updates, wrap the optimizer: skip_steps(optimizer, policy); to stop "
        "the run, call check_skips(opt_state) outside of jit"
    )
    check_choice("nonfinite", nonfinite, ("zero", "propagate"), way_out)

    def init(params: Any) -> ClipState:
        return init_state(policy, len(scope.rows(params).names), scope.norm)

    def update(
        updates: Any, state: ClipState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, ClipState]:
        del extra_args
        state, rows, scales = decide_step(
            policy, scope, nonfinite, state, updates, params
        )
        return scale_updates(rows, updates, scales), state

    return optax.GradientTransformationExtraArgs(init, update)


class Measured(NamedTuple):
    """What a step measures, for each part of a row."""

    norms: Array
    """The norms of the updates."""
    sizes: Array | None
    """The numbers of elements; None unless the norm is "rms"."""
    observed: Array
    """Whether the part has a gradient."""
    param_norms: Array | None
    """The norms of the parameters of each row; None if the policy needs none."""


def decide_step(
    policy: Policy,
    scope: Scope,
    nonfinite: str,
    state: ClipState,
    updates: Any,
    params: Any,
    loss: LossDecision | None = None,
) -> tuple[ClipState, Rows, Array]:
    """Measure the updates and decide; return the next state, the rows and the scales.

    If rows have two parts, there is a scale for each part.
    """
    warn_if_not_averaged(updates, params)
    rows = scope.rows(updates, params)
    check_state_matches(policy, state, rows)
    observed = has_gradient(rows, updates)
    param_norms = _measure_params(policy, rows, params)
    measured = Measured(*_measure(rows, updates), observed, param_norms)
    how = policy, nonfinite, rows.norm, rows.is_split
    state, scales = _next_state(how, state, measured, loss)
    return state, rows, scales


def _measure(rows: Rows, tree: Any) -> tuple[Array, Array | None]:
    """Return the norm of each part, and with "rms" its number of elements."""
    norms = measure_norms(rows, tree)
    if rows.norm != "rms":
        return norms, None
    return norms, count_elements(rows, tree).astype(norms.dtype)


# Outside of `jit`, a step would be dozens of dispatches. Inside, this has no effect.
@partial(jax.jit, static_argnums=0)
def _next_state(
    how: tuple[Policy, str, str, bool],
    state: ClipState,
    measured: Measured,
    loss: LossDecision | None,
) -> tuple[ClipState, Array]:
    """Return the state after one decision, and the scale of each part."""
    policy, nonfinite, norm, is_split = how
    part_norms, sizes, observed, param_norms = measured
    norms = part_norms
    if is_split:
        norms = join_norms(norms, norm, sizes=sizes, xp=namespace)
        observed = join_observed(observed)
    policy_state, decision = decide(
        policy,
        restore_names(unbound(state.clip_policy)),
        norms,
        observed=observed,
        param_norms=param_norms,
        precise_norms=norms if norms.dtype == jnp.float64 else None,
        nonfinite=nonfinite,
        loss=loss,
        xp=namespace,
    )
    scales = get_part_scales(decision, namespace) if is_split else decision.scale
    # The state is float32.
    decision = decision._replace(scale=decision.scale.astype(jnp.float32))
    part_norms = part_norms.astype(jnp.float32)
    sizes = None if sizes is None else sizes.astype(jnp.float32)
    if is_split:
        decision = measure_scale(decision, part_norms, norm, sizes=sizes, xp=namespace)
    tally = metrics.count_step(restore_names(state.clip_tally), decision, namespace)
    totals = None
    if norm != "l2":
        sizes = None if sizes is None else sizes.reshape(1 + is_split, -1).sum(axis=0)
        totals = metrics.compute_totals(decision, namespace, norm=norm, sizes=sizes)
    # All fields of the decision but `skipped` and `dropped`.
    return ClipState(
        rename_fields(bound(policy_state), "policy_"),
        *decision[:5],
        rename_fields(tally, "tally_"),
        rename_fields(totals, "totals_"),
    ), scales


def _measure_params(policy: Policy, rows: Rows, params: Any) -> Array | None:
    """Return the norms of the parameters, or None if the policy needs none."""
    if not policy.needs_param_norms:
        return None
    if params is None:
        raise ValueError(
            "params must be given to `update`, got None: the threshold is a ratio to "
            "their norm; call tx.update(updates, state, params)"
        )
    if len(list_leaves(params)) != len(rows.parameters):
        raise ValueError(
            f"params must have the structure of the updates, which has "
            f"{len(rows.parameters)} leaves, got {len(list_leaves(params))}"
        )
    norms, sizes = _measure(rows, params)
    return (
        join_norms(norms, rows.norm, sizes=sizes, xp=namespace)
        if rows.is_split
        else norms
    )
