"""Refuse an optimizer that computes gradients inside its step, after the clip."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from autoclip_torch.loop.backward_watch import BackwardWatch
from autoclip_torch.loop.gradient_samples import choose_samples

_STEPS = 10
"""So many steps are checked."""

_SAMPLES = 4
"""The gradients of so many parameters are looked at."""


class BackwardCheck:
    """Whether the step of one optimizer runs a backward pass, in its first steps."""

    def __init__(self) -> None:
        """Start before the first step."""
        self._steps = 0
        self._watch = BackwardWatch()
        self._samples: Sequence[Tensor] = ()
        self._has_gradient = False

    def begin(self, parameters: Sequence[Tensor]) -> None:
        """Watch the gradients of a step without a closure, after the clip."""
        if torch.compiler.is_compiling():
            return
        self._watch.stop()
        if self._steps == _STEPS:
            return
        self._steps += 1
        self._samples = choose_samples(parameters, _SAMPLES)
        self._has_gradient = any(sample.grad is not None for sample in self._samples)
        self._watch.start(self._samples)

    def end(self, optimizer: Optimizer) -> None:
        """Refuse the optimizer if the step has computed gradients.

        Raises:
          RuntimeError: it has.
        """
        if torch.compiler.is_compiling() or not self._watch.is_active:
            return
        has_computed, samples = self._watch.stop(), self._samples
        self._samples = ()
        if not self._has_gradient:
            has_computed |= any(sample.grad is not None for sample in samples)
        if has_computed:
            raise RuntimeError(
                f"optimizer.step must use the gradients that exist before it, got "
                f"{type(optimizer).__name__}, whose step computes others, which are "
                "not clipped; if it calls another optimizer, attach the clipper to "
                "that one, as in clipper.attach(optimizer.base_optimizer)"
            )

    def __reduce__(self) -> Any:
        """Copy this object as one that starts before the first step."""
        return type(self), ()
