"""An optimizer around another one, with the same groups and the same state."""

from typing import Any

import torch

from autoclip_torch.step.amp import CONTROLS
from autoclip_torch.step.unwrap import unwrap

_STATE_HOOKS = (
    "register_state_dict_pre_hook",
    "register_state_dict_post_hook",
    "register_load_state_dict_pre_hook",
    "register_load_state_dict_post_hook",
)


class OptimizerWrapper(torch.optim.Optimizer):
    """An optimizer that shares groups, state and attributes with one inside."""

    optimizer: torch.optim.Optimizer
    """The optimizer inside."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        """Share everything but the hooks before and after a step."""
        check_is_optimizer(optimizer)
        # An optimizer without hooks, such as PostLocalSGDOptimizer, has no defaults.
        defaults = dict(getattr(optimizer, "defaults", {}))
        # The base class creates the hooks here. In `__init__` it would also replace
        # groups and state.
        super().__setstate__({"optimizer": optimizer, "defaults": defaults})
        # The optimizer inside saves and loads, so it runs the hooks on its state.
        for name in _STATE_HOOKS:
            self.__dict__[name] = getattr(unwrap(optimizer), name)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of the optimizer inside."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The state of the optimizer inside."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    def __getattr__(self, name: str) -> Any:
        """Return a public attribute of the optimizer inside."""
        if name.startswith("_") or name in CONTROLS or "optimizer" not in vars(self):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.optimizer, name)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients.

        Args:
          set_to_none: whether each gradient becomes None; if not, it becomes 0.

        >>> from autoclip_torch import NormClip
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> sgd = torch.optim.SGD([weight], lr=1.0)
        >>> optimizer = NormClip.as_optimizer(sgd, max_norm=1.0)
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> optimizer.zero_grad(set_to_none=False)
        >>> weight.grad
        tensor([0., 0.])
        """
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def _find_innermost(self) -> torch.optim.Optimizer:
        """Return the optimizer whose step runs the hooks."""
        optimizer = self.optimizer
        while isinstance(optimizer, OptimizerWrapper):
            optimizer = optimizer.optimizer
        return unwrap(optimizer)


def check_is_optimizer(optimizer: Any) -> None:
    """Refuse what cannot be wrapped, such as a wrapper that is no torch optimizer.

    Raises:
      TypeError: the argument is not a torch optimizer.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
            "; make the optimizer first, then wrap it; clipper.attach accepts a "
            "wrapper that holds an optimizer"
        )
