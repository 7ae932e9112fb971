"""Fused optimizers: the scale rides in their kernel, and a rejected step stays there.

With `fused=True` Adam, AdamW, SGD and Adagrad divide each gradient by
`optimizer.grad_scale` and change nothing where `optimizer.found_inf` is not 0. Both are
tensors on the device, which `GradScaler` sets for the time of a step; so does this.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from autoclip_core import Decision
from autoclip_torch.gradients.layout import stored
from autoclip_torch.step.amp import CONTROLS, LossScale, pop_controls
from autoclip_torch.step.stepper import Stepper
from autoclip_torch.step.unwrap import stepped_parameter_ids, stepped_parameters

from .momentum import forget_unwritten, without_momentum


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
        self._told: dict[str, Tensor] = {}
        self._overflow: Tensor | None = None
        self._without_momentum: list[Tensor] = []
        self._clipped: list[Stepper] = []

    def begin(self, stepper: Stepper, optimizer: Optimizer) -> None:
        """Take back what the last step was told, if it has failed and left it there."""
        if not any(stepper is other for other in self._clipped):
            return
        now, told = pop_controls(optimizer).items(), self._told
        new = {name: value for name, value in now if value is not told.get(name)}
        if "found_inf" in new:
            # A GradScaler has set it for the new step, and has multiplied by its scale
            # what it found as `grad_scale`.
            new = _without(told.get("grad_scale"), **new)
        self._forget()
        vars(optimizer).update(new)

    @property
    def telling(self) -> bool:
        """Whether the optimizer has been told something for the step it is in."""
        return bool(self._clipped)

    @torch.no_grad()
    def clip(self, stepper: Stepper, optimizer: Optimizer, alone: bool) -> None:
        """Decide, and tell the optimizer, without reading anything back.

        With one row for all that the optimizer steps, and no other clipper, there is no
        pass over the gradients: the kernel scales them. Else rows are scaled in place.
        """
        if any(stepper is other for other in self._clipped):
            self.restore(optimizer)  # a closure computes gradients again
        factor, told = (_told(optimizer, name) for name in CONTROLS)
        if not self._clipped:
            self._overflow = told  # later it is also what a clipper has cancelled
        scale = LossScale(factor, self._overflow)
        folds = alone and _holds_all(stepper, optimizer)
        if scale.factor is not None and not folds and not stepper.dry_run:
            # No one factor for the kernel to divide by: what a GradScaler has left to
            # it is done here, for all that it steps, so that thresholds meet true
            # gradients.
            _unscale_(_gradients(optimizer), scale.factor)
            scale = scale._replace(factor=None)
        try:
            decision = stepper.clip(scale, in_place=not folds)
            stepper.check()
        except Exception:
            pop_controls(optimizer)  # or they would multiply the next loss scale
            self._forget()
            raise
        factor = scale.factor
        if not stepper.dry_run:
            if folds:
                factor = _folded(factor, decision)
            told = _either(told, _cancelled(decision, folds))
        self._without_momentum = without_momentum(optimizer)
        self._tell(optimizer, factor, told)
        self._clipped.append(stepper)

    def restore(self, optimizer: Optimizer) -> None:
        """Put back what was there before the step: `GradScaler` removes its own."""
        if self._before is not None:
            told = pop_controls(optimizer)
            if (cancelled := told.get("found_inf")) is not None:
                forget_unwritten(optimizer, self._without_momentum, cancelled)
            vars(optimizer).update(self._before)
        self._forget()

    def _forget(self) -> None:
        self._before, self._told, self._clipped = None, {}, []
        self._without_momentum = []

    def _tell(self, optimizer: Optimizer, *values: Tensor | None) -> None:
        before = pop_controls(optimizer)
        if self._before is None:
            self._before = before
        pairs = zip(CONTROLS, values, strict=True)
        self._told = {name: value for name, value in pairs if value is not None}
        vars(optimizer).update(self._told)


def _without(
    told: Tensor | None, *, found_inf: Any, grad_scale: Tensor | None = None
) -> dict[str, Any]:
    """Return what a GradScaler meant, without a factor that it found there.

    Where that was infinite, of a row dropped to 0, its own is lost: no update then.
    """
    if grad_scale is None or told is None:  # of gradients that it has unscaled, None
        return {"grad_scale": grad_scale, "found_inf": found_inf}
    own = grad_scale / told
    lost = torch.where(own.isfinite(), found_inf, 1.0)
    return {"grad_scale": own.nan_to_num(1.0), "found_inf": lost}


def _told(optimizer: Optimizer, name: str) -> Tensor | None:
    """Return what a GradScaler has told; of no gradient at all, it tells a plain 0."""
    value = getattr(optimizer, name, None)
    return value if isinstance(value, Tensor) else None


def _gradients(optimizer: Optimizer) -> Iterable[Tensor]:
    """Return every gradient once, also one that two parameters share."""
    found = (parameter.grad for parameter in stepped_parameters(optimizer))
    return {id(grad): grad for grad in found if grad is not None}.values()


def _holds_all(stepper: Stepper, optimizer: Optimizer) -> bool:
    """Tell whether one row holds exactly what the optimizer steps."""
    if not stepper.has_one_factor:
        return False
    clipped = stepper.rows.parameters
    plain = all(type(parameter) is torch.nn.Parameter for parameter in clipped)
    return plain and set(map(id, clipped)) == stepped_parameter_ids(optimizer)


def _folded(factor: Tensor | None, decision: Decision) -> Tensor:
    """Return what the kernel is to divide by: the loss scale over the clip's scale."""
    scale: Tensor = decision.scale[0]
    one = torch.ones_like(scale)
    return (one if factor is None else factor.to(scale.device)) / scale


def _cancelled(decision: Decision, folds: bool) -> Tensor:
    """Return whether the kernel is to change nothing, as 0 or 1.

    A gradient that is not finite cannot be divided to 0, so where the kernel scales,
    nonfinite="zero" cancels, too.
    """
    cancelled: Tensor = decision.skipped
    if folds:
        cancelled = cancelled | (~decision.finite & (decision.scale == 0))
    return cancelled.any().float()


def _either(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else torch.maximum(a, b.to(a.device))


def _unscale_(gradients: Iterable[Tensor], factor: Tensor) -> None:
    """Divide every gradient in place by a loss scale, on its device."""
    for gradient in gradients:
        stored(gradient).div_(factor.to(gradient.device, non_blocking=True))
