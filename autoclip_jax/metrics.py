"""Numbers to log, from any optimizer state, and the names of its rows."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from autoclip_core import Decision
from autoclip_core.clipper.metrics import (
    compute_metrics,
    compute_row_metrics,
    name_update_metrics,
)
from autoclip_core.loss import compute_loss_metrics

from .gradients.mesh import is_equal
from .gradients.rows import Labels, Mask, Scope, choose_scope, is_none, repeat_mask
from .opt_state.find_states import find_clip_states
from .opt_state.micro_batches import warn_if_micro_batches_are_clipped
from .opt_state.positions import find_clippers
from .opt_state.replicas import AVERAGE_FIRST, warn_if_replicas_differ
from .opt_state.undone_bounds import warn_if_undone
from .skip_state import SkipState
from .state import ClipState, restore_names


def clip_metrics(
    opt_state: Any, names: Sequence[str] | None = None
) -> dict[str, Array]:
    """Return the `clip/...` numbers of the clipper in an optimizer state.

    The clipper may be inside chains, masks and partitions, and the call may be inside
    `jit`. `autoclip_core.clipper.metrics.compute_metrics` documents the names, and
    `autoclip_core.loss.compute_loss_metrics` those of a loss policy.

    A clipper clips the update if another transformation of its chain stands before it
    and none behind it. Its names begin with `clip/update_`: `clip/update_norm`. The
    names of all other clippers are `clip/norm` and so on. Several clippers of one kind
    are numbered in the order of the state: `clip/0/norm`, `clip/1/norm`, or
    `clip/0/update_norm`, `clip/1/update_norm`. One of each kind needs no number.

    Only the positions count, not what the transformations compute. With
    `optax.identity()` behind it, a clipper of the update has the names `clip/norm` and
    so on. A clipper behind a filter of the gradient, as in
    `optax.chain(optax.zero_nans(), clip_by_quantile(0.9))`, has those of an update.

    A clipper of the update behind `schedule_free`, `lookahead`, `sam`, `cocob` or
    `madgrad` is a `RuntimeWarning`: they undo its bound, because their next weights do
    not follow from the present ones. So is a clipper before `MultiSteps` in a chain: it
    clips each micro-batch. So is a state whose copies differ between devices (see
    `check_state`), outside of `jit`.

    Args:
      opt_state: what `tx.init` or `tx.update` returned.
      names: the names of the rows, from `row_names`; then norm, threshold, scale and
        clip rate of every row are added, as `clip/norm/<name>` and so on. A clipper
        with one row names it "global".

    Returns:
      Arrays of shape (), by name, which stay valid if the state is donated. Outside of
      `jit`, this waits for the device if there are `names` or several devices. Inside
      `jit`, each number of a row is compiled by itself: with many rows, call it
      outside.

    Raises:
      ValueError: the state has no clipper, was made by `vmap`, or was saved by an
        earlier version; or a clipper has another number of rows than there are names.

    >>> import optax
    >>> from autoclip_jax import clip_by_quantile
    >>> tx = optax.chain(clip_by_quantile(0.9), optax.adam(1e-3))
    >>> params = jnp.zeros(2)
    >>> _, state = tx.update(jnp.array([3.0, 4.0]), tx.init(params), params)
    >>> float(clip_metrics(state)["clip/norm"])
    5.0

    Behind the optimizer, a clipper measures the update:

    >>> tx = optax.chain(optax.sgd(0.1), clip_by_quantile(0.9))
    >>> _, state = tx.update(jnp.array([3.0, 4.0]), tx.init(params), params)
    >>> float(clip_metrics(state)["clip/update_norm"])
    0.5
    """
    find_clip_states(opt_state)  # raises without a clipper
    warn_if_undone(opt_state)
    warn_if_micro_batches_are_clipped(opt_state)
    warn_if_replicas_differ(opt_state)
    gradients: list[dict[str, Array]] = []
    updates: list[dict[str, Array]] = []
    for state, is_update, clippers_before in find_clippers(opt_state):
        others = 0 if is_update else clippers_before
        measured = _compute_metrics(state, names, others)
        if is_update:
            updates.append(name_update_metrics(measured))
        else:
            gradients.append(measured)
    return _number(gradients) | _number(updates)


def _number(clippers: list[dict[str, Array]]) -> dict[str, Array]:
    """Return the metrics of all clippers of a kind; numbered if there are several."""
    if len(clippers) == 1:
        return clippers[0]
    return {
        name.replace("clip/", f"clip/{index}/", 1): value
        for index, metrics in enumerate(clippers)
        for name, value in metrics.items()
    }


def _compute_metrics(
    state: ClipState | SkipState, names: Sequence[str] | None, others: int
) -> dict[str, Array]:
    """Return the metrics of a clipper, with those of its loss policy."""
    if isinstance(state, ClipState):
        return _state_metrics(state, names, others)
    losses: dict[str, Array] = {}
    if (record := state.skip_loss) is not None:
        loss, threshold = record.skip_loss_value, record.skip_loss_threshold
        recorded = restore_names(record.skip_loss_state)
        losses = _copy(compute_loss_metrics(loss, threshold, recorded))
    return _state_metrics(state.skip_clip, names, others) | losses


def _state_metrics(
    state: ClipState, names: Sequence[str] | None, others: int
) -> dict[str, Array]:
    if state.clip_norm.ndim != 1:
        raise ValueError(
            "opt_state must hold norms of shape (rows,), got "
            f"{tuple(state.clip_norm.shape)}; for a vmapped state, compute the numbers "
            "of each member: jax.vmap(clip_metrics)(opt_state); for one of pmap, "
            f"{_find_pmap_way_out(state.clip_norm)}"
        )
    # `optax.contrib.sam` makes integers of booleans.
    clipped, finite = (
        jnp.asarray(flags, bool) for flags in (state.clip_clipped, state.clip_finite)
    )
    no = jnp.zeros_like(clipped)  # the tally counts skips and drops
    floats = state.clip_norm, state.clip_threshold, state.clip_scale
    decision = Decision(*floats, clipped, finite, skipped=no, dropped=no)
    tally, totals = restore_names(state.clip_tally), restore_names(state.clip_totals)
    measured = compute_metrics(
        decision, tally, jnp, totals=totals, other_clippers=others
    )
    numbers = _copy(measured)
    if names is None:
        return numbers
    names = _check_names(names, state.clip_norm.shape[0])
    if isinstance(state.clip_norm, jax.core.Tracer):
        return numbers | compute_row_metrics(names, decision, tally, jnp)
    # One transfer: XLA would compile a slice for every number, in 30 ms each.
    return numbers | compute_row_metrics(names, *jax.device_get((decision, tally)))


def _copy(metrics: dict[str, Array]) -> dict[str, Array]:
    """Return copies: a caller that donates the state deletes its counters."""
    return {name: jnp.copy(value) for name, value in metrics.items()}


def _find_pmap_way_out(norms: Array) -> str:
    """Return what to do with the norms of several replicas, which must be equal."""
    if isinstance(norms, jax.core.Tracer) or is_equal(norms, norms[:1]).all():
        return "pass one replica: jax.tree.map(lambda x: x[0], opt_state)"
    return AVERAGE_FIRST


def _check_names(names: Sequence[str], row_count: int) -> Sequence[str]:
    """Return the names of the rows of a clipper, "global" if it has only one row."""
    if len(names) == row_count:
        return names
    if row_count == 1:
        return ["global"]
    raise ValueError(
        f"names must have one entry per row, got {len(names)} for {row_count} rows; "
        "call row_names(params, ...) with the scope, labels, rule and exclude of the "
        "clipper; of clippers with other rows, pass one state at a time"
    )


def row_names(
    params: Any,
    *,
    scope: str | None = None,
    labels: Labels = None,
    rule: str = "flax",
    exclude: Mask = None,
) -> list[str]:
    """Return the name of each row of a clipper, in the order of its state.

    The entries of `ClipState.clip_norm` and of the other arrays have this order.

    | rows         | order                           | name                            |
    |--------------|---------------------------------|---------------------------------|
    | "parameter"  | of the leaves, `jax.tree.leaves`| `jax.tree_util.keystr` of a path|
    | "unit"       | of the leaves, then of the units| the path and the unit's number  |
    | labels       | of the labels as strings        | the label                       |
    | "global"     | one row                         | "global"                        |

    JAX sorts the keys of a dict as strings, and so do labels: `layers_10` comes before
    `layers_2`. A name belongs to its row whatever the order.

    Args:
      params: the parameters, or arrays of their shapes.
      scope, labels, rule: as in the transformation that clips. `clip_by_param_ratio`
        has the scope "unit" by default.
      exclude: as in `trust_clip`; or, for a clipper in `optax.masked`, the opposite of
        its mask.

    Raises:
      TypeError, ValueError: an argument breaks its rule; the message says which.

    >>> from autoclip_jax import clip_by_quantile
    >>> params = {"bias": jnp.zeros(2), "kernel": jnp.zeros((3, 2))}
    >>> names = row_names(params, scope="parameter")
    >>> names
    ["['bias']", "['kernel']"]
    >>> tx = clip_by_quantile(0.9, scope="parameter")
    >>> grads = {"bias": jnp.array([3.0, 4.0]), "kernel": jnp.ones((3, 2))}
    >>> _, state = tx.update(grads, tx.init(params))
    >>> float(clip_metrics(state, names)["clip/norm/['bias']"])
    5.0
    """
    if exclude is not None:
        flags = repeat_mask(exclude, params, "exclude")
        leaves, structure = jax.tree.flatten(params, is_leaf=is_none)
        pairs = zip(leaves, flags, strict=True)
        included = [optax.MaskedNode() if flag else leaf for leaf, flag in pairs]
        params = jax.tree.unflatten(structure, included)
    name = choose_scope(scope, None, labels)
    return Scope(name, labels, rule).rows(params).names
