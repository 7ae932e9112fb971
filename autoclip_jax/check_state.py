"""Whether a state that was read from somewhere is one that a run leaves behind."""

from collections.abc import Iterator
from typing import Any

import jax

from autoclip_core.history.validation import find_problems

from .clipper import ClipState


def check_state(opt_state: Any) -> None:
    """Raise if the memory of a clipper anywhere in a state is broken.

    Call it on the host, once, after a checkpoint was restored: NaN, a negative level or
    a count out of bounds would give thresholds that are NaN or negative. `update` sees
    shapes and types only, because the numbers are not known when it is traced.

    Args:
      opt_state: what was restored; it looks into chains, masks, `vmap` and so on.

    Raises:
      ValueError: a clipper's memory is broken; the message says where and how. Or there
        is no clipper in the state.

    >>> import jax.numpy as jnp
    >>> from autoclip_jax import clip_by_zscore
    >>> state = clip_by_zscore().init(jnp.zeros(2))
    >>> check_state(state)
    >>> broken = state.clip_policy._replace(deviation=jnp.array([-1.0]))
    >>> check_state(state._replace(clip_policy=broken))
    Traceback (most recent call last):
        ...
    ValueError: opt_state is broken: .clip_policy: deviation must be >= 0 and finite, \
got -1.0; restore a checkpoint that is whole
    """
    found = [
        (jax.tree_util.keystr(path), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(opt_state, is_leaf=_ours)
        if _ours(leaf)
    ]
    if not found:
        raise ValueError(
            "opt_state must hold the state of a clipper, got none; pass what was "
            "restored for tx.update"
        )
    for path, state in found:
        for member in _members(jax.device_get(state)):
            for fault in find_problems(member, path):
                raise ValueError(
                    f"opt_state is broken: {fault}; restore a checkpoint that is whole"
                )


def _members(state: ClipState) -> Iterator[ClipState]:
    """Yield the state, or those of which `vmap` made it."""
    if state.clip_norm.ndim < 2:
        yield state
        return
    for index in range(len(state.clip_norm)):
        yield from _members(jax.tree.map(lambda leaf, i=index: leaf[i], state))


def _ours(leaf: Any) -> bool:
    return isinstance(leaf, ClipState)
