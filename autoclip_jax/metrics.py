"""Numbers to log, from any optimizer state."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from autoclip_core import Decision
from autoclip_core.clipper.metrics import compute_metrics, name_update_metrics
from autoclip_core.loss import compute_loss_metrics

from .check_state import find_clip_states
from .skip_state import SkipState
from .state import ClipState, restore_names
from .update_clippers import find_clippers


def clip_metrics(opt_state: Any) -> dict[str, Array]:
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

    Args:
      opt_state: what `tx.init` or `tx.update` returned.

    Returns:
      Arrays of shape (), by name.

    Raises:
      ValueError: the state has no clipper, was made by `vmap`, or was saved by an
        earlier version.

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
    gradients: list[dict[str, Array]] = []
    updates: list[dict[str, Array]] = []
    for state, is_update in find_clippers(opt_state):
        measured = _compute_metrics(state)
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
        name.replace("clip/", f"clip/{index}/"): value
        for index, metrics in enumerate(clippers)
        for name, value in metrics.items()
    }


def _compute_metrics(state: ClipState | SkipState) -> dict[str, Array]:
    """Return the metrics of a clipper, with those of its loss policy."""
    if isinstance(state, ClipState):
        return _state_metrics(state)
    losses: dict[str, Array] = {}
    if (record := state.skip_loss) is not None:
        loss, threshold = record.skip_loss_value, record.skip_loss_threshold
        recorded = restore_names(record.skip_loss_state)
        losses = compute_loss_metrics(loss, threshold, recorded)
    return _state_metrics(state.skip_clip) | losses


def _state_metrics(state: ClipState) -> dict[str, Array]:
    if state.clip_norm.ndim != 1:
        raise ValueError(
            "opt_state must hold norms of shape (rows,), got "
            f"{tuple(state.clip_norm.shape)}; for a vmapped state, compute the numbers "
            "of each member: jax.vmap(clip_metrics)(opt_state)"
        )
    no = jnp.zeros_like(state.clip_clipped)  # the tally counts skips and drops
    decision = Decision(*state[1:6], skipped=no, dropped=no)  # clip_norm to clip_finite
    tally, totals = restore_names(state.clip_tally), restore_names(state.clip_totals)
    return compute_metrics(decision, tally, jnp, totals=totals)
