"""Check at which place of a training loop a clipper by hand steps.

Version numbers of gradients show what happened between two of its steps. The check
reads those of some parameters, and no value.
"""

import weakref
from collections.abc import Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import TensorWeakRef

from autoclip_torch.rows.rows import Rows
from autoclip_torch.step.unwrap import stepped_parameters
from autoclip_torch.step.warn import warn

from .backward_watch import BackwardWatch, choose_samples
from .scaler_rule import ScalerRule

_SAMPLES = 2
"""The gradients of so many parameters are looked at."""

_CYCLES = 3
"""A wrong order is reported if so many updates in a row have it."""

_WATCHES = 10
"""Backward passes are watched after so many steps of the clipper."""


class LoopCheck:
    """The steps of a clipper by hand, and the updates of its parameters."""

    def __init__(self) -> None:
        """Start before the first step."""
        self.scaler_rule = ScalerRule()
        self._rows: Rows | None = None
        self._samples: Sequence[Tensor] = ()
        self._shapes: set[torch.Size] = set()
        self._clipped: _Versions | None = None
        self._backward, self._watches = BackwardWatch(), 0
        self._has_clipped_again = False
        self._early = self._repeated = self._unchanged = 0
        self._other: str | None = None
        self._can_warn = True
        self._shared: weakref.WeakKeyDictionary[Optimizer, _Shared]
        self._shared = weakref.WeakKeyDictionary()

    @property
    def optimizers(self) -> list[Optimizer]:
        """The optimizers that have stepped parameters of the clipper."""
        pairs = self._shared.items()
        return [each for each, shared in pairs if shared is _Shared.PARAMETERS]

    def begin(self, stepper: Any, scaler: Any = None, optimizer: Any = None) -> None:
        """Check the place of a step that follows.

        Args:
          stepper, scaler, optimizer: as in `ScalerRule.begin`.

        Raises:
          RuntimeError: as in `ScalerRule.begin`.
        """
        self.scaler_rule.begin(stepper, scaler, optimizer)
        if self._rows is None:
            self._watch_updates()
        if stepper.rows is not self._rows:
            self._rows = stepper.rows
            self._samples = choose_samples(self._rows.parameters, _SAMPLES)
            self._shapes = {parameter.shape for parameter in self._rows.parameters}
            self._shared.clear()
        if self._clipped is not None and self._clipped.are_kept(self._samples):
            self._has_clipped_again = True
        self._check_are_trained()

    def end(self) -> None:
        """Note the gradients that the step has clipped."""
        self._clipped = _Versions(self._samples)
        self._backward.stop()
        if self._watches < _WATCHES:
            self._watches += 1
            self._backward.start(self._samples)

    def check_update(self, optimizer: Optimizer) -> None:
        """Check the place of the step of an optimizer, after it."""
        shared = self._find_shared(optimizer)
        if shared is _Shared.SHAPES:
            self._other = type(optimizer).__name__
        if shared is not _Shared.PARAMETERS:
            return
        self.scaler_rule.check_update(optimizer)
        if self._clipped is None:
            return
        self._clipped = None
        self._early = self._early + 1 if self._backward.stop() else 0
        self._repeated = self._repeated + 1 if self._has_clipped_again else 0
        self._has_clipped_again = False
        if self._early == _CYCLES:
            self._warn(
                "backward() was called between clipper.step() and optimizer.step(), so "
                "the optimizer used gradients that are not clipped; call "
                "clipper.step() after the last backward() and before optimizer.step()"
            )
        if self._repeated == _CYCLES:
            self._warn(
                "clipper.step() was called several times before each optimizer.step(), "
                "so it clipped gradients again that it had clipped already; when "
                "accumulating, call it once, after the last backward pass; set "
                "dry_run=True to measure only"
            )

    def _watch_updates(self) -> None:
        """Let torch call `check_update` after each step of an optimizer."""
        reference = weakref.ref(self)

        def check_update(optimizer: Optimizer, *_: Any) -> None:
            if torch.compiler.is_compiling():
                return
            if (check := reference()) is not None:
                check.check_update(optimizer)

        handle = register_optimizer_step_post_hook(check_update)
        weakref.finalize(self, handle.remove)

    def _check_are_trained(self) -> None:
        """Warn if another model of the same shapes is trained than the clipper has."""
        clipped = self._clipped
        is_unchanged = clipped is not None and clipped.are_same(self._samples)
        other, self._other = self._other, None
        self._unchanged = self._unchanged + 1 if is_unchanged and other else 0
        if self._unchanged == _CYCLES:
            self._warn(
                f"the gradients of the clipper did not change in its last {_CYCLES} "
                f"steps, while {other} stepped other parameters of the same shapes; "
                "make a clipper of the parameters that are trained now"
            )

    def _find_shared(self, optimizer: Optimizer) -> "_Shared":
        """Return what the parameters of an optimizer have in common with these."""
        if (shared := self._shared.get(optimizer)) is None:
            stepped = stepped_parameters(optimizer)
            ids, shapes = set(map(id, stepped)), {each.shape for each in stepped}
            if any(id(sample) in ids for sample in self._samples):
                shared = _Shared.PARAMETERS
            else:
                is_similar = self._shapes <= shapes
                shared = _Shared.SHAPES if is_similar else _Shared.NOTHING
            self._shared[optimizer] = shared
        return shared

    def _warn(self, text: str) -> None:
        if self._can_warn:
            self._can_warn = False
            warn(text)

    def __reduce__(self) -> Any:
        """Copy this object as one that starts before the first step."""
        return type(self), ()


class _Shared(Enum):
    """What the parameters of an optimizer have in common with those of a clipper."""

    NOTHING, SHAPES, PARAMETERS = range(3)


class _Versions:
    """Some gradients at one moment: each changes if it is written or replaced."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        """Note the gradients that exist."""
        self._gradients = [
            (index, TensorWeakRef(parameter.grad), parameter.grad._version)
            for index, parameter in enumerate(parameters)
            if parameter.grad is not None
        ]

    def are_same(self, parameters: Sequence[Tensor]) -> bool:
        """Return whether the parameters have these gradients, unchanged, or none."""
        if not self._gradients:
            return all(parameter.grad is None for parameter in parameters)
        return self._count_writes(parameters) == {0}

    def are_kept(self, parameters: Sequence[Tensor]) -> bool:
        """Return whether each was written at most once since, as by a backward pass.

        Two writes may be a `zero_grad` and a backward pass.
        """
        return self._count_writes(parameters) in ({0}, {1})

    def _count_writes(self, parameters: Sequence[Tensor]) -> set[int | None]:
        """Return how often each was written since; None if it was replaced."""
        return {
            now._version - version
            if (now := parameters[index].grad) is not None and now is reference()
            else None
            for index, reference, version in self._gradients
        }
