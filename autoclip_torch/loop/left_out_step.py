"""Notice that an optimizer steps between two clips, or uses gradients before a clip."""

import weakref
from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer

from .gradient_samples import GradientVersions


class LeftOutStepCheck:
    """How often clips were left out before updates, between others that had one.

    For that, only the optimizer that steps first after a clip counts. Another one may
    step a part of the same parameters on purpose. It must not use gradients that are
    clipped only after it.
    """

    def __init__(self) -> None:
        """Start before the first clip."""
        self.times = 0
        """How often a clip followed updates without one."""
        self.late = 0
        """So many clips in a row had gradients that another optimizer had used."""
        self._used: GradientVersions | None = None
        self._has_left_out = False
        self._clipped: GradientVersions | None = None
        self._first: weakref.ref[Optimizer] | None = None

    def begin_clip(self, samples: Sequence[Tensor]) -> None:
        """Compare the gradients with those that another optimizer has used."""
        is_late = self._used is not None and self._used.are_same(samples)
        self.late, self._used = self.late + 1 if is_late else 0, None

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
        if self._first is None or not _has_gradient(samples):
            return
        if self.are_clipped(samples):
            return
        if self._first() is optimizer:
            self._has_left_out = True
        else:
            self._used = GradientVersions(samples)

    def are_clipped(self, samples: Sequence[Tensor]) -> bool:
        """Return whether the gradients are those of the last clip, unchanged."""
        clipped = self._clipped
        return (
            clipped is not None and _has_gradient(samples) and clipped.are_same(samples)
        )


def _has_gradient(samples: Sequence[Tensor]) -> bool:
    return any(sample.grad is not None for sample in samples)
