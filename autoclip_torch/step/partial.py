"""Steps within the backward pass, before a norm of several gradients is known."""

import torch

from autoclip_torch.rows.rows import Rows

from .warn import warn


def warn_of_partial_norms(rows: Rows) -> None:
    """Warn if the backward pass has yet to make gradients of a row that is measured."""
    if torch._C._current_graph_task_id() == -1:  # nothing public tells it
        return
    begun = {
        entry.start for entry in rows.by_parameter if entry.parameter.grad is not None
    }
    awaited = [
        entry.parameter
        for entry in rows.by_parameter
        if entry.start in begun
        and entry.parameter.requires_grad
        and entry.parameter.grad is None
    ]
    if awaited:
        warn(
            "the clipper was stepped within the backward pass, where "
            f"{len(awaited)} gradients of the norms it measures are not there yet, so "
            "that each of its steps is one of partial norms; there, make a clipper for "
            "each parameter, or step after the backward"
        )
