"""Mixed precision: what a `GradScaler` has done to the gradients so far."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from .unwrap import stepped_parameter_ids, unwrap

CONTROLS = ("grad_scale", "found_inf")
"""What a `GradScaler` tells an optimizer for the time of a step, as its attributes."""

_EVERY_STEP = "_step_supports_amp_scaling"


class LossScale(NamedTuple):
    """The trace of a loss scale in the gradients."""

    factor: Tensor | None = None
    """The gradients are still multiplied by this."""
    overflow: Tensor | None = None
    """Not 0 where the scaled gradients overflowed: no step to learn from."""


NO_SCALE = LossScale()
"""There is none, or it has left no trace."""


def unscale_once(scaler: Any, optimizer: Any) -> LossScale:
    """Unscale an optimizer's gradients, unless somebody has done it in this step.

    Raises:
      TypeError: one of the two is missing.
      RuntimeError: the scaler has stepped this optimizer already.
    """
    if scaler is None or optimizer is None:
        missing = "scaler" if scaler is None else "optimizer"
        raise TypeError(
            f"scaler and optimizer must be given together, got no {missing}; call "
            "step(scaler=scaler, optimizer=optimizer)"
        )
    optimizer = unwrap(optimizer)
    if not scaler.is_enabled():
        return NO_SCALE
    # `unscale_` refuses a second call, and nothing public tells whether it was called.
    state = scaler._per_optimizer_states[id(optimizer)]
    if state["stage"].name == "STEPPED":
        raise RuntimeError(
            "clipper.step must be called before scaler.step(optimizer), which has run; "
            "the order is backward, clipper.step, scaler.step, scaler.update"
        )
    if state["stage"].name == "READY":
        scaler.unscale_(optimizer)
    found = state["found_inf_per_device"].values()  # empty without any gradient
    none = torch.zeros_like(scaler._scale)
    own = (overflow.to(none.device, non_blocking=True) for overflow in found)
    return LossScale(None, sum(own, none))


def check_unscaled(
    parameters: Sequence[Tensor], scaler: Any, optimizer: Optimizer
) -> None:
    """Refuse gradients of another optimizer that are still multiplied by the scale."""
    states = scaler._per_optimizer_states.items()
    others = any(
        key != id(optimizer) and state["stage"].name == "UNSCALED"
        for key, state in states
    )
    stepped = stepped_parameter_ids(optimizer)
    outside = [
        parameter
        for parameter in parameters
        if id(parameter) not in stepped and parameter.grad is not None
    ]
    if outside and not others:
        raise ValueError(
            f"optimizer must step all parameters of its clipper, got one that leaves "
            f"out {len(outside)} with a gradient, which is still multiplied by the "
            "loss scale; call scaler.unscale_ with the other optimizer first, or make "
            "a clipper of what each optimizer steps"
        )


def share_overflow(scaler: Any, optimizer: Any, overflow: Tensor | None) -> None:
    """Let a scaler do on this rank what it does on the one that overflowed.

    Args:
      scaler: it skips the update and lowers its scale, or does neither.
      optimizer: the optimizer whose gradients it has unscaled.
      overflow: not 0 where the gradients of any rank overflowed.
    """
    if overflow is None:
        return
    state = scaler._per_optimizer_states[id(unwrap(optimizer))]
    found = state["found_inf_per_device"]
    found.setdefault(overflow.device, overflow)
    for own in found.values():
        own.copy_(overflow, non_blocking=True)


def pop_controls(optimizer: Optimizer) -> dict[str, Any]:
    """Return what the optimizer is told, and tell it nothing."""
    own = vars(optimizer)
    return {name: own.pop(name) for name in CONTROLS if name in own}


def require_every_step(optimizer: Optimizer) -> bool:
    """Have a GradScaler step the optimizer on every rank, also where one overflows.

    It would leave it out on that rank alone, and the others would wait for its norms.
    Called everywhere, a clipper can refuse it. Return whether that was not so before.
    """
    if getattr(optimizer, _EVERY_STEP, False):
        return False
    setattr(optimizer, _EVERY_STEP, True)
    return True


def allow_skipped_steps(optimizer: Optimizer) -> None:
    """Undo `require_every_step`."""
    vars(optimizer).pop(_EVERY_STEP, None)


def refuse_scaler(optimizer: Optimizer) -> None:
    """Raise if a GradScaler steps the optimizer: each rank's own would go its own way.

    Raises:
      RuntimeError: it does.
    """
    if pop_controls(optimizer):
        raise RuntimeError(
            "with process_group a GradScaler must be given to the clipper, so that all "
            "ranks skip and lower its scale together; instead of attach() or "
            "as_optimizer(), call clipper.step(scaler=scaler, optimizer=optimizer) "
            "before scaler.step(optimizer)"
        )
