"""Continue the histories of a clipper whose parameters have changed."""

from typing import Any

import numpy as np
import torch

from autoclip_core.history.full import widen
from autoclip_torch.rows.rows import Rows

from .policy_states import PolicyStates

_Array = np.ndarray[Any, Any]


def continue_rows(old: PolicyStates, rows: Rows, sources: _Array) -> PolicyStates:
    """Return the policy states for other rows.

    Args:
      old: the policy states of the present rows.
      rows: the rows from now on.
      sources: the present row that each of them continues, or -1; shape (rows,). A row
        under another policy continues none.
    """
    new = PolicyStates(rows, old.nonfinite)
    new.move_to(old.device)
    new.losses = old.losses
    new.may_skip |= old.may_skip
    blocks = zip(old.rows.by_policy, old.states, strict=True)
    by_policy = {block.policy: (block, state) for block, state in blocks}
    sources = sources.copy()
    for index, block in enumerate(rows.by_policy):
        part = sources[block.start : block.stop]  # a view
        if block.policy not in by_policy:
            part[:] = -1
            continue
        before, state = by_policy[block.policy]
        part[(part < before.start) | (part >= before.stop)] = -1
        indices = _find_indices(old, part, before.start, before.stop)
        new.states[index] = _take_rows(state, new.states[index], indices, old.xp)
    indices = _find_indices(old, sources, 0, len(old.rows.names))
    counts = {
        name: _take_rows(
            getattr(old.tally, name), getattr(new.tally, name), indices, old.xp
        )
        for name in ("observed", "clipped")
    }
    new.tally = old.tally._replace(**counts)
    return new


def _find_indices(old: PolicyStates, sources: _Array, start: int, stop: int) -> Any:
    """Return the index of each row in the rows start ... stop - 1 and new ones."""
    new = stop - start + np.arange(len(sources))
    indices = np.where(sources < 0, new, sources - start)
    return old.as_array(torch.from_numpy(indices))


def _take_rows(old: Any, new: Any, indices: Any, xp: Any) -> Any:
    """Return rows of two states: indices count those of the old one, then the new."""
    if isinstance(new, tuple):
        pairs = zip(old, new, strict=True)
        return type(new)(*(_take_rows(o, n, indices, xp) for o, n in pairs))
    return xp.concatenate([old, widen(new, old)])[indices]
