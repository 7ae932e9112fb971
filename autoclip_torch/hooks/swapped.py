"""Warn if another optimizer steps the parameters of an attached clipper."""

import weakref
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from autoclip_torch.observer.observer import Observer
from autoclip_torch.step.unwrap import stepped_parameter_ids
from autoclip_torch.step.warn import warn

from .step_hooks import StepHooks


class SwapCheck:
    """The clippers that are attached, each with the hooks of its optimizer.

    torch calls this object after every step of every optimizer. An optimizer that
    shares no parameter with these clippers, or has a clipper, is looked at only once.
    """

    def __init__(self) -> None:
        """Start without a clipper."""
        self._hooks: weakref.WeakKeyDictionary[Observer, weakref.ref[StepHooks]]
        self._hooks = weakref.WeakKeyDictionary()
        self._steps: weakref.WeakKeyDictionary[Observer, int]
        self._steps = weakref.WeakKeyDictionary()
        self._accepted: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._is_registered = False

    def add(self, clipper: Observer, hooks: StepHooks) -> None:
        """Check the steps of other optimizers from now on."""
        if not self._is_registered:
            register_optimizer_step_post_hook(self)
            self._is_registered = True
        self._hooks[clipper] = weakref.ref(hooks)
        self._accepted.clear()

    def discard(self, clipper: Observer) -> None:
        """End the check for a clipper."""
        self._hooks.pop(clipper, None)
        self._steps.pop(clipper, None)

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Warn if the optimizer replaced one that a clipper is attached to."""
        if torch.compiler.is_compiling() or optimizer in self._accepted:
            return
        stepped = stepped_parameter_ids(optimizer)
        sharing = [
            clipper
            for clipper in list(self._hooks)
            if not stepped.isdisjoint(map(id, clipper.parameters))
        ]
        if not sharing or StepHooks.find_all(optimizer):
            self._accepted.add(optimizer)
            return
        for clipper in sharing:
            self._check(clipper, optimizer)

    def _check(self, clipper: Observer, optimizer: Optimizer) -> None:
        """Warn unless the clipper has acted since the last step of the optimizer.

        One of the two optimizers may call the other one.
        """
        hooks = self._hooks[clipper]()
        if hooks is not None and hooks.active:
            steps, before = hooks.steps, self._steps.get(clipper)
            self._steps[clipper] = steps
            if hooks.is_in_step or steps != before:
                return
        self.discard(clipper)
        label = next(p.label for group in clipper._groups for p in group.parameters)
        warn(
            f"{type(optimizer).__name__} stepped parameters of a clipper, such as "
            f"{label}, but the clipper is attached to another optimizer, which did not "
            "step; call clipper.detach() and clipper.attach(optimizer)"
        )


SWAP_CHECK = SwapCheck()
