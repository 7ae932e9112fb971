"""Skip whole updates; then the parameters and the inner state do not change."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from autoclip_core import Drop, Policy
from autoclip_core.checks import check_count, format_error
from autoclip_core.clipper.settings import check_traceable
from autoclip_core.loss import check_loss_policy

from .arguments import check_transformation, explain_arguments
from .clipper import decide_step
from .gradients.rows import Labels, Scope, choose_scope
from .opt_state.find_states import find_states
from .opt_state.replicas import warn_if_replicas_differ
from .skip_state import SkipState, decide_on_value, init_skip_state
from .state import init_state, wrong_state_error

CLIP_AND_SKIP = (
    "skip_steps itself drops: pass the policy inside Drop, and clip in the optimizer, "
    "optax.chain(clip_by_policy(Fixed(1.0), scope='global'), optimizer)"
)
"""The way out for a policy that skips, too."""

_WAYS_OUT = {
    "max_consecutive_skips": "use max_consecutive",
    "nonfinite": "it skips every update whose norm is not finite",
    "scale_only": "it scales nothing; give scale_only to a clipper inside of it",
}
"""Keywords of other factories."""


@explain_arguments("skip_steps(inner, {})", _WAYS_OUT)
def skip_steps(
    inner: optax.GradientTransformation,
    policy: Policy,
    *,
    loss_policy: Policy | None = None,
    max_consecutive: int = 100,
    scope: str | None = None,
    global_clipping: bool | None = None,
    labels: Labels = None,
    norm: str = "l2",
    axis_name: Any = None,
    rule: str = "flax",
) -> optax.GradientTransformationExtraArgs:
    """Skip an update whose norm or loss exceeds its threshold, or is not finite.

    In a skipped step the updates are zero and `inner` does not receive the gradients:
    moments, step counts and schedules do not change. The policy records the finite
    norms, so that a lasting change of level is not skipped for ever. A step with a NaN
    records nothing.

    Args:
      inner: the optimizer, or any chain.
      policy: sets the threshold, without a `Drop`; nothing is scaled. To clip as well,
        put `clip_by_policy` into `inner`.
      loss_policy: a policy for the loss, such as `MeanStd(6.0, history_length=128)`,
        with a bounded history. Each step then needs its mean loss:
        `update(grads, state, params, value=loss)`, which `inner` receives, too. A loss
        above its threshold skips the update; norms and loss are recorded. A loss that
        is not finite skips it, too, and nothing is recorded. With `axis_name`, the mean
        over these axes decides.
      max_consecutive: the most skipped updates in a row that `check_skips` accepts,
        >= 1.
      scope: as in `clip_by_policy`, but the default is "global". One row above its
        threshold skips the whole update.
      global_clipping: as in `clip_by_policy`.
      labels: as in `clip_by_policy`.
      norm: as in `clip_by_policy`.
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
    check_traceable(policy, jnp, CLIP_AND_SKIP)
    if _has_drop(policy):
        raise ValueError(format_error("policy", "without Drop", policy, CLIP_AND_SKIP))
    way_out = "wrap the optimizer: skip_steps(optax.adam(1e-3), policy)"
    check_transformation("inner", inner, way_out)
    check_count("max_consecutive", max_consecutive, 1)
    if loss_policy is not None:
        check_loss_policy(loss_policy)
        loss_policy.init(1, jnp)  # raises for a history of unbounded length
    dropping = Drop(policy, action="skip")
    name = choose_scope(scope, global_clipping, labels, "global")
    row_scope = Scope(name, labels, rule, norm=norm, axis_name=axis_name)
    inner = optax.with_extra_args_support(inner)
    return _transformation(inner, dropping, loss_policy, row_scope, max_consecutive)


def _has_drop(policy: Any) -> bool:
    """Return whether a policy is `Drop`, or a combinator around one."""
    inner = getattr(policy, "policy", None)
    return isinstance(policy, Drop) or (inner is not None and _has_drop(inner))


def _transformation(
    inner: optax.GradientTransformationExtraArgs,
    policy: Drop,
    loss_policy: Policy | None,
    scope: Scope,
    max_consecutive: int,
) -> optax.GradientTransformationExtraArgs:
    def init(params: Any) -> SkipState:
        clip = init_state(policy, len(scope.rows(params).names), scope.norm)
        return init_skip_state(clip, inner.init(params), loss_policy)

    def update(
        updates: Any, state: SkipState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, SkipState]:
        _check_skip_state(state)
        value, axis_name = extra_args.get("value"), scope.axis_name
        record, loss = decide_on_value(loss_policy, state.skip_loss, value, axis_name)
        clip, *_ = decide_step(
            policy, scope, "skip", state.skip_clip, updates, params, loss
        )
        is_skipped = jnp.any(clip.clip_clipped) | jnp.any(~clip.clip_finite)
        if loss is not None:
            is_skipped = is_skipped | loss.skipped[0]
        before = state.skip_inner_state
        accept = partial(inner.update, updates, before, params, **extra_args)
        updates, after = _skip_or_accept(is_skipped, accept, before)
        counted = _count_skips(state, is_skipped, max_consecutive)
        return updates, counted._replace(
            skip_clip=clip, skip_inner_state=after, skip_loss=record
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _skip_or_accept(is_skipped: Array, accept: Callable[[], Any], state: Any) -> Any:
    """Return the updates and the new state of the wrapped optimizer.

    In a skipped step, the updates are 0 and the state does not change.

    Args:
      is_skipped: whether the step is skipped, shape ().
      accept: returns the updates and the new state if the step is not skipped.
      state: the state of the wrapped optimizer.
    """

    def skip() -> tuple[Any, Any]:
        # Both types may differ from the inputs: moments of bfloat16 parameters
        # become float32 with the first float32 gradients.
        returned, like = jax.eval_shape(accept)
        unchanged = jax.tree.map(_cast_like, state, like)
        return jax.tree.map(jnp.zeros_like, returned), unchanged

    # Outside of a trace, `cond` would compile its branches again in every step.
    if isinstance(is_skipped, jax.core.Tracer):
        return lax.cond(is_skipped, skip, accept)
    return skip() if is_skipped else accept()


def _check_skip_state(state: Any) -> None:
    """Refuse the state of another transformation, or counters of another shape."""
    if not isinstance(state, SkipState):
        raise wrong_state_error(state, "SkipState of skip_steps")
    for name in ("total", "in_a_row", "most_in_a_row", "too_many"):
        shape = tuple(getattr(state, f"skip_{name}").shape)
        if shape:
            raise ValueError(
                f"the state of skip_steps must have skip_{name} of shape (), got "
                f"{shape}; restore it into the optimizer that saved it"
            )


def _cast_like(leaf: Any, like: Any) -> Any:
    """Return the leaf in the type of `like`; unchanged if the types are the same."""
    is_same = getattr(leaf, "dtype", like.dtype) == like.dtype
    return leaf if is_same else leaf.astype(like.dtype)


def _count_skips(
    state: SkipState, is_skipped: Array, max_consecutive: int
) -> SkipState:
    """Return the state with its counters after one more step."""
    in_a_row = jnp.where(is_skipped, state.skip_in_a_row + 1, 0)
    most = jnp.maximum(state.skip_most_in_a_row, in_a_row)
    return state._replace(
        skip_total=jnp.where(is_skipped, state.skip_total + 1, state.skip_total),
        skip_in_a_row=in_a_row,
        skip_most_in_a_row=most,
        skip_too_many=most > max_consecutive,
    )


def check_skips(opt_state: Any) -> None:
    """Raise if `skip_steps` in a state skipped too many updates in a row.

    Call it from time to time, outside of `jit`; it reads one flag from the device to
    the host. It warns about copies that differ between devices, as `check_state` does.

    Args:
      opt_state: what `tx.init` or `tx.update` returned; `skip_steps` may be inside
        chains and masks.

    Raises:
      RuntimeError: more than `max_consecutive` updates in a row were skipped.
      ValueError: the state has no `skip_steps`.

    >>> from autoclip_core import Fixed
    >>> tx = skip_steps(optax.sgd(1.0), Fixed(2.0), max_consecutive=1)
    >>> state = tx.init(jnp.zeros(1))
    >>> for norm in [5.0, 5.0]:
    ...     updates, state = tx.update(jnp.array([norm]), state)
    >>> check_skips(state)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    RuntimeError: 2 updates in a row were skipped: ...
    """
    warn_if_replicas_differ(opt_state)
    for _, state in find_states(opt_state, SkipState, "skip_steps"):
        if np.any(jax.device_get(state.skip_too_many)):
            most = int(np.max(jax.device_get(state.skip_most_in_a_row)))
            raise RuntimeError(
                f"{most} updates in a row were skipped: the run is not training; "
                "check the loss and the learning rate, or raise max_consecutive"
            )
