"""Notice a norm that has the gradients of frozen leaves."""

import warnings
from typing import Any

import jax
from optax import EmptyState, MaskedState
from optax.transforms import PartitionState

from autoclip_jax.state import ClipState, TrustState

from .tree import is_chain, list_children


def warn_if_frozen_are_measured(opt_state: Any) -> None:
    """Warn if a clipper with one norm acts before a partition with frozen leaves.

    A label without a state is that of `optax.set_to_zero`. Only the structure of the
    state is read, so it works inside `jit`.
    """
    if _has_frozen_behind_clipper(opt_state):
        warnings.warn(
            "a clipper acts before a partition that has a label without a state, such "
            "as set_to_zero, so unless the gradients of its leaves are 0, they are in "
            "the norm of the others; clip inside of the partition: "
            'optax.partition({"train": optax.chain(clip, optimizer), "freeze": '
            'optax.set_to_zero()}, labels), or {"train": trust_clip(optimizer), ...}',
            RuntimeWarning,
            stacklevel=3,
        )


def _has_frozen_behind_clipper(part: Any) -> bool:
    """Return whether a chain in a state freezes leaves behind a clipper of one norm."""
    if not _has_frozen(part):  # nothing to find, such as in an array
        return False
    children = list_children(part)
    links = children if is_chain(part) or isinstance(part, TrustState) else []
    has_clipper = False
    for link in links:
        if has_clipper and _has_frozen(link):
            return True
        has_clipper |= isinstance(link, ClipState) and link.clip_norm.shape == (1,)
    return any(map(_has_frozen_behind_clipper, children))


def _has_frozen(part: Any) -> bool:
    """Return whether a part of a state has a partition with a label without a state."""
    frozen = MaskedState(EmptyState())
    leaves = jax.tree.leaves(part, is_leaf=lambda x: isinstance(x, PartitionState))
    return any(
        isinstance(leaf, PartitionState) and frozen in leaf.inner_states.values()
        for leaf in leaves
    )
