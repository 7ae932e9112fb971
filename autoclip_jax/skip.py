"""Cancel whole updates: the parameters and every leaf of the inner state stay."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from autoclip_core import Drop, Policy
from autoclip_core.checks import check_count, format_error
from autoclip_core.policy import check_policy

from .clipper import (
    ClipState,
    check_axes,
    check_fit,
    check_rule,
    fresh,
    learn,
    other_state,
    param_norms,
)
from .gradients import has_norm, row_norms
from .layouts import units_by
from .rows import Labels, Scope, choose_scope


class SkipState(NamedTuple):
    """The state of `skip_steps`."""

    skip_clip: ClipState
    """What the policy learned and decided."""
    skip_total: Array
    """Shape (): updates that were cancelled."""
    skip_in_a_row: Array
    """Shape (): updates cancelled since the last one that was not."""
    skip_most_in_a_row: Array
    """Shape (): the largest that `skip_in_a_row` has been."""
    skip_too_many: Array
    """Shape (): whether that is more than `max_consecutive`."""
    inner_state: Any
    """The state of the optimizer inside."""


def skip_steps(
    inner: optax.GradientTransformation,
    policy: Policy,
    *,
    max_consecutive: int = 100,
    scope: str | None = None,
    global_clipping: bool | None = None,
    labels: Labels = None,
    axis_name: Any = None,
    rule: str = "flax",
) -> optax.GradientTransformationExtraArgs:
    """Cancel an update whose norm exceeds the policy's threshold, or is not finite.

    On a rejected step the updates are zero and `inner` does not see the gradients:
    moments, step counts and schedules stay. The policy learns the finite norms, so that
    a lasting change of level is not rejected for ever; a step with a NaN teaches
    nothing.

    Args:
      inner: the optimizer, or any chain.
      policy: sets the threshold; nothing is scaled.
      max_consecutive: as many cancelled updates in a row pass `check_skips`, >= 1.
      scope: as in `clip_by_policy`, but "global" unless given: one row beyond its
        threshold rejects the whole update.
      global_clipping: the older spelling of `scope="global"`.
      labels: as in `clip_by_policy`.
      axis_name: as in `clip_by_policy`.
      rule: as in `clip_by_policy`.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` whose state is a `SkipState`.

    Raises:
      TypeError, ValueError: an argument breaks its rule; the message says which.

    >>> from autoclip_core import Fixed
    >>> tx = skip_steps(optax.sgd(1.0, momentum=0.9), Fixed(2.0))
    >>> state = tx.init(jnp.zeros(1))
    >>> for norm in [1.0, 5.0]:
    ...     updates, state = tx.update(jnp.array([norm]), state)
    >>> updates.tolist(), int(state.skip_total)
    ([0.0], 1)
    """
    check_policy(policy)
    if not hasattr(inner, "init") or not hasattr(inner, "update"):
        rule = "an optax gradient transformation"
        way_out = "wrap the optimizer: skip_steps(optax.adam(1e-3), policy)"
        raise TypeError(format_error("inner", rule, inner, way_out))
    injected = isinstance(max_consecutive, jax.Array)
    way_out = (
        "under optax.inject_hyperparams name it in static_args" if injected else ""
    )
    check_count("max_consecutive", max_consecutive, 1, way_out)
    dropping = Drop(policy, action="skip")
    dropping.init(1, jnp)  # refuses a history of unbounded length
    cut = choose_scope(scope, global_clipping, labels, "global", units_by(rule))
    check_rule(rule, cut)
    check_axes(axis_name, cut)
    inner = optax.with_extra_args_support(inner)
    return _transformation(inner, dropping, cut, axis_name, max_consecutive)


def _transformation(
    inner: optax.GradientTransformationExtraArgs,
    dropping: Drop,
    cut: Scope,
    axis_name: Any,
    max_consecutive: int,
) -> optax.GradientTransformationExtraArgs:
    """Return the pair of `init` and `update`."""

    def init(params: Any) -> SkipState:
        clip = fresh(dropping, len(cut.rows(params).names))
        return SkipState(
            skip_clip=clip,
            skip_total=jnp.zeros((), jnp.int32),
            skip_in_a_row=jnp.zeros((), jnp.int32),
            skip_most_in_a_row=jnp.zeros((), jnp.int32),
            skip_too_many=jnp.zeros((), bool),
            inner_state=inner.init(params),
        )

    def update(
        updates: Any, state: SkipState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, SkipState]:
        _check_kind(state)
        clip = _judge(dropping, cut, axis_name, state.skip_clip, updates, params)
        reject = jnp.any(clip.clip_clipped) | jnp.any(~clip.clip_finite)

        def accept() -> tuple[Any, Any]:
            taken: tuple[Any, Any] = inner.update(
                updates, state.inner_state, params, **extra_args
            )
            return taken

        def stay() -> tuple[Any, Any]:
            # Both may be of another type than what came in: moments of bfloat16
            # parameters become float32 with the first float32 gradients.
            returned, like = jax.eval_shape(accept)
            kept = jax.tree.map(_of_type, state.inner_state, like)
            return jax.tree.map(jnp.zeros_like, returned), kept

        # Outside of a trace `cond` would compile its branches anew in every step.
        if isinstance(reject, jax.core.Tracer):
            updates, inner_state = lax.cond(reject, stay, accept)
        else:
            updates, inner_state = stay() if reject else accept()
        counted = _count(state, reject, max_consecutive)
        return updates, counted._replace(skip_clip=clip, inner_state=inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _check_kind(state: Any) -> None:
    """Refuse a state that `init` has not made."""
    if not isinstance(state, SkipState):
        raise other_state(state, "SkipState of skip_steps")
    for name in ("total", "in_a_row", "most_in_a_row", "too_many"):
        shape = tuple(getattr(state, f"skip_{name}").shape)
        if shape:
            raise ValueError(
                f"the state of skip_steps must have skip_{name} of shape (), got "
                f"{shape}; restore it into the optimizer it was saved from"
            )


def _of_type(leaf: Any, like: Any) -> Any:
    """Return the leaf in the type of another, where the two differ."""
    same = getattr(leaf, "dtype", like.dtype) == like.dtype
    return leaf if same else leaf.astype(like.dtype)


def _judge(
    dropping: Drop,
    cut: Scope,
    axis_name: Any,
    state: ClipState,
    updates: Any,
    params: Any,
) -> ClipState:
    """Return what the policy learned and decided about the updates."""
    rows = cut.rows(updates, params)
    check_fit(dropping, state, rows)
    norms = row_norms(rows, updates, axis_name)
    weights = param_norms(dropping, rows, params, axis_name)
    seen = has_norm(rows, updates)
    clip: ClipState = learn(dropping, "skip", state, norms, seen, weights)
    return clip


def _count(state: SkipState, reject: Array, max_consecutive: int) -> SkipState:
    """Return the state with its counters one step on."""
    in_a_row = jnp.where(reject, state.skip_in_a_row + 1, 0)
    most = jnp.maximum(state.skip_most_in_a_row, in_a_row)
    return state._replace(
        skip_total=jnp.where(reject, state.skip_total + 1, state.skip_total),
        skip_in_a_row=in_a_row,
        skip_most_in_a_row=most,
        skip_too_many=most > max_consecutive,
    )


def check_skips(opt_state: Any) -> None:
    """Raise if a `skip_steps` anywhere in a state cancelled too many updates in a row.

    Call it on the host, now and then; it reads one flag back.

    Args:
      opt_state: what `tx.init` or `tx.update` returned, of a chain or a mask, too.

    Raises:
      RuntimeError: it did.
      ValueError: there is no `skip_steps` in the state.

    >>> from autoclip_core import Fixed
    >>> tx = skip_steps(optax.sgd(1.0), Fixed(2.0), max_consecutive=1)
    >>> state = tx.init(jnp.zeros(1))
    >>> for norm in [5.0, 5.0]:
    ...     updates, state = tx.update(jnp.array([norm]), state)
    >>> check_skips(state)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    RuntimeError: 2 updates in a row were cancelled: ...
    """
    found = [
        leaf for leaf in jax.tree.leaves(opt_state, is_leaf=_is_skip) if _is_skip(leaf)
    ]
    if not found:
        raise ValueError(
            "opt_state must hold the state of skip_steps, got none; pass what tx.init "
            "or tx.update returned"
        )
    for state in found:
        if np.any(jax.device_get(state.skip_too_many)):
            most = int(np.max(jax.device_get(state.skip_most_in_a_row)))
            raise RuntimeError(
                f"{most} updates in a row were cancelled: the run is not training; "
                "look at the loss and the learning rate, or raise max_consecutive"
            )


def _is_skip(leaf: Any) -> bool:
    return isinstance(leaf, SkipState)
