"""Hooks before and after a step of an optimizer, which act once in each step."""

import weakref
from abc import ABC, abstractmethod
from typing import Any, Self

from torch.optim import Optimizer

from .optimizers import make_hooks_run, refuse_other_steps, refuse_step_in_backward


class StepHooks(ABC):
    """The hooks `_before_step` and `_after_step` on an optimizer.

    A copied or unpickled optimizer has no hooks, because torch drops all of them.

    Args:
      optimizer: the innermost torch optimizer. It keeps this object alive.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        """Register the hooks, on an optimizer that will run them.

        Raises:
          ValueError: it steps in other methods, too.
          RuntimeError: as in `make_hooks_run`.
        """
        refuse_step_in_backward(optimizer)
        refuse_other_steps(optimizer)
        make_hooks_run(optimizer)
        self._optimizer = weakref.ref(optimizer)
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    @classmethod
    def find(cls, optimizer: Optimizer) -> Self | None:
        """Return the object of this class that is registered on the optimizer."""
        hooks = optimizer._optimizer_step_pre_hooks.values()
        owners = (getattr(hook, "__self__", None) for hook in hooks)
        return next((owner for owner in owners if isinstance(owner, cls)), None)

    @property
    def active(self) -> bool:
        """Whether it acts: until `remove()`, or until the optimizer is deleted."""
        hook = self._hooks[0]
        return hook.id in (hook.hooks_dict_ref() or {})

    def remove(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def __reduce__(self) -> Any:
        """Copy this object as None, because the copied optimizer has no hooks."""
        return type(None), ()

    @abstractmethod
    def _before_step(
        self, optimizer: Optimizer, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        """Act before the step, and return other arguments of `step`, if any."""

    @abstractmethod
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Act after the step."""
