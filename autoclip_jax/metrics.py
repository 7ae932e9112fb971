"""Numbers to log, from any optimizer state."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from autoclip_core import Decision
from autoclip_core.clipper.metrics import compute_metrics

from .check_state import find_clip_states
from .clipper import ClipState


def clip_metrics(opt_state: Any) -> dict[str, Array]:
    """Return the `clip/...` numbers of the clipper in an optimizer state.

    The clipper may be inside chains, masks and partitions, and the call may be inside
    `jit`. `autoclip_core.clipper.metrics.compute_metrics` documents the names. With
    several clippers, each has its own numbers: `clip/0/norm`, `clip/1/norm` in the
    order of the state.

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
    """
    states = [state for _, state in find_clip_states(opt_state)]
    if len(states) == 1:
        return _state_metrics(states[0])
    return {
        name.replace("clip/", f"clip/{index}/"): value
        for index, state in enumerate(states)
        for name, value in _state_metrics(state).items()
    }


def _state_metrics(state: ClipState) -> dict[str, Array]:
    if state.clip_norm.ndim != 1:
        raise ValueError(
            "opt_state must hold norms of shape (rows,), got "
            f"{tuple(state.clip_norm.shape)}; for a vmapped state, compute the numbers "
            "of each member: jax.vmap(clip_metrics)(opt_state)"
        )
    no = jnp.zeros_like(state.clip_clipped)  # the tally counts skips and drops
    decision = Decision(*state[1:6], skipped=no, dropped=no)  # clip_norm to clip_finite
    return compute_metrics(decision, state.clip_tally, jnp)
