"""Notice that a clip has no effect: optimizers step copies of what is clipped."""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from autoclip_core import Decision
from autoclip_torch.gradients.dtensor import get_local, read_values
from autoclip_torch.gradients.layout import get_stored
from autoclip_torch.step.unwrap import stepped_parameters

from .gradient_samples import (
    GradientValues,
    GradientVersions,
    choose_samples,
    copy_values,
)

_CYCLES = 10
"""The clip has no effect if it is so in so many updates in a row."""

_SAMPLES = 2


class OtherModelCheck:
    """Optimizers step similar parameters, and none steps those of the clipper.

    Their parameters may belong to a copy of the model, or they may be float32 copies of
    its parameters. Their gradients may be copied from the clipped ones after the clip:
    then these change between the clip and the update. A `GradScaler` may leave out many
    updates of the clipper's parameters in a row, after gradients that are not finite.

    Args:
      clipped: the parameters of the clipper.
    """

    def __init__(self, clipped: Sequence[Tensor] = ()) -> None:
        """Start without other optimizers."""
        self._clipped, self._watched = clipped, choose_samples(clipped, 1)
        self._optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._are_similar = False
        self.restart()

    def restart(self) -> None:
        """Count again: the clipper's parameters are stepped."""
        self._versions: GradientVersions | None = None
        self._values: GradientValues | None = None
        self._samples: Sequence[Tensor] = ()
        self._weights: list[Tensor] = []
        self._is_left_out: Any = False
        self._cycles = 0

    def end_clip(self, decision: Decision) -> None:
        """Note the gradients of the other optimizers after a clip.

        Args:
          decision: what the clip decided.
        """
        if not self._are_similar:
            return
        with_gradient = [p for p in self._list_stepped() if p.grad is not None]
        self._samples = with_gradient[:_SAMPLES]
        self._versions = GradientVersions(self._samples)
        if self._cycles == _CYCLES - 2:
            self._weights = copy_values(self._watched)
            self._is_left_out = self._has_overflow(decision)
        if self._cycles == _CYCLES - 1:
            self._values = GradientValues(self._samples)

    def explain(self, optimizer: Optimizer) -> str | None:
        """Return what is wrong if the last clips changed nothing that is used.

        Args:
          optimizer: one of other parameters, which is about to step.
        """
        if not self._has_no_effect(optimizer):
            return None
        return (
            f"clipper.step() has no effect: {type(optimizer).__name__} steps other "
            "parameters of the same shapes, and nothing steps the clipper's; make a "
            "clipper of the parameters that are trained now"
        )

    def _has_no_effect(self, optimizer: Optimizer) -> bool:
        if optimizer not in self._optimizers:
            self._optimizers.add(optimizer)
            self._are_similar = _are_similar(self._clipped, self._list_stepped())
        versions, self._versions = self._versions, None
        if versions is None:  # there was no clip since the last step
            return False
        is_same = bool(self._samples) and versions.are_same(self._samples)
        self._cycles = self._cycles + 1 if is_same else 0
        if self._cycles < _CYCLES:
            return False
        values, samples = self._values, self._samples
        is_used = self._is_trained() or self._shares_gradients() or self._is_left_out
        self.restart()
        return values is not None and values.are_same(samples) and not is_used

    def find_copies(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return what the optimizers step in place of parameters of the clipper.

        Their gradients have changed since the clip, so they may be made of the clipped
        ones.
        """
        stepped = self._list_stepped()
        if self._cycles or len(stepped) != len(self._clipped):
            return []
        indexes = {id(each): index for index, each in enumerate(self._clipped)}
        return [stepped[indexes[id(each)]] for each in parameters]

    def _list_stepped(self) -> list[Tensor]:
        return [p for each in self._optimizers for p in stepped_parameters(each)]

    def _shares_gradients(self) -> bool:
        """Return whether the other optimizers use the gradients that are clipped."""
        clipped = {_find_memory(p) for p in self._clipped if p.grad is not None}
        return not clipped.isdisjoint(map(_find_memory, self._samples))

    def _has_overflow(self, decision: Decision) -> Any:
        """Return whether a scaler leaves out the update; this waits for no device.

        A scaler that the clip received reports an overflow, and no row is observed.
        """
        has_gradient = any(p.grad is not None for p in self._clipped)
        is_unobserved = decision.norm.isnan().all() & has_gradient
        return is_unobserved | ~decision.finite.all()

    def _is_trained(self) -> bool:
        """Return whether the clipper's parameters change, and are no copies."""
        stepped = list(map(read_values, self._list_stepped()))
        return any(
            not torch.equal(before, now)
            and not any(torch.equal(each[: len(now)].to(now), now) for each in stepped)
            for before, now in zip(
                self._weights, copy_values(self._watched), strict=True
            )
        )


def _find_memory(parameter: Tensor) -> int:
    """Return where the gradient of a parameter is stored; it may be a view."""
    gradient = get_stored(get_local(parameter.grad))
    return gradient.untyped_storage().data_ptr()


def _are_similar(clipped: Sequence[Tensor], stepped: Sequence[Tensor]) -> bool:
    """Return whether other parameters have the same shapes, or are one flat copy."""
    if not set(map(id, clipped)).isdisjoint(map(id, stepped)):
        return False
    shapes = {parameter.shape for parameter in clipped}
    count = sum(map(Tensor.numel, clipped))
    return shapes <= {p.shape for p in stepped} or count == sum(
        p.numel() for p in stepped
    )
