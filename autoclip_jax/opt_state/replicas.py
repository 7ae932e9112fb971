"""Notice replicas that decide on different gradients or losses."""

import warnings
from typing import Any

import jax

from autoclip_jax.gradients.mesh import has_unequal_copies
from autoclip_jax.skip_state import SkipLoss
from autoclip_jax.state import ClipState

from .find_states import list_states

AVERAGE_FIRST = (
    "the replicas decide on different gradients or losses; average both before the "
    "clip, not after it: grads, loss = jax.lax.pmean((grads, loss), axis_name). In "
    "shard_map with check_vma=True, call pmean on the loss inside jax.grad instead"
)


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
