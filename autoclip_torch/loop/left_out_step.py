"""Notice that an optimizer steps between two clips without one."""

import weakref
from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer

from .gradient_samples import GradientVersions


class LeftOutStepCheck:
    """How often clips were left out before updates, between others that had one.

    Only the optimizer that steps first after a clip counts. Another one may step a part
    of the same parameters on purpose.
    """

    def __init__(self) -> None:
        """Start before the first clip."""
        self.times = 0
        """How often a clip followed updates without one."""
        self._has_left_out = False
        self._clipped: GradientVersions | None = None
        self._first: weakref.ref[Optimizer] | None = None

    def end_clip(self, clipped: GradientVersions) -> None:
        """Expect one step, with the gradients that were clipped."""
        self.times += self._has_left_out
        self._has_left_out, self._clipped, self._first = False, clipped, None

    def begin_update(self, optimizer: Optimizer) -> None:
        """Note the first step after a clip."""
        self._first = weakref.ref(optimizer)

    def begin_later_update(
        self, optimizer: Optimizer, samples: Sequence[Tensor]
    ) -> None:
        """Note a later step. If its gradients are others, their clip was left out."""
        if self._first is None or self._first() is not optimizer:
            return
        if _has_gradient(samples) and not self.are_clipped(samples):
            self._has_left_out = True

    def are_clipped(self, samples: Sequence[Tensor]) -> bool:
        """Return whether the gradients are those of the last clip, unchanged."""
        clipped = self._clipped
        return (
            clipped is not None and _has_gradient(samples) and clipped.are_same(samples)
        )


def _has_gradient(samples: Sequence[Tensor]) -> bool:
    return any(sample.grad is not None for sample in samples)
