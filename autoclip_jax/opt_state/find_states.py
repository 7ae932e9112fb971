"""Find the states of transformations in an optimizer state."""

from typing import Any, TypeVar

import jax

from autoclip_jax.state import ClipState, is_earlier_state

State = TypeVar("State")


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
