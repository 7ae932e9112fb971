"""Warn if another optimizer steps in place of the one in which a clipper acts."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import (
    _global_optimizer_post_hooks,
    register_optimizer_step_post_hook,
)
from torch.utils.weak import TensorWeakRef

from autoclip_torch.step.unwrap import stepped_parameter_ids
from autoclip_torch.step.warn import warn

from .open_steps import is_in_step, is_outermost_step


class SwapCheck:
    """Whether one clipper acts in the steps of its parameters.

    torch calls this object after each step of any optimizer. It keeps neither the
    clipper nor the optimizer nor a parameter alive, and it outlives the first two: the
    optimizer that steps the same parameters next is not clipped. The check ends with
    `remove`, or when another clipper gets one of the parameters.

    Args:
      optimizer: the optimizer in whose step the clipper acts.
      is_wrapped: whether the clipper acts in the step of a `ClippedOptimizer` around
        it, and not in each of its steps.
    """

    def __init__(self, optimizer: Optimizer, is_wrapped: bool) -> None:
        """Start without parameters, before the first step."""
        self.owner = weakref.ref(optimizer)
        self.has_acted = False
        """Whether the clipper has acted since a step of an optimizer."""
        self._is_wrapped = is_wrapped
        self._has_ended = False
        self._parameters: list[TensorWeakRef] = []
        self._label = ""
        self._others = self._usual_others = self._missed = 0
        self._handle = register_optimizer_step_post_hook(self)

    def set_parameters(self, parameters: Iterable[Tensor], label: str) -> None:
        """Continue with other parameters.

        Args:
          parameters: those that the clipper measures.
          label: the name of one of them, for the message.
        """
        self._parameters = list(map(TensorWeakRef, parameters))
        self._label = label

    def remove(self) -> None:
        """End the check; torch does not call this object any more."""
        self._handle.remove()

    def shares(self, ids: set[int]) -> bool:
        """Return whether a parameter is one of those with these ids."""
        return any(id(parameter) in ids for parameter in self._find_parameters())

    def is_over(self) -> bool:
        """Return whether the check can find nothing more."""
        return self._has_ended or not self._find_parameters()

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Count the steps in which the clipper did not act.

        Parameters are compared only if these are more than between the last two steps
        of the clipper.
        """
        if torch.compiler.is_compiling() or self._has_ended:
            return
        if self.has_acted:
            self.has_acted = False
            self._others, self._usual_others, self._missed = 0, self._others, 0
            return
        self._others += 1
        if self._others > self._usual_others and self._is_missed(optimizer):
            self._missed += 1
            if self._missed == 2 or self.owner() is None:
                self._has_ended = True  # torch goes through its hooks: none is removed
                self._warn(optimizer)

    def _is_missed(self, optimizer: Optimizer) -> bool:
        """Return whether an optimizer has stepped what the clipper was to clip."""
        trained = {id(p) for p in self._find_parameters() if p.requires_grad}
        if not trained or not trained <= stepped_parameter_ids(optimizer):
            return False
        owner = self.owner()
        if owner is optimizer:
            return self._is_wrapped and is_outermost_step(optimizer)
        is_inside = owner is not None and is_in_step(owner)
        return not is_inside and is_outermost_step(optimizer)

    def _find_parameters(self) -> list[Tensor]:
        """Return the parameters that still exist."""
        parameters = (reference() for reference in self._parameters)
        return [parameter for parameter in parameters if parameter is not None]

    def _warn(self, optimizer: Optimizer) -> None:
        kind = type(optimizer).__name__
        if self._is_wrapped:
            warn(
                f"{kind} stepped parameters, such as {self._label}, that the optimizer "
                "of as_optimizer() clips, but that one did not step; step it, or wrap "
                "the new optimizer by as_optimizer(), too; to end the clipping, call "
                "optimizer.clipper.detach()"
            )
            return
        warn(
            f"{kind} stepped parameters of a clipper, such as {self._label}, but the "
            "clipper is attached to another optimizer and did not act; call "
            "clipper.detach() and clipper.attach(optimizer)"
        )


def end_swap_checks(parameters: Iterable[Tensor]) -> None:
    """End the checks of the earlier clippers of parameters, and those that are over."""
    ids = set(map(id, parameters))
    for hook in list(_global_optimizer_post_hooks.values()):
        if isinstance(hook, SwapCheck) and (hook.is_over() or hook.shares(ids)):
            hook.remove()
