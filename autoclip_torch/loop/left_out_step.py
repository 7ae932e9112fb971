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

    def begin_update(self, optimizer: Optimizer, samples: Sequence[Tensor]) -> None:
        """Note the gradients of an update; later ones have others without a clip."""
        if self._used is None:
            self._used = weakref.ref(optimizer), GradientVersions(samples)
            return
        first, gradients = self._used
        has_gradient = any(sample.grad is not None for sample in samples)
        if first() is optimizer and has_gradient and not gradients.are_same(samples):
            self._has_left_out = True
