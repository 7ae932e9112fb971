"""Find the torch optimizer inside a wrapper, and the parameters that it steps."""

from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def unwrap(optimizer: Any) -> Optimizer:
    """Return the optimizer inside wrappers such as those of Accelerate and Lightning.

    Raises:
      TypeError: the argument neither is nor holds a torch optimizer.
    """
    inner = optimizer
    # An optimizer of torch has its own hooks. A wrapper has none, or forwards to
    # the hooks of the optimizer inside.
    while "_optimizer_step_pre_hooks" not in getattr(inner, "__dict__", {}):
        inner = getattr(inner, "optimizer", None)
        if inner is None:
            raise TypeError(
                "optimizer must be a torch.optim.Optimizer or a wrapper that holds one "
                f"as .optimizer, got {type(optimizer).__name__}"
            )
    return inner  # type: ignore[no-any-return]


def stepped_parameters(optimizer: Optimizer) -> list[Tensor]:
    """Return the parameters that an optimizer steps."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def stepped_parameter_ids(optimizer: Optimizer) -> set[int]:
    """Return the ids of the parameters that an optimizer steps."""
    return set(map(id, stepped_parameters(optimizer)))
