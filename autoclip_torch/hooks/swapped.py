"""Warn if another optimizer steps the parameters of an attached clipper."""

import weakref
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from autoclip_torch.observer.observer import Observer
from autoclip_torch.step.unwrap import stepped_parameter_ids
from autoclip_torch.step.warn import warn

from .step_hooks import StepHooks, is_in_step


class SwapCheck:
    """The clippers that are attached, and the optimizer of each.

    torch calls this object after every step of every optimizer. An optimizer that
    shares no parameter with these clippers, or has a clipper, is looked at only once.
    """

    def __init__(self) -> None:
        """Start without a clipper."""
        self._optimizers: weakref.WeakKeyDictionary[
            Observer, weakref.ref[Optimizer]
        ] = weakref.WeakKeyDictionary()
        self._steps_before: weakref.WeakKeyDictionary[Observer, int]
        self._steps_before = weakref.WeakKeyDictionary()
        self._steps: weakref.WeakKeyDictionary[Optimizer, int]
        self._steps = weakref.WeakKeyDictionary()
        self._accepted: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._is_registered = False

    def add(self, clipper: Observer, optimizer: Optimizer) -> None:
        """Check the steps of other optimizers from now on."""
        if not self._is_registered:
            register_optimizer_step_post_hook(self)
            self._is_registered = True
        self._optimizers[clipper] = weakref.ref(optimizer)
        self._steps.setdefault(optimizer, 0)
        self._accepted.clear()

    def discard(self, clipper: Observer) -> None:
        """End the check for a clipper."""
        self._optimizers.pop(clipper, None)
        self._steps_before.pop(clipper, None)
        owners = {reference() for reference in self._optimizers.values()}
        for optimizer in set(self._steps) - owners:
            del self._steps[optimizer]

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Count the step, or warn if the optimizer replaced that of a clipper."""
        if torch.compiler.is_compiling() or optimizer in self._accepted:
            return
        if optimizer in self._steps:
            self._steps[optimizer] += 1
            return
        stepped = stepped_parameter_ids(optimizer)
        sharing = [
            clipper
            for clipper in list(self._optimizers)
            if not stepped.isdisjoint(map(id, clipper.parameters))
        ]
        if not sharing or StepHooks.find_all(optimizer):
            self._accepted.add(optimizer)
            return
        for clipper in sharing:
            self._check(clipper, optimizer)

    def _check(self, clipper: Observer, other: Optimizer) -> None:
        """Warn unless the clipper has acted since the last step of another optimizer.

        One of the two optimizers may call the other one.
        """
        if (optimizer := self._optimizers[clipper]()) is not None:
            steps, before = self._steps[optimizer], self._steps_before.get(clipper)
            self._steps_before[clipper] = steps
            if steps != before or is_in_step(optimizer):
                return
        self.discard(clipper)
        label = next(p.label for group in clipper._groups for p in group.parameters)
        warn(
            f"{type(other).__name__} stepped parameters of a clipper, such as {label}, "
            "but the clipper is attached to another optimizer, which did not step; "
            "call clipper.detach() and clipper.attach(optimizer)"
        )


SWAP_CHECK = SwapCheck()
