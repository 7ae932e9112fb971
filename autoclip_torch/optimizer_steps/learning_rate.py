"""Which parameters an optimizer does not change, because its learning rate is 0."""

from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def is_frozen(group: dict[str, Any]) -> bool:
    """Return whether the learning rate is 0. No tensor is read from a device."""
    rate = group.get("lr")
    is_on_device = isinstance(rate, Tensor) and rate.device.type != "cpu"
    return not is_on_device and bool(rate == 0)


def changes_nothing(optimizer: Optimizer) -> bool:
    """Return whether there is no gradient and no learning rate above 0.

    Such a step only creates the state of the optimizer.
    """
    groups = optimizer.param_groups
    has_gradient = any(p.grad is not None for g in groups for p in g["params"])
    return not has_gradient and all(map(is_frozen, groups))
