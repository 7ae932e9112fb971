"""Mixed precision: the loss scale of a `GradScaler` in the gradients."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from .unwrap import stepped_parameter_ids, unwrap

CONTROLS = ("grad_scale", "found_inf")
"""The attributes that a `GradScaler` sets on an optimizer during a step."""

_EVERY_STEP = "_step_supports_amp_scaling"


class LossScale(NamedTuple):
    """The part of a loss scale that is still in the gradients."""

    factor: Tensor | None = None
    """The gradients are still multiplied by this number. None if they are not."""
    overflow: Tensor | None = None
    """Not 0 if the scaled gradients overflowed. Such a step is not observed."""

    def leave_out(self, observed: Any, states: Any) -> Any:
        """Return which rows are observed: none of a step that overflowed."""
        if self.overflow is None:
            return observed
        return observed & (states.as_array(self.overflow) == 0)


NO_SCALE = LossScale()
"""There is no loss scale, or nothing of it is left."""


def unscale_once(scaler: Any, optimizer: Any) -> LossScale:
    """Unscale an optimizer's gradients, unless it was done in this step already.

    Raises:
      TypeError: the scaler is given without the optimizer, or the reverse.
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
    # `unscale_` refuses a second call. There is no public way to ask for the first.
    state = scaler._per_optimizer_states[id(optimizer)]
    if state["stage"].name == "STEPPED":
        refuse_after_step()
    if state["stage"].name == "READY":
        scaler.unscale_(optimizer)
    none = torch.zeros_like(scaler._scale)
    overflows = state["found_inf_per_device"].values()  # empty without any gradient
    moved = (overflow.to(none.device, non_blocking=True) for overflow in overflows)
    return LossScale(None, sum(moved, none))


def refuse_after_step() -> None:
    """Refuse a clip between a scaler's step and its update.

    Raises:
      RuntimeError: always.
    """
    raise RuntimeError(
        "clipper.step must be called before scaler.step(optimizer), which has run; "
        "the order is backward, clipper.step, scaler.step, scaler.update"
    )


def check_unscaled(
    parameters: Sequence[Tensor], scaler: Any, optimizer: Optimizer
) -> None:
    """Refuse gradients of another optimizer that are still multiplied by the scale."""
    states = scaler._per_optimizer_states.items()
    other_states = [state for key, state in states if key != id(optimizer)]
    stepped = stepped_parameter_ids(optimizer)
    outside = [p for p in parameters if id(p) not in stepped and p.grad is not None]
    is_unscaled = any(state["stage"].name == "UNSCALED" for state in other_states)
    if outside and not is_unscaled:
        raise ValueError(
            f"optimizer must step all parameters of its clipper, got one that leaves "
            f"out {len(outside)} with a gradient, which is still multiplied by the "
            "loss scale; call scaler.unscale_ with the other optimizer first, or make "
            "a clipper of what each optimizer steps"
        )


def share_overflow(scaler: Any, optimizer: Any, overflow: Tensor) -> None:
    """Let a scaler do on this rank what it does on the rank that overflowed.

    Args:
      scaler: it will skip the update and lower its scale, or do neither.
      optimizer: the optimizer whose gradients it has unscaled.
      overflow: not 0 if the gradients of any rank overflowed.
    """
    state = scaler._per_optimizer_states[id(unwrap(optimizer))]
    overflows = state["found_inf_per_device"]
    overflows.setdefault(overflow.device, overflow)
    for rank_overflow in overflows.values():
        rank_overflow.copy_(overflow, non_blocking=True)


def pop_controls(optimizer: Optimizer) -> dict[str, Any]:
    """Remove and return the attributes of `CONTROLS` that are set."""
    attributes = vars(optimizer)
    return {name: attributes.pop(name) for name in CONTROLS if name in attributes}


def require_every_step(optimizer: Optimizer) -> bool:
    """Make a GradScaler step the optimizer on every rank, even after an overflow.

    Otherwise it would leave out the step on the rank that overflowed, and the other
    ranks would wait for its norms. If all ranks step, a clipper can refuse the scaler.
    Return whether this changed the optimizer.
    """
    if getattr(optimizer, _EVERY_STEP, False):
        return False
    setattr(optimizer, _EVERY_STEP, True)
    return True


def allow_skipped_steps(optimizer: Optimizer) -> None:
    """Undo `require_every_step`."""
    vars(optimizer).pop(_EVERY_STEP, None)


def refuse_scaler(optimizer: Optimizer) -> None:
    """Refuse a GradScaler: those of different ranks would take different decisions.

    Raises:
      RuntimeError: a GradScaler steps the optimizer.
    """
    if pop_controls(optimizer):
        raise RuntimeError(
            "with process_group a GradScaler must be given to the clipper, so that all "
            "ranks skip and lower its scale together; instead of attach() or "
            "as_optimizer(), call clipper.step(scaler=scaler, optimizer=optimizer) "
            "before scaler.step(optimizer)"
        )
