"""Gradient transformations that clip, for `optax.chain`."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from autoclip_core import (
    Policy,
    decide,
)
from autoclip_core.checks import check_choice, format_error
from autoclip_core.clipper.metrics import Tally, count_step, empty_tally
from autoclip_core.policy import check_policy

from .gradients import has_norm, leaves_of, row_norms, scale_tree
from .layouts import units_by
from .rows import Labels, Rows, Scope, choose_scope


class ClipState(NamedTuple):
    """The state of every transformation here; a row's fields have shape (rows,)."""

    clip_policy: Any
    """What the policy has learned."""
    clip_norm: Array
    """The last norm of each row, before scaling: 0 at first, NaN without gradient."""
    clip_threshold: Array
    """Its threshold; +inf where there was none."""
    clip_scale: Array
    """Its scale."""
    clip_clipped: Array
    """Whether it was clipped."""
    clip_finite: Array
    """Whether its norm was finite."""
    clip_tally: Tally
    """What the run counted, for `clip_metrics`."""


def clip_by_policy(
    policy: Policy,
    *,
    scope: str | None = None,
    global_clipping: bool | None = None,
    labels: Labels = None,
    nonfinite: str = "zero",
    axis_name: Any = None,
    rule: str = "flax",
) -> optax.GradientTransformationExtraArgs:
    """Clip updates by any policy of `autoclip_core`.

    Args:
      policy: the policy; it runs unchanged inside `jax.jit`.
      scope: the gradients that share one norm: each "parameter" (the default), all of
        them ("global"), or each output "unit" of each parameter.
      global_clipping: the older spelling of `scope="global"`.
      labels: instead of a scope: a pytree of labels (a prefix of the updates' tree) or
        a function that makes one, as `optax.partition` takes; equal labels share a
        norm.
      nonfinite: what becomes of a row whose norm is NaN or infinite: "zero" sets it to
        0, "propagate" leaves it as it came. It is never recorded.
      axis_name: mesh axes that cut a gradient into pieces, inside `shard_map`. Under
        `jit` with sharded arrays nothing is needed.
      rule: how a parameter is cut at scope "unit": see `autoclip_jax.layouts`.

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
    cut = choose_scope(scope, global_clipping, labels, "parameter", units_by(rule))
    check_rule(rule, cut)
    return _transformation(policy, cut, nonfinite, axis_name)


def _transformation(
    policy: Policy, scope: Scope, nonfinite: str, axis_name: Any
) -> optax.GradientTransformationExtraArgs:
    """Return the pair of `init` and `update`."""
    check_jittable(policy)
    check_nonfinite(nonfinite)
    check_axes(axis_name, scope)

    def init(params: Any) -> ClipState:
        return fresh(policy, len(scope.rows(params).names))

    def update(
        updates: Any, state: ClipState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, ClipState]:
        del extra_args
        rows = scope.rows(updates, params)
        check_fit(policy, state, rows)
        norms = row_norms(rows, updates, axis_name)
        weights = param_norms(policy, rows, params, axis_name)
        state = learn(policy, nonfinite, state, norms, has_norm(rows, updates), weights)
        return scale_tree(rows, updates, state.clip_scale), state

    return optax.GradientTransformationExtraArgs(init, update)


def fresh(policy: Policy, rows: int) -> ClipState:
    """Return the state that has seen nothing; every array is its own buffer."""
    return ClipState(
        clip_policy=policy.init(rows, jnp),
        clip_norm=jnp.zeros((rows,), jnp.float32),
        clip_threshold=jnp.full((rows,), jnp.inf, jnp.float32),
        clip_scale=jnp.ones((rows,), jnp.float32),
        clip_clipped=jnp.zeros((rows,), bool),
        clip_finite=jnp.ones((rows,), bool),
        clip_tally=empty_tally(rows, jnp),
    )


# Outside of `jit` a step would be dozens of dispatches; inside, this changes nothing.
@partial(jax.jit, static_argnums=(0, 1))
def learn(
    policy: Policy,
    nonfinite: str,
    state: ClipState,
    norms: Array,
    observed: Array,
    weights: Array | None,
) -> ClipState:
    """Return the state after one decision."""
    learned, decision = decide(
        policy,
        state.clip_policy,
        norms,
        observed=observed,
        param_norms=weights,
        nonfinite=nonfinite,
        xp=jnp,
    )
    return ClipState(
        learned,
        decision.norm,
        decision.threshold,
        decision.scale,
        decision.clipped,
        decision.finite,
        count_step(state.clip_tally, decision, jnp),
    )


def param_norms(
    policy: Policy, rows: Rows, params: Any, axis_name: Any
) -> Array | None:
    """Return the norms of the parameters, where the policy needs them."""
    if not policy.needs_param_norms:
        return None
    if params is None:
        raise ValueError(
            "params must be given to `update`, got None: the threshold is a ratio to "
            "their norm; call tx.update(updates, state, params)"
        )
    if len(leaves_of(params)) != len(rows.slots):
        raise ValueError(
            f"params must have the structure of the updates, which has "
            f"{len(rows.slots)} leaves, got {len(leaves_of(params))}"
        )
    return row_norms(rows, params, axis_name)


def check_jittable(policy: Policy) -> None:
    """Refuse a policy that cannot run in a trace, or that cancels whole updates."""
    check_policy(policy)
    policy.init(1, jnp)  # refuses a history of unbounded length
    one = np.ones(1, np.float32)
    if policy.limit(policy.init(1), one, param_norms=one).cancels:
        way_out = "wrap the optimizer: skip_steps(optimizer, policy)"
        rule = 'without Drop(action="skip"), which cancels whole updates'
        raise ValueError(format_error("policy", rule, policy, way_out))


def check_rule(rule: str, scope: Scope) -> None:
    """Refuse a rule about units where there are none."""
    if rule != "flax" and scope.name != "unit":
        way_out = 'it says how units lie; add scope="unit"'
        raise ValueError(format_error("rule", 'given with scope="unit"', rule, way_out))


def check_axes(axis_name: Any, scope: Scope) -> None:
    """Refuse what names no axes, and mapped axes where units are cut."""
    names = (axis_name,) if isinstance(axis_name, str) else axis_name
    if names is not None and not (
        isinstance(names, tuple | list) and all(isinstance(n, str) for n in names)
    ):
        rule = "the name of a mesh axis, or a tuple of names"
        raise TypeError(format_error("axis_name", rule, axis_name, ""))
    if axis_name is not None and scope.name == "unit":
        way_out = (
            "inside shard_map it is not known whether an axis cuts a unit or lies "
            "between units; jit the step on sharded arrays instead, where norms are "
            "global without axis_name"
        )
        rule = 'left out with scope="unit"'
        raise ValueError(format_error("axis_name", rule, axis_name, way_out))


def check_nonfinite(nonfinite: str) -> None:
    """Refuse what a gradient transformation cannot do."""
    if nonfinite in ("skip", "raise"):
        way_out = (
            "to cancel updates, wrap the optimizer: skip_steps(optimizer, policy); to "
            "stop the run, call check_skips(opt_state) on the host"
        )
        rule = '"zero" or "propagate" inside a chain'
        raise ValueError(format_error("nonfinite", rule, nonfinite, way_out))
    check_choice("nonfinite", nonfinite, ("zero", "propagate"))


def check_fit(policy: Policy, state: ClipState, rows: Rows) -> None:
    """Refuse a state made for other parameters or another policy; costs tracing only.

    Raises:
      ValueError: rows, the policy's kind, a shape or a type differ; the message says
        which.
    """
    if not isinstance(state, ClipState):
        raise other_state(state, "ClipState of a clipper")
    got, wanted = state.clip_norm.shape, (len(rows.names),)
    if tuple(got) != wanted:
        raise ValueError(
            f"the state of a clipper must fit the updates: it has {_count(got)} rows, "
            f"and the updates make {wanted[0]}; init it on parameters of this "
            "structure, and give params to update where gradients may be None"
        )
    theirs = _kinds(state)
    ours = _kinds(jax.eval_shape(partial(fresh, policy, wanted[0])))
    if theirs != ours:
        names = sorted(theirs.keys() ^ ours.keys()) or [
            name for name in ours if theirs[name] != ours[name]
        ]
        raise ValueError(
            f"the state of a clipper must fit its policy: it holds "
            f"{ {name: theirs.get(name) for name in names} }, and {policy!r} makes "
            f"{ {name: ours.get(name) for name in names} }; restore it into the policy "
            "it was saved from"
        )


def other_state(state: Any, wanted: str) -> TypeError:
    """Return the error for a state that another transformation made."""
    return TypeError(
        f"state must be the {wanted}, got {type(state).__name__}; was skip_steps or a "
        "link of the chain added or removed since it was saved?"
    )


def _kinds(state: Any) -> dict[str, str]:
    """Return the shape and the type of each array."""
    return {
        jax.tree_util.keystr(path): f"{tuple(leaf.shape)} {leaf.dtype}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def _count(shape: tuple[int, ...]) -> int:
    return shape[-1] if shape else 0
