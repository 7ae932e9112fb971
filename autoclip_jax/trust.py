"""`trust_clip`: an optimizer whose gradient is filtered and whose update is bounded."""

from functools import partial
from typing import Any

import jax
import optax

from autoclip_core import Policy
from autoclip_core.checks import check_flag
from autoclip_core.clipper.trust import (
    HISTORY_LENGTH,
    QUANTILE,
    RATIO,
    make_bound,
    make_filter,
)

from .arguments import check_transformation, explain_arguments
from .clipper import make_transformation
from .gradients.rows import Mask, Scope, choose_scope, is_none, repeat_mask
from .opt_state.positions import find_clippers
from .opt_state.undone_bounds import check_uses_present_weights
from .state import ClipState, TrustState, wrong_state_error

_HALVES = (
    "make the halves yourself: optax.chain(clip_by_policy(filter, scope='global'), "
    "optimizer, clip_by_policy(bound, norm='rms'))"
)


_OTHER_KEYWORDS = ["labels", "norm", "policy", "scale_only", "warmup_steps"]
_OTHER_KEYWORDS += ["warmup_threshold", "min_threshold", "max_threshold"]


@explain_arguments(
    ways_out={"global_clipping": 'use scope="global"'}
    | dict.fromkeys(_OTHER_KEYWORDS, _HALVES)
)
def trust_clip(
    optimizer: optax.GradientTransformation,
    *,
    ratio: float = RATIO,
    quantile: float = QUANTILE,
    history_length: int = HISTORY_LENGTH,
    scope: str = "parameter",
    exclude: Mask = None,
    nonfinite: str = "zero",
    dry_run: bool = False,
    axis_name: Any = None,
    rule: str = "flax",
) -> optax.GradientTransformationExtraArgs:
    """Filter the gradients of an optimizer, and bound its updates.

    The filter clips the norm of all gradients to a quantile of its history. The bound
    clips each update, which is the change of the weights w in one step:

        rms(update) <= ratio * max(rms(w), 0.2)

    The filter removes spikes. The bound limits what a learning rate that is too high
    can do, because the update contains the learning rate, the momentum and the
    preconditioner. The floor of 0.2 lets weights that start at 0 grow. `update` needs
    `params`.

    Args:
      optimizer: the optimizer, or any chain, with the learning rate and the weight
        decay inside. With `schedule_free`, `lookahead` and `sam`, put `trust_clip`
        inside: `optax.contrib.schedule_free(trust_clip(optax.sgd(0.1)), 0.1)`.
      ratio: of the bound, > 0: the largest update, relative to the weights.
      quantile: of the filter, in [0, 1].
      history_length: of the filter: the number of recorded norms, >= 1.
      scope: of the bound: the updates that share one norm, each "parameter", all of
        them ("global"), or each output "unit" of each parameter. The filter has one
        norm for all gradients.
      exclude: of both: the parameters that neither half measures or scales, as a
        pytree of booleans (a prefix of the parameters' tree) or a function that returns
        one; by default none. The optimizer changes them as without `trust_clip`.
      nonfinite: of the filter, if the norm of the gradients is NaN or infinite: "zero"
        sets all gradients to 0, "propagate" leaves them unchanged. The bound always
        sets an update that is not finite to 0, so the weights stay. The moments of the
        optimizer may have changed by then.
      dry_run: of both: measure, decide and record, and change nothing.
      axis_name: of both, as in `clip_by_policy`.
      rule: of the bound, as in `clip_by_policy`.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` whose state is a `TrustState`.
      `clip_metrics` names the numbers of the filter `clip/norm` and so on, and those of
      the bound `clip/update_norm` and so on.

    Raises:
      TypeError, ValueError: an argument breaks its rule; the message says which.
      ValueError: in `init`: the optimizer does not compute its next weights from the
        present ones, so it would undo the bound (schedule-free ones, `lookahead`,
        `sam`, `cocob`, `madgrad`), or has a clipper already.

    >>> import jax.numpy as jnp
    >>> tx = trust_clip(optax.sgd(10.0))
    >>> params = jnp.array([3.0, 4.0])
    >>> updates, state = tx.update(jnp.array([0.3, 0.4]), tx.init(params), params)
    >>> [round(float(update), 4) for update in updates]
    [-0.03, -0.04]
    """
    way_out = "wrap the optimizer: trust_clip(optax.adam(1e-3))"
    check_transformation("optimizer", optimizer, way_out)
    check_flag("dry_run", dry_run)
    all_rows = Scope("global", axis_name=axis_name)
    name = choose_scope(scope, None, None)
    row_scope = Scope(name, rule=rule, norm="rms", axis_name=axis_name)
    included = partial(_select_included, exclude)

    def make(policy: Policy, scope: Scope, how: str) -> optax.GradientTransformation:
        clip = make_transformation(policy, scope, how)
        clip = _leave_unchanged(clip) if dry_run else clip
        return clip if exclude is None else optax.masked(clip, included)

    return _transformation(
        make(make_filter(quantile, history_length), all_rows, nonfinite),
        optax.with_extra_args_support(optimizer),
        make(make_bound(ratio), row_scope, "zero"),
    )


def _transformation(
    gradient_filter: optax.GradientTransformation,
    optimizer: optax.GradientTransformationExtraArgs,
    bound: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    def init(params: Any) -> TrustState:
        inner = optimizer.init(params)
        _check_has_no_clipper(inner)
        check_uses_present_weights(inner)
        return TrustState(gradient_filter.init(params), inner, bound.init(params))

    def update(
        updates: Any, state: TrustState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, TrustState]:
        if not isinstance(state, TrustState):
            raise wrong_state_error(state, "TrustState of trust_clip")
        if params is None:
            raise ValueError(
                "params must be given to `update`, got None: trust_clip bounds an "
                "update by its weights; call tx.update(grads, state, params)"
            )
        gradient, inner, last = state
        updates, gradient = gradient_filter.update(updates, gradient, params)
        updates, inner = optimizer.update(updates, inner, params, **extra_args)
        updates, last = bound.update(updates, last, params)
        return updates, TrustState(gradient, inner, last)

    return optax.GradientTransformationExtraArgs(init, update)


def _check_has_no_clipper(state: Any) -> None:
    """Refuse the state of an optimizer that clips; `skip_steps` may be in it."""
    if any(isinstance(place.state, ClipState) for place in find_clippers(state)):
        raise ValueError(
            "optimizer must be without a clipper, got one that has one: trust_clip "
            "would clip the same gradients or the same update again; leave that one "
            f"out, or {_HALVES}"
        )


def _leave_unchanged(
    clip: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """Return a transformation that decides and records, and changes no update."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return updates, clip.update(updates, state, params)[1]

    return optax.GradientTransformation(clip.init, update)


def _select_included(exclude: Mask, tree: Any) -> Any:
    """Return the mask of the leaves that are not excluded."""
    structure = jax.tree.structure(tree, is_leaf=is_none)
    flags = repeat_mask(exclude, tree, "exclude")
    return jax.tree.unflatten(structure, [not is_excluded for is_excluded in flags])
