"""The parts of an optimizer state, and the chains in it."""

from collections import OrderedDict
from typing import Any

import jax

from autoclip_jax.skip_state import SkipState
from autoclip_jax.state import ClipState


def is_chain(part: Any) -> bool:
    """Return whether a part is the state of `optax.chain` or `optax.named_chain`."""
    return type(part) in (tuple, OrderedDict)


def list_children(part: Any) -> list[Any]:
    """Return the parts of a pytree, one level down."""
    children: list[Any] = jax.tree.leaves(part, is_leaf=lambda x: x is not part)
    return children


def list_leaves(part: Any) -> list[Any]:
    """Return the leaves of a part of a state, with clippers as leaves."""
    leaves: list[Any] = jax.tree.leaves(part, is_leaf=_is_clipper)
    return leaves


def has_clipper(part: Any) -> bool:
    """Return whether a part of a state holds a clipper, or `skip_steps`."""
    return any(map(_is_clipper, list_leaves(part)))


def _is_clipper(part: Any) -> bool:
    return isinstance(part, ClipState | SkipState)
