"""Load several states, or none of them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


@contextmanager
def undo_on_error(clippers: Sequence[Any]) -> Iterator[None]:
    """Restore the states of clippers if an exception is raised while states load."""
    # On a device, loading overwrites the present tensors: a state dict is a copy.
    before = [(c, c.state_dict(), c._policy_states.decision) for c in clippers]
    try:
        yield
    except Exception:
        for clipper, state, decision in before:
            clipper.load_state_dict(state)
            clipper._policy_states.decision = decision
        raise
