"""Warn if a backward pass adds its gradients to those of the step before."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from autoclip_torch.gradients.dtensor import read_values
from autoclip_torch.gradients.transfer import is_capturing, start_reading
from autoclip_torch.optimizer_steps.weak_hook import register_weak_hook

from .warn import warn

_CYCLES = 2
"""So many steps are compared. The result is read as many steps later, so that a device
has it."""


class UnclearedCheck:
    """Warns once if the first gradients are sums of new ones and clipped ones.

    A gradient is such a sum if it equals the one after the last clip plus all that the
    backward passes have computed since, and if the parameter has changed meanwhile.
    """

    def __init__(self) -> None:
        """Start before the first step."""
        self._steps = 0
        self._reads: list[Callable[[], list[Any]]] = []
        self._sample: TensorWeakRef | None = None
        self._version = 0
        self._clipped = torch.empty(0)
        self._passed: Tensor | None = None
        self._computed: Tensor | None = None
        self._hooks: list[Any] = []

    def begin_clip(self) -> None:
        """Compare the gradient before a clip with what the clip before has left."""
        self._steps += 1
        if self._sample is None:
            return
        sample, self._sample = self._sample(), None
        for hook in self._hooks:
            hook.remove()
        computed, self._computed = self._computed, None
        if sample is None or sample.grad is None or computed is None:
            return
        if sample._version == self._version or is_capturing(sample.device):
            return
        now = read_values(sample.grad).to(computed.device)
        if not now.shape == computed.shape == self._clipped.shape:
            return
        kept = now - computed
        vectors = self._clipped, kept, kept - self._clipped
        norms = [torch.linalg.vector_norm(vector) for vector in vectors]
        self._reads.append(start_reading([torch.stack(norms)]))

    def end_clip(self, parameters: Sequence[Tensor]) -> None:
        """Note the gradient that a clip leaves, in the first steps.

        Args:
          parameters: those of the clipper.
        """
        if 0 < self._steps <= _CYCLES:
            self._start(parameters)
        elif self._steps == 2 * _CYCLES:
            reads, self._reads = self._reads, []
            if len(reads) == _CYCLES and all(_is_sum(*read()[0]) for read in reads):
                warn(
                    "backward() adds new gradients to those that were clipped in the "
                    "step before, because nothing clears them; call "
                    "optimizer.zero_grad() once per update; if the optimizer steps "
                    "another model than the clipper has, clear both"
                )

    def _start(self, parameters: Sequence[Tensor]) -> None:
        """Add up what the next backward passes compute for one parameter."""
        samples = [
            p
            for p in parameters
            if p.requires_grad and p.is_leaf and _has_dense_gradient(p)
        ]
        sample = min(samples, key=Tensor.numel, default=None)
        if sample is None or sample.grad is None or is_capturing(sample.device):
            return
        self._sample, self._version = TensorWeakRef(sample), sample._version
        self._clipped = read_values(sample.grad).clone()
        self._hooks = [
            register_weak_hook(sample.register_hook, self._note),
            register_weak_hook(sample.register_post_accumulate_grad_hook, self._add),
        ]

    def _note(self, gradient: Tensor) -> None:
        """Note a gradient. `torch.autograd.grad` computes it, too, and adds nothing."""
        self._passed = gradient

    def _add(self, parameter: Tensor) -> None:
        """Add the last gradient, which a backward pass has accumulated."""
        passed, self._passed = self._passed, None
        if passed is not None:
            values = read_values(passed).clone()
            computed = self._computed
            self._computed = values if computed is None else computed + values

    def __reduce__(self) -> Any:
        """Copy this object as one that starts before the first step."""
        return type(self), ()


def _has_dense_gradient(parameter: Tensor) -> bool:
    gradient = parameter.grad
    return gradient is not None and not gradient.is_sparse and gradient.numel() > 0


def _is_sum(clipped: float, kept: float, error: float) -> bool:
    """Return whether a gradient holds the one that was clipped.

    Args:
      clipped: the norm of the clipped one.
      kept: the norm of the gradient without what was computed since; 0 if the clipped
        one was cleared, or was lost in rounding.
      error: the norm of the difference of the two.
    """
    return bool(error <= 0.1 * clipped and kept >= 0.9 * clipped > 0)
