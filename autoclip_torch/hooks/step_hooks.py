"""Hooks before and after a step of an optimizer, which act once in each step."""

import sys
import weakref
from abc import ABC, abstractmethod
from types import FrameType
from typing import Any, Self

import torch
from torch.optim import Optimizer

_HOOKED_STEP = Optimizer.profile_hook_step(lambda optimizer: None).__code__
"""The code that runs the hooks, the same for every class of optimizers."""


class StepHooks(ABC):
    """The hooks `_before_step` and `_after_step` on an optimizer.

    A copied or unpickled optimizer has no hooks, because torch drops all of them.

    Args:
      optimizer: the innermost torch optimizer. It keeps this object alive.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        """Register the hooks."""
        self._optimizer = weakref.ref(optimizer)
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    @classmethod
    def find_all(cls, optimizer: Optimizer) -> list[Self]:
        """Return the objects of this class that are registered on the optimizer."""
        hooks = optimizer._optimizer_step_pre_hooks.values()
        owners = (getattr(hook, "__self__", None) for hook in hooks)
        return [owner for owner in owners if isinstance(owner, cls)]

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


def is_outermost_step(optimizer: Optimizer) -> bool:
    """Return whether a hook runs in the outermost call of the optimizer's `step`.

    A subclass may call `super().step()`. torch then runs the hooks in both calls, and
    the clippers act in the outer one. A count of open calls would be wrong after a step
    that raised an error.
    """
    if torch.compiler.is_compiling():  # traced code has no frames
        return True
    calls = 0
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _HOOKED_STEP and frame.f_locals.get("self") is optimizer:
            calls += 1
        frame = frame.f_back
    return calls < 2
