"""Warn if gradients are set to 0 between the backward pass and the clip."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from autoclip_core import Decision
from autoclip_core.clipper.metrics import was_observed
from autoclip_torch.gradients.dtensor import get_local
from autoclip_torch.rows.rows import Rows

from .warn import warn

_ZEROS, _WATCHED = 5, 3
"""After so many norms of 0, so many more are compared with the backward pass."""

_SAMPLES = 8
"""The gradients of so many parameters are noted."""

_SMALLEST = 1e-30
"""A norm below the smallest normal float32 counts as 0. This is far above it."""


class ZeroNormCheck:
    """Warns once if all norms are 0 from the start, and backward computes others.

    Norms of 0 alone are no fault: a reward may be rare, and a batch may be padding.
    """

    def __init__(self) -> None:
        """Start before the first norm."""
        self._has_ended = False
        self._zeros = 0
        self._handles: list[Any] = []
        self._notes: list[Tensor] = []

    def check(self, decision: Decision, rows: Rows) -> None:
        """Check the norms of a step, on the CPU.

        Args:
          decision: that of the step; without a gradient it does not count.
          rows: those of the clipper.
        """
        if self._has_ended or torch.compiler.is_compiling():
            return
        norms = decision.norm[was_observed(decision)]
        if len(norms) == 0:
            return
        if (norms != 0).any():
            self._end()
            return
        self._zeros += 1
        if self._zeros == _ZEROS:
            self._start(rows.parameters)
        elif any(float(note) > _SMALLEST for note in self._notes):
            self._end()
            warn(
                "all norms of the clipper have been 0 since its first step, although "
                "backward() computed other gradients: they were set to 0 before the "
                "clip, as by zero_grad(); call no zero_grad() between backward() and "
                "the clip; for an optimizer that steps in the backward pass, make a "
                "clipper for each parameter and attach it"
            )
        elif self._zeros == _ZEROS + _WATCHED:
            self._end()

    def _start(self, parameters: Sequence[Tensor]) -> None:
        """Note the norms of the next gradients, before anything can change them."""
        trained = [p for p in parameters if p.requires_grad and p.is_leaf]
        samples = trained[:: 1 + len(trained) // _SAMPLES]
        self._handles = [sample.register_hook(self._note) for sample in samples]  # type: ignore[no-untyped-call]

    def _note(self, gradient: Tensor) -> None:
        if len(self._notes) < _SAMPLES and not gradient.is_sparse:
            local = get_local(gradient.detach())  # of all ranks it would wait for them
            self._notes.append(torch.linalg.vector_norm(local))

    def _end(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._has_ended, self._handles, self._notes = True, [], []

    def __reduce__(self) -> Any:
        """Copy this object as one that starts before the first norm."""
        return type(self), ()
