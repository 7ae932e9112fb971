"""Hooks before and after a step of an optimizer, which act once in each step."""

import weakref
from abc import ABC, abstractmethod
from typing import Any, Self

from torch.optim import Optimizer

from .hooked_step import make_hooks_run

STEP_METHODS = (
    "first_step",
    "second_step",
    "third_step",
    "ascent_step",
    "descent_step",
)
"""Methods other than `step` that step an optimizer, in SAM and similar optimizers."""


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
        _refuse_other_steps(optimizer)
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


def refuse_step_in_backward(optimizer: Any) -> None:
    """Refuse an optimizer that steps within the backward pass.

    Raises:
      ValueError: it does, as LOMO and an overlapping `ZeroRedundancyOptimizer` do.
    """
    if callable(getattr(optimizer, "fused_backward", None)):
        where = "fused_backward; use its own arguments for clipping"
    elif getattr(optimizer, "_overlap_with_ddp", False):
        where = "the hooks of DDP; leave overlap_with_ddp=True out"
    else:
        return
    raise ValueError(
        f"optimizer must step after the backward pass, got {_name(optimizer)}, which "
        f"steps within {where}"
    )


def _refuse_other_steps(optimizer: Any) -> None:
    if methods := [m for m in STEP_METHODS if callable(getattr(optimizer, m, None))]:
        lines = ", ".join(f'"clipper.step(); optimizer.{m}()"' for m in methods)
        raise ValueError(
            f"optimizer must step in step() alone, got {_name(optimizer)}, which also "
            f"steps in {' and '.join(methods)}, where torch runs no hook; write {lines}"
            ", each after its backward pass, or use as_optimizer(optimizer, ...)"
        )


def _name(optimizer: Any) -> str:
    return type(optimizer).__name__
