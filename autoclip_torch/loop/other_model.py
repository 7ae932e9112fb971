"""Notice that a clip has no effect: an optimizer steps copies of what is clipped."""

import weakref
from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer

from autoclip_torch.step.unwrap import stepped_parameters

from .gradient_samples import GradientValues, GradientVersions

_CYCLES = 10
"""The clip has no effect if it is so in so many updates in a row.

A `GradScaler` may leave out several updates of the clipped parameters in a row.
"""

_SAMPLES = 2


class OtherModelCheck:
    """An optimizer of similar parameters steps, and none steps those of the clipper.

    Its parameters may belong to a copy of the model, or they may be float32 copies of
    its parameters. Their gradients may be copied from the clipped ones after the clip:
    then these change between the clip and the update.
    """

    def __init__(self) -> None:
        """Start without another optimizer."""
        self._optimizer: weakref.ref[Optimizer] | None = None
        self._samples: Sequence[Tensor] = ()
        self._versions: GradientVersions | None = None
        self._values: GradientValues | None = None
        self._cycles = 0

    def end_clip(self) -> None:
        """Note the gradients of the other optimizer after a clip."""
        optimizer = None if self._optimizer is None else self._optimizer()
        if optimizer is None:
            return
        with_gradient = [p for p in stepped_parameters(optimizer) if p.grad is not None]
        self._samples = with_gradient[:_SAMPLES]
        self._versions = GradientVersions(self._samples)
        if self._cycles == _CYCLES - 1:
            self._values = GradientValues(self._samples)

    def has_no_effect(self, optimizer: Optimizer) -> bool:
        """Return whether the last clips changed nothing that this optimizer uses.

        Args:
          optimizer: one of similar parameters, which is about to step.
        """
        if self._optimizer is None or self._optimizer() is not optimizer:
            self.restart()
            self._optimizer = weakref.ref(optimizer)
        versions, self._versions = self._versions, None
        if versions is None:  # there was no clip since its last step
            return False
        is_same = bool(self._samples) and versions.are_same(self._samples)
        self._cycles = self._cycles + 1 if is_same else 0
        if self._cycles < _CYCLES:
            return False
        values, samples = self._values, self._samples
        self.restart()
        return values is not None and values.are_same(samples)

    def restart(self) -> None:
        """Continue without another optimizer: the clipper's parameters are stepped."""
        self._optimizer = self._versions = self._values = None
        self._samples, self._cycles = (), 0
