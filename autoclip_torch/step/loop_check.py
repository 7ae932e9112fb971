"""Check at which place of a training loop a clipper by hand steps.

Version numbers of gradients show what happened between its step and that of the
optimizer. The check reads those of some parameters, and no value.
"""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import TensorWeakRef

from autoclip_torch.rows.rows import Rows

from .scaler_rule import ScalerRule
from .unwrap import stepped_parameter_ids
from .warn import warn

_SAMPLES = 2
"""The gradients of so many parameters are looked at."""

_CYCLES = 3
"""A wrong order is reported if so many updates in a row have it."""


class LoopCheck:
    """The steps of a clipper by hand, and the updates of its parameters."""

    def __init__(self) -> None:
        """Start before the first step."""
        self.scaler_rule = ScalerRule()
        self._rows: Rows | None = None
        self._samples: Sequence[Tensor] = ()
        self._clipped: _Versions | None = None
        self._updated: _Versions | None = None
        self._has_clipped_again = self._has_changed = False
        self._late = self._repeated = 0
        self._can_warn = True
        self._sharing: weakref.WeakKeyDictionary[Optimizer, bool]
        self._sharing = weakref.WeakKeyDictionary()

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
            parameters = [p for p in self._rows.parameters if p.requires_grad]
            self._samples = parameters[:: 1 + len(parameters) // _SAMPLES]
            self._sharing.clear()
        if self._clipped is not None and self._clipped.are_kept(self._samples):
            self._has_clipped_again = True
        is_late = self._updated is not None and self._updated.are_in(self._samples)
        if self._updated is not None:
            self._late = self._late + 1 if is_late and self._has_changed else 0
            self._updated = None
        if self._late == _CYCLES:
            self._warn(
                "clipper.step() was called after optimizer.step(), which has used the "
                "gradients already, so no update is clipped; call clipper.step() "
                "between backward() and optimizer.step()"
            )

    def end(self) -> None:
        """Note the gradients that the step has clipped."""
        self._clipped = _Versions(self._samples)

    def check_update(self, optimizer: Optimizer) -> None:
        """Check the place of the step of an optimizer, after it."""
        if not self._shares(optimizer):
            return
        self.scaler_rule.check_update(optimizer)
        clipped, self._clipped = self._clipped, None
        if clipped is not None:
            self._has_changed = not clipped.are_in(self._samples)
            self._repeated = self._repeated + 1 if self._has_clipped_again else 0
            self._has_clipped_again = False
        self._updated = _Versions(self._samples)
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

    def _shares(self, optimizer: Optimizer) -> bool:
        """Return whether an optimizer steps parameters of the clipper."""
        shares = self._sharing.get(optimizer)
        if shares is None:
            stepped = stepped_parameter_ids(optimizer)
            shares = any(id(sample) in stepped for sample in self._samples)
            self._sharing[optimizer] = shares
        return shares

    def _warn(self, text: str) -> None:
        if self._can_warn:
            self._can_warn = False
            warn(text)

    def __reduce__(self) -> Any:
        """Copy this object as one that starts before the first step."""
        return type(self), ()


class _Versions:
    """Some gradients at one moment: each changes if it is written or replaced."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        """Note the gradients that exist."""
        self._gradients = [
            (index, TensorWeakRef(parameter.grad), parameter.grad._version)
            for index, parameter in enumerate(parameters)
            if parameter.grad is not None
        ]

    def are_in(self, parameters: Sequence[Tensor]) -> bool:
        """Return whether the parameters have these gradients, unchanged."""
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
