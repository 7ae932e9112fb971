"""Find the torch optimizer inside a wrapper, and the parameters that it steps."""

from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def unwrap(optimizer: Any) -> Optimizer:
    """Return the optimizer inside wrappers such as those of Accelerate and Lightning.

    A torch optimizer that has no hooks for its steps is a wrapper, too.

    Raises:
      TypeError: the argument neither is nor holds a torch optimizer with hooks.
    """
    inner = optimizer
    # An optimizer of torch has its own hooks. A wrapper has none, or forwards to
    # the hooks of the optimizer inside.
    while "_optimizer_step_pre_hooks" not in getattr(inner, "__dict__", {}):
        outer, inner = inner, get_inner(inner)
        if inner is None:
            raise TypeError(_explain(outer))
    return inner  # type: ignore[no-any-return]


def get_inner(wrapper: Any) -> Any:
    """Return the optimizer that a wrapper holds, or None.

    It is `.optimizer`, or the only torch optimizer among the attributes.
    """
    if (inner := getattr(wrapper, "optimizer", None)) is not None:
        return inner
    values = getattr(wrapper, "__dict__", {}).values()
    optimizers = {id(each): each for each in values if isinstance(each, Optimizer)}
    return next(iter(optimizers.values())) if len(optimizers) == 1 else None


def _explain(optimizer: Any) -> str:
    """Return why an object is not an optimizer that can be used."""
    kind = type(optimizer).__name__
    if isinstance(optimizer, Optimizer):
        return (
            f"optimizer must have torch's hooks for its steps, got {kind}, whose "
            "__init__ does not call that of torch.optim.Optimizer; call "
            "clipper.step() before optimizer.step(), or give the optimizer inside it"
        )
    return (
        "optimizer must be a torch.optim.Optimizer or a wrapper that holds one as "
        f".optimizer, got {kind}"
    )


def stepped_parameters(optimizer: Optimizer) -> list[Tensor]:
    """Return the parameters that an optimizer steps."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def stepped_parameter_ids(optimizer: Optimizer) -> set[int]:
    """Return the ids of the parameters that an optimizer steps."""
    return set(map(id, stepped_parameters(optimizer)))
