"""A fused SGD whose first step is cancelled has a momentum that nobody has written.

It makes `momentum_buffer` of empty memory, for its kernel to fill; told to change
nothing, the kernel leaves in it whatever was there, and the next step goes on with it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from autoclip_torch.gradients.ranks import is_sharded


def without_momentum(optimizer: Optimizer) -> list[Tensor]:
    """Return the parameters whose momentum the next step makes."""
    groups = (group for group in optimizer.param_groups if group.get("momentum"))
    return [parameter for group in groups for parameter in _unset(optimizer, group)]


def forget_unwritten(
    optimizer: Optimizer, parameters: list[Tensor], cancelled: Tensor
) -> None:
    """Take away the momentum that a cancelled step has made.

    Args:
      optimizer: it has taken a step.
      parameters: those that had no momentum before.
      cancelled: not 0 where the step was cancelled; on a device it is not read.
    """
    if not parameters or (cancelled.is_cpu and not cancelled.any()):
        return
    for parameter in parameters:
        momentum = _momentum(optimizer, parameter)
        if momentum is None:
            continue
        if cancelled.is_cpu:
            state = optimizer.state[parameter]
            del state["momentum_buffer"]
            if not state:
                del optimizer.state[parameter]
        else:
            # From 0 the next step makes what a first one does, if dampening is 0; else
            # it damps that, too. To leave it out, the host would have to wait.
            where = cancelled.to(momentum.device, non_blocking=True) != 0
            own = momentum.to_local() if is_sharded(momentum) else momentum
            own.masked_fill_(where, 0.0)


def start_from_zero(optimizer: Optimizer) -> None:
    """Write the momentum before a first step that somebody else may cancel.

    A first step makes the same of it, but where dampening is not 0: that is left alone.
    """
    for group in optimizer.param_groups:
        if group.get("momentum") and not group["dampening"]:
            for parameter in _unset(optimizer, group):
                zero = torch.zeros_like(parameter.grad)
                optimizer.state[parameter]["momentum_buffer"] = zero


def _unset(optimizer: Optimizer, group: dict[str, Any]) -> list[Any]:
    """Return what a step of the group gives a momentum that it has not."""
    return [
        parameter
        for parameter in group["params"]
        if parameter.grad is not None and _momentum(optimizer, parameter) is None
    ]


def _momentum(optimizer: Optimizer, parameter: Tensor) -> Any:
    # Asked by its key, the mapping would make an empty state.
    return optimizer.state.get(parameter, {}).get("momentum_buffer")
