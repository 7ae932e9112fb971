"""Validate the states of clippers in an optimizer state."""

from collections.abc import Iterator
from typing import Any

import jax

from autoclip_core.history.validation import find_problems
from autoclip_jax.skip_state import SkipLoss
from autoclip_jax.state import ClipState, restore_names, unbound

from .find_states import find_clip_states, list_states
from .micro_batches import warn_if_micro_batches_are_clipped
from .replicas import warn_if_replicas_differ


def check_state(opt_state: Any) -> None:
    """Raise if the state of a clipper in an optimizer state is invalid.

    Call it once after you restore a checkpoint, outside of `jit`. A NaN, a negative
    level or a count out of bounds in the policy state would give thresholds that are
    NaN or negative. `update` checks only shapes and types, because it is traced without
    the numbers.

    A state whose copies differ between devices is a `RuntimeWarning`: the gradients, or
    the losses of `skip_steps`, were not averaged before the clip. So is a clipper
    before `optax.MultiSteps` or `optax.apply_every` in a chain: it clips each
    micro-batch.

    Args:
      opt_state: the restored state, or an `nnx.Optimizer`. Clippers are found inside
        chains, masks, `vmap` and other wrappers.

    Raises:
      ValueError: the state of a clipper is invalid; the message says where and how. Or
        an earlier version saved it. Or the optimizer state has no clipper.

    >>> import jax.numpy as jnp
    >>> from autoclip_jax import clip_by_zscore
    >>> state = clip_by_zscore().init(jnp.zeros(2))
    >>> check_state(state)
    >>> invalid = state.clip_policy._replace(policy_deviation=jnp.array([-1.0]))
    >>> check_state(state._replace(clip_policy=invalid))
    Traceback (most recent call last):
        ...
    ValueError: opt_state is invalid: .clip_policy: deviation must be >= 0 and finite, \
got -1.0; restore a valid checkpoint
    """
    warn_if_replicas_differ(opt_state)
    warn_if_micro_batches_are_clipped(opt_state)
    states = *find_clip_states(opt_state), *list_states(opt_state, SkipLoss)
    for path, state in states:
        is_signed = isinstance(state, SkipLoss)
        for member in _split_members(_read_arrays(state)):
            for problem in find_problems(_restore(member), path, is_signed=is_signed):
                raise ValueError(
                    f"opt_state is invalid: {problem}; restore a valid checkpoint"
                )


def _read_arrays(state: Any) -> Any:
    """Return the state in NumPy; `nnx.Optimizer` has a wrapper around each array."""
    if isinstance(state, tuple):
        return type(state)(*map(_read_arrays, state))
    arrays = jax.tree.leaves(state)
    return jax.device_get(arrays[0]) if arrays else state


def _restore(state: Any) -> Any:
    """Return a state, in NumPy, with the names and the infinities of the core."""
    name = "clip_policy" if isinstance(state, ClipState) else "skip_loss_state"
    part = jax.device_get(unbound(getattr(state, name)))
    return restore_names(state._replace(**{name: part}))


def _split_members(state: Any) -> Iterator[Any]:
    """Yield the state, or each member of a state that `vmap` made.

    The second field is the norm of each row, or the loss: one axis without `vmap`.
    """
    if state[1].ndim < 2:
        yield state
        return
    for index in range(len(state[1])):
        yield from _split_members(jax.tree.map(lambda leaf, i=index: leaf[i], state))
