"""Find the states of transformations in an optimizer state, and validate them."""

import warnings
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from autoclip_core.history.validation import find_problems
from autoclip_core.loss import LossState

from .gradients.mesh import has_unequal_copies
from .positions import warn_if_micro_batches_are_clipped
from .skip_state import SkipLoss
from .state import (
    ClipState,
    add_prefix,
    bound,
    is_earlier_state,
    rename_fields,
    restore_names,
    unbound,
)

State = TypeVar("State")

AVERAGE_FIRST = (
    "the replicas decide on different gradients or losses; average both before the "
    "clip, not after it: grads, loss = jax.lax.pmean((grads, loss), axis_name). In "
    "shard_map with check_vma=True, call pmean on the loss inside jax.grad instead"
)


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


def upgrade_state(old: Any) -> Any:
    """Return an optimizer state of an earlier version in the present structure.

    Earlier versions named some fields as optax does (`count`, `mean`, `inner_state`).
    They did not count the steps with a dropped row, had only the norm "l2", and had no
    loss policy. The fields get their present names, the missing count starts at 0, and
    `clip_totals` and `skip_loss` are None. All else is unchanged.

    Args:
      old: the restored optimizer state: the objects themselves, from a pickle, or the
        nested dicts to which a format of names restores them.

    >>> import jax.numpy as jnp
    >>> from autoclip_core import StreamingQuantile
    >>> from autoclip_core.clipper.metrics import empty_tally
    >>> from autoclip_jax import clip_by_policy
    >>> policy = StreamingQuantile()
    >>> state = clip_by_policy(policy).init(jnp.zeros(2))
    >>> old = state._replace(clip_policy=policy.init(1), clip_tally=empty_tally(1))
    >>> upgrade_state(old).clip_policy._fields
    ('policy_level',)
    """
    return jax.tree.map(_upgrade, old, is_leaf=_is_earlier)


_PREFIXES = {
    "clip_policy": "policy_",
    "clip_tally": "tally_",
    "clip_totals": "totals_",
    "skip_loss_state": "loss_",
}
"""The fields that hold a state of the core, and the prefix of its names."""


def _is_earlier(part: Any) -> bool:
    """Return whether a part of a state may need new names; a dict may have either."""
    if isinstance(part, Mapping):
        markers = {*_PREFIXES, "skip_clip", "trust_gradient"}
        return not markers.isdisjoint(part)
    if isinstance(part, ClipState):
        return is_earlier_state(part)
    return isinstance(part, SkipLoss) and isinstance(part.skip_loss_state, LossState)


def _upgrade(part: Any) -> Any:
    if not _is_earlier(part):
        return part
    if isinstance(part, Mapping):
        return _upgrade_dict(part)
    fields = part._asdict()
    if isinstance(part, ClipState) and part.clip_tally.dropped is None:
        dropped = jnp.zeros_like(part.clip_tally.steps)
        fields["clip_tally"] = part.clip_tally._replace(dropped=dropped)
    for name in _PREFIXES.keys() & fields.keys():
        fields[name] = rename_fields(bound(fields[name]), _PREFIXES[name])
    return type(part)(**fields)


def _upgrade_dict(old: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a state under their present names, and the later fields."""
    new: dict[str, Any] = {}
    for name, value in old.items():
        if name in _PREFIXES:
            new[name] = _rename_keys(bound(value), _PREFIXES[name])
            continue
        if name == "inner_state":
            name = "skip_inner_state" if "skip_clip" in old else "trust_inner_state"
        new[name] = upgrade_state(value)
    if "clip_policy" in new:
        new.setdefault("clip_totals", None)
    if "skip_clip" in new:
        new.setdefault("skip_loss", None)
    if "clip_tally" in new:
        tally = new["clip_tally"]
        tally.setdefault("tally_dropped", jnp.zeros_like(tally["tally_steps"]))
    return new


def _rename_keys(part: Any, prefix: str) -> Any:
    """Return a state of the core, as nested dicts, with a prefix before each name."""
    if not isinstance(part, Mapping):
        return part
    return {add_prefix(n, prefix): _rename_keys(v, prefix) for n, v in part.items()}


def warn_if_replicas_differ(opt_state: Any) -> None:
    """Warn if the copies of a norm or of a loss differ between devices.

    Inside `jit` nothing is read.
    """
    norms = [state.clip_norm for _, state in list_states(opt_state, ClipState)]
    losses = [state.skip_loss_value for _, state in list_states(opt_state, SkipLoss)]
    for array in jax.tree.leaves([norms, losses]):
        is_traced = isinstance(array, jax.core.Tracer)
        if is_traced or not isinstance(array, jax.Array):
            continue
        if has_unequal_copies(array):
            # The text has no numbers, so Python shows it once per place.
            warnings.warn(AVERAGE_FIRST, RuntimeWarning, stacklevel=3)
            return


def _split_members(state: Any) -> Iterator[Any]:
    """Yield the state, or each member of a state that `vmap` made.

    The second field is the norm of each row, or the loss: one axis without `vmap`.
    """
    if state[1].ndim < 2:
        yield state
        return
    for index in range(len(state[1])):
        yield from _split_members(jax.tree.map(lambda leaf, i=index: leaf[i], state))


def find_clip_states(opt_state: Any) -> list[tuple[str, ClipState]]:
    """Return the path and the state of each clipper.

    Raises:
      ValueError: the optimizer state has none, or an earlier version saved it.
    """
    states = find_states(opt_state, ClipState, "a clipper")
    for path, state in states:
        if is_earlier_state(state):
            raise ValueError(
                "opt_state must have the present structure, but an earlier version "
                f"saved {path}.clip_tally; call upgrade_state(opt_state)"
            )
    return states


def find_states(
    opt_state: Any, kind: type[State], owner: str
) -> list[tuple[str, State]]:
    """Return the path and the state of each transformation of a kind.

    Raises:
      ValueError: the optimizer state has none.
    """
    states = list_states(opt_state, kind)
    if not states:
        raise ValueError(
            f"opt_state must hold the state of {owner}, got none; pass the state that "
            "tx.init or tx.update returned, or its restored copy"
        )
    return states


def list_states(opt_state: Any, kind: type[State]) -> list[tuple[str, State]]:
    """Return the path and the state of each part of a kind; there may be none."""

    def is_state(leaf: Any) -> bool:
        return isinstance(leaf, kind)

    leaves = jax.tree_util.tree_leaves_with_path(opt_state, is_leaf=is_state)
    pairs = ((jax.tree_util.keystr(path), leaf) for path, leaf in leaves)
    return [(path, leaf) for path, leaf in pairs if is_state(leaf)]
