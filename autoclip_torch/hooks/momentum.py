"""The momentum of a fused SGD whose first step is cancelled.

The optimizer allocates `momentum_buffer` without a value, and its kernel fills it. A
cancelled kernel writes nothing, and the next step would read undefined values.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from autoclip_torch.gradients.dtensor import is_sharded


def find_parameters_without_momentum(optimizer: Optimizer) -> list[Tensor]:
    """Return the parameters whose momentum buffer the next step creates."""
    groups = (group for group in optimizer.param_groups if group.get("momentum"))
    return [p for group in groups for p in _without_momentum(optimizer, group)]


def remove_unwritten_momentum(
    optimizer: Optimizer, parameters: list[Tensor], cancelled: Tensor
) -> None:
    """Remove the momentum buffers that a cancelled step has created.

    Args:
      optimizer: it has taken a step.
      parameters: those that had no momentum before the step.
      cancelled: not 0 if the step was cancelled; on a device it is not read.
    """
    if not parameters or (cancelled.is_cpu and not cancelled.any()):
        return
    for parameter in parameters:
        momentum = _get_momentum(optimizer, parameter)
        if momentum is None:
            continue
        if cancelled.is_cpu:
            state = optimizer.state[parameter]
            del state["momentum_buffer"]
            if not state:
                del optimizer.state[parameter]
        else:
            # To remove it, the CPU would have to wait for the device: it is set to 0.
            # With dampening 0 the next step then equals a first step; otherwise the
            # gradient of that step is damped, too.
            is_cancelled = cancelled.to(momentum.device, non_blocking=True) != 0
            local = momentum.to_local() if is_sharded(momentum) else momentum
            local.masked_fill_(is_cancelled, 0.0)


def initialize_momentum(optimizer: Optimizer) -> None:
    """Create momentum of 0 before a first step that a GradScaler may cancel.

    The result of a first step is the same, unless dampening is not 0: such a group is
    left unchanged.
    """
    for group in optimizer.param_groups:
        if group.get("momentum") and not group["dampening"]:
            for parameter in _without_momentum(optimizer, group):
                zero = torch.zeros_like(parameter.grad)
                optimizer.state[parameter]["momentum_buffer"] = zero


def _without_momentum(optimizer: Optimizer, group: dict[str, Any]) -> list[Any]:
    """Return the parameters of a group whose momentum its next step creates."""
    return [
        parameter
        for parameter in group["params"]
        if parameter.grad is not None and _get_momentum(optimizer, parameter) is None
    ]


def _get_momentum(optimizer: Optimizer, parameter: Tensor) -> Any:
    # `optimizer.state[parameter]` would create an empty state.
    return optimizer.state.get(parameter, {}).get("momentum_buffer")
