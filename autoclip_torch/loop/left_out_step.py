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
        self._used: tuple[weakref.ref[Optimizer], GradientVersions] | None = None

    def end_clip(self) -> None:
        """Expect one step."""
        self.times += self._has_left_out
        self._has_left_out, self._used = False, None

    def begin_update(self, optimizer: Optimizer, clipped: GradientVersions) -> None:
        """Note the first step after a clip, and the gradients that were clipped."""
        self._used = weakref.ref(optimizer), clipped

    def begin_later_update(
        self, optimizer: Optimizer, samples: Sequence[Tensor]
    ) -> None:
        """Note a later step. If its gradients are others, their clip was left out."""
        if self._used is None:
            return
        first, clipped = self._used
        has_gradient = any(sample.grad is not None for sample in samples)
        if first() is optimizer and has_gradient and not clipped.are_same(samples):
            self._has_left_out = True
