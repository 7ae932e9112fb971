"""Clipping with a fused optimizer: its kernel scales gradients and cancels updates.

With `fused=True`, Adam, AdamW, SGD and Adagrad divide each gradient by
`optimizer.grad_scale`, and change nothing if `optimizer.found_inf` is not 0. Both
controls are tensors on the device. `GradScaler` sets them for the duration of a step,
and so does this module.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from autoclip_core import Decision
from autoclip_torch.gradients.layout import get_stored
from autoclip_torch.step.amp import CONTROLS, LossScale, pop_controls
from autoclip_torch.step.stepper import Stepper
from autoclip_torch.step.unwrap import stepped_parameter_ids, stepped_parameters

from .momentum import find_parameters_without_momentum, remove_unwritten_momentum

_FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)


def is_fused(optimizer: Optimizer) -> bool:
    """Return whether the optimizer's kernel uses `grad_scale` and `found_inf`."""
    is_capable = getattr(optimizer, "_step_supports_amp_scaling", None)
    if is_capable is None:  # torch's mark is lost in a copy, which has the same kernel
        is_capable = isinstance(optimizer, _FUSED)
    return is_capable and all(group.get("fused") for group in optimizer.param_groups)


class Controls:
    """The controls that the attached clippers set on a fused optimizer for one step.

    Every method takes the optimizer: a reference from here would keep it alive.
    """

    def __init__(self) -> None:
        self._before: dict[str, Any] | None = None
        self._current: dict[str, Tensor] = {}
        self._without_momentum: list[Tensor] = []

    def begin(self, optimizer: Optimizer) -> None:
        """Remove the controls of the last step if it failed before it restored them."""
        if self._before is None:
            return
        present, previous = pop_controls(optimizer).items(), self._current
        new = {key: value for key, value in present if value is not previous.get(key)}
        if "found_inf" in new:
            # A GradScaler has set it for the new step. It has also multiplied the
            # `grad_scale` of the failed step by its own scale.
            new = _remove_factor(previous.get("grad_scale"), **new)
        self._before = None
        vars(optimizer).update(new)

    @torch.no_grad()
    def clip(self, steppers: Sequence[Stepper], optimizer: Optimizer) -> None:
        """Decide and set the controls, without reading anything back.

        If one row holds all that the optimizer steps, and no other clipper is attached,
        the kernel scales the gradients, and no other pass over them is needed.
        Otherwise the rows are scaled in place.
        """
        factor, overflow = (_get_control(optimizer, name) for name in CONTROLS)
        found_inf = overflow  # later it includes updates that clippers cancel
        for stepper in steppers:
            kernel_scales = len(steppers) == 1 and _holds_all(stepper, optimizer)
            if factor is not None and not kernel_scales and not stepper.dry_run:
                # The kernel takes only one factor. The loss scale is therefore removed
                # from all gradients of the optimizer here, before they are measured.
                _unscale_(optimizer, factor)
                factor = None
            try:
                scale = LossScale(factor, overflow)
                decision = stepper.clip(scale, in_place=not kernel_scales)
                stepper.check()
            except Exception:
                pop_controls(optimizer)  # or they would multiply the next loss scale
                raise
            if not stepper.dry_run:
                if kernel_scales:
                    factor = _compute_kernel_factor(factor, decision)
                cancels = _get_cancel_flag(decision, kernel_scales)
                found_inf = _join_flags(found_inf, cancels)
        self._without_momentum = find_parameters_without_momentum(optimizer)
        self._before = pop_controls(optimizer)
        pairs = zip(CONTROLS, (factor, found_inf), strict=True)
        self._current = {name: value for name, value in pairs if value is not None}
        vars(optimizer).update(self._current)

    def restore(self, optimizer: Optimizer) -> None:
        """Set the controls as before the step; a `GradScaler` removes its own."""
        if self._before is None:
            return
        current = pop_controls(optimizer)
        if (cancelled := current.get("found_inf")) is not None:
            remove_unwritten_momentum(optimizer, self._without_momentum, cancelled)
        vars(optimizer).update(self._before)
        self._before = None


def _remove_factor(
    factor: Tensor | None, *, found_inf: Any, grad_scale: Tensor | None = None
) -> dict[str, Any]:
    """Return the controls of a GradScaler, which has multiplied its scale by a factor.

    If the factor was infinite, because a row was dropped to 0, the loss scale is lost:
    the update is then cancelled.
    """
    if grad_scale is None or factor is None:  # None: the gradients are unscaled
        return {"grad_scale": grad_scale, "found_inf": found_inf}
    loss_scale = grad_scale / factor
    found_inf = torch.where(loss_scale.isfinite(), found_inf, 1.0)
    return {"grad_scale": loss_scale.nan_to_num(1.0), "found_inf": found_inf}


def _get_control(optimizer: Optimizer, name: str) -> Tensor | None:
    """Return a control if it is a tensor: without gradients, a GradScaler sets 0."""
    value = getattr(optimizer, name, None)
    return value if isinstance(value, Tensor) else None


def _holds_all(stepper: Stepper, optimizer: Optimizer) -> bool:
    """Return whether one row holds exactly the parameters that the optimizer steps."""
    if not stepper.has_one_factor:
        return False
    clipped = stepper.rows.parameters
    has_no_subclass = all(type(p) is torch.nn.Parameter for p in clipped)
    return has_no_subclass and set(map(id, clipped)) == stepped_parameter_ids(optimizer)


def _compute_kernel_factor(loss_scale: Tensor | None, decision: Decision) -> Tensor:
    """Return the divisor of the gradients: the loss scale over the clipping scale."""
    scale: Tensor = decision.scale[0]
    unit_scale = torch.ones_like(scale)
    return (unit_scale if loss_scale is None else loss_scale.to(scale.device)) / scale


def _get_cancel_flag(decision: Decision, kernel_scales: bool) -> Tensor:
    """Return 1 if the kernel must change nothing, and 0 if not.

    Division cannot set a gradient that is not finite to 0. If the kernel scales,
    nonfinite="zero" therefore cancels the update, too.
    """
    cancelled: Tensor = decision.skipped
    if kernel_scales:
        cancelled = cancelled | (~decision.finite & (decision.scale == 0))
    return cancelled.any().float()


def _join_flags(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else torch.maximum(a, b.to(a.device))


def _unscale_(optimizer: Optimizer, loss_scale: Tensor) -> None:
    """Divide every gradient in place by a loss scale, on the gradient's device."""
    gradients = (parameter.grad for parameter in stepped_parameters(optimizer))
    # Two parameters may share a gradient.
    for gradient in {id(g): g for g in gradients if g is not None}.values():
        get_stored(gradient).div_(loss_scale.to(gradient.device, non_blocking=True))
