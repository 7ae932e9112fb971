"""What to log, out of any optimizer state."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from autoclip_core import Decision
from autoclip_core.clipper.metrics import compute_metrics

from .clipper import ClipState


def clip_metrics(opt_state: Any) -> dict[str, Array]:
    """Return the `clip/...` numbers of the clipper in an optimizer state.

    It may be anywhere in chains, masks and partitions, and this may be called inside
    `jit`. The names are those of `autoclip_core.clipper.metrics.compute_metrics`. Of
    several clippers each has its own numbers, as `clip/0/norm`, `clip/1/norm` in the
    order of the state.

    Args:
      opt_state: what `tx.init` or `tx.update` returned.

    Returns:
      Arrays of shape (), by name.

    Raises:
      ValueError: there is no clipper in the state, or it is one of a `vmap`.

    >>> import optax
    >>> from autoclip_jax import clip_by_quantile
    >>> tx = optax.chain(clip_by_quantile(0.9), optax.adam(1e-3))
    >>> params = jnp.zeros(2)
    >>> _, state = tx.update(jnp.array([3.0, 4.0]), tx.init(params), params)
    >>> float(clip_metrics(state)["clip/norm"])
    5.0
    """
    found = [
        leaf for leaf in jax.tree.leaves(opt_state, is_leaf=_is_clip) if _is_clip(leaf)
    ]
    if not found:
        raise ValueError(
            "opt_state must hold the state of a clipper, got none; pass what tx.init "
            "or tx.update returned"
        )
    if len(found) == 1:
        return _metrics(found[0])
    return {
        name.replace("clip/", f"clip/{index}/"): value
        for index, state in enumerate(found)
        for name, value in _metrics(state).items()
    }


def _metrics(state: ClipState) -> dict[str, Array]:
    if state.clip_norm.ndim != 1:
        raise ValueError(
            "opt_state must hold norms of shape (rows,), got "
            f"{tuple(state.clip_norm.shape)}; of a vmapped state each member has its "
            "own: jax.vmap(clip_metrics)(opt_state)"
        )
    skipped = jnp.zeros_like(state.clip_clipped)
    decision = Decision(
        state.clip_norm,
        state.clip_threshold,
        state.clip_scale,
        state.clip_clipped,
        state.clip_finite,
        skipped,
    )
    return compute_metrics(decision, state.clip_tally, jnp)


def _is_clip(leaf: Any) -> bool:
    return isinstance(leaf, ClipState)
