"""Fused optimizers: the scale rides in their kernel, and a rejected step stays there.

With `fused=True` Adam, AdamW, SGD and Adagrad divide each gradient by
`optimizer.grad_scale` and change nothing where `optimizer.found_inf` is not 0. Both are
tensors on the device, which `GradScaler` sets for the time of a step; so does this.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from autoclip_core import Decision

from .amp import LossScale, stepped_ids
from .values import stored

if TYPE_CHECKING:
    from .clipper import Clipper

_NAMES = ("grad_scale", "found_inf")


def is_fused(optimizer: Optimizer) -> bool:
    """Tell whether the optimizer's kernel obeys `grad_scale` and `found_inf`."""
    obeys = getattr(optimizer, "_step_supports_amp_scaling", False)
    return obeys and all(group.get("fused") for group in optimizer.param_groups)


class Controls:
    """What a fused optimizer is told for one step, by all clippers attached to it.

    It is passed to every method: whoever holds it here would keep it alive.
    """

    def __init__(self) -> None:
        """Start with nothing to restore."""
        self._before: dict[str, Any] | None = None
        self._clipped: list[Clipper] = []
        self.clippers: list[Clipper] = []
        """Those that are attached."""

    @torch.no_grad()
    def clip(self, clipper: "Clipper", optimizer: Optimizer) -> None:
        """Decide, and tell the optimizer, without reading anything back.

        With one row for all that the optimizer steps, and no other clipper, there is no
        pass over the gradients: the kernel scales them. Else rows are scaled in place.
        """
        if any(clipper is other for other in self._clipped):
            self.restore(
                optimizer
            )  # a closure computes gradients again, or a step has failed
        scale = LossScale(*(getattr(optimizer, name, None) for name in _NAMES))
        folds = len(self.clippers) == 1 and _holds_all(clipper, optimizer)
        if not folds and scale.factor is not None:
            # No one factor for the kernel to divide by: what a GradScaler has left to
            # it is done here, for all that it steps, so that thresholds meet true
            # gradients.
            _unscale_(_gradients(optimizer), scale.factor)
            scale = scale._replace(factor=None)
        gradients, decision = clipper._learn(scale)
        factor, overflow = scale
        if not clipper.dry_run:
            if folds:
                factor = _folded(factor, decision)
            else:
                clipper._rescale(gradients, decision)
            overflow = _either(overflow, _cancelled(decision, folds))
        clipper._check_run()
        self._tell(optimizer, factor, overflow)
        self._clipped.append(clipper)

    def restore(self, optimizer: Optimizer) -> None:
        """Put back what was there before the step: `GradScaler` removes its own."""
        self._clipped = []
        if self._before is None:
            return
        own = vars(optimizer)
        for name in _NAMES:
            own.pop(name, None)
        own.update(self._before)
        self._before = None

    def _tell(self, optimizer: Optimizer, *values: Tensor | None) -> None:
        own = vars(optimizer)
        if self._before is None:
            self._before = {name: own[name] for name in _NAMES if name in own}
        own.update(zip(_NAMES, values, strict=True))


def _gradients(optimizer: Optimizer) -> Iterable[Tensor]:
    """Return every gradient once, also one that two parameters share."""
    groups = optimizer.param_groups
    found = (parameter.grad for group in groups for parameter in group["params"])
    return {id(grad): grad for grad in found if grad is not None}.values()


def _holds_all(clipper: "Clipper", optimizer: Optimizer) -> bool:
    """Tell whether one row holds exactly what the optimizer steps."""
    slots = clipper._learner.rows.slots
    if not clipper._one_factor:
        return False
    own = {id(slot.parameter) for slot in slots}
    plain = all(type(slot.parameter) is torch.nn.Parameter for slot in slots)
    return plain and own == stepped_ids(optimizer)


def _folded(factor: Tensor | None, decision: Decision) -> Tensor:
    """Return what the kernel is to divide by: the loss scale over the clip's scale."""
    scale = torch.as_tensor(decision.scale)[0]
    one = torch.ones_like(scale)
    return (one if factor is None else factor.to(scale.device)) / scale


def _cancelled(decision: Decision, folds: bool) -> Tensor:
    """Return whether the kernel is to change nothing, as 0 or 1.

    A gradient that is not finite cannot be divided to 0, so where the kernel scales,
    nonfinite="zero" cancels, too.
    """
    scale, finite, cancelled = map(
        torch.as_tensor, (decision.scale, decision.finite, decision.skipped)
    )
    if folds:
        cancelled = cancelled | (~finite & (scale == 0))
    return cancelled.any().float()


def _either(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else torch.maximum(a, b.to(a.device))


def _unscale_(gradients: Iterable[Tensor], factor: Tensor) -> None:
    """Divide every gradient in place by a loss scale, on its device."""
    for gradient in gradients:
        stored(gradient).div_(factor.to(gradient.device, non_blocking=True))
