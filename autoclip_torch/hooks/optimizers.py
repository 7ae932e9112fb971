"""Which optimizers run the hooks in each of their steps; the others are refused."""

import functools
from types import MethodType
from typing import Any

import torch

from autoclip_torch.loop.gradient_samples import are_equal, copy_values
from autoclip_torch.step.unwrap import stepped_parameters

STEP_METHODS = (
    "first_step",
    "second_step",
    "third_step",
    "ascent_step",
    "descent_step",
)
"""Methods other than `step` that step an optimizer, in SAM and similar optimizers."""


def refuse_step_in_backward(optimizer: Any) -> None:
    """Refuse an optimizer that steps within the backward pass.

    Raises:
      ValueError: it does, as LOMO and an overlapping `ZeroRedundancyOptimizer` do.
    """
    if callable(getattr(optimizer, "fused_backward", None)):
        where = "fused_backward; use its own arguments for clipping"
    elif getattr(optimizer, "_overlap_with_ddp", False):
        where = "the hooks of DDP; leave overlap_with_ddp=True out"
    else:
        return
    raise ValueError(
        f"optimizer must step after the backward pass, got {_name(optimizer)}, which "
        f"steps within {where}"
    )


def refuse_other_steps(optimizer: Any) -> None:
    """Refuse an optimizer that also steps in methods where torch runs no hook.

    Raises:
      ValueError: it does, as SAM and similar optimizers do.
    """
    if methods := [m for m in STEP_METHODS if callable(getattr(optimizer, m, None))]:
        lines = ", ".join(f'"clipper.step(); optimizer.{m}()"' for m in methods)
        raise ValueError(
            f"optimizer must step in step() alone, got {_name(optimizer)}, which also "
            f"steps in {' and '.join(methods)}, where torch runs no hook; write {lines}"
            ", each after its backward pass, or use as_optimizer(optimizer, ...)"
        )


def make_hooks_run(optimizer: Any) -> None:
    """Let torch wrap `step`, so that it runs the hooks.

    torch does that in `Optimizer.__init__`, which a subclass may leave out.

    Raises:
      RuntimeError: `step` was replaced on the object before.
    """
    step = vars(optimizer).get("step")
    if not getattr(type(optimizer).step, "hooked", False):
        if step is not None:
            raise RuntimeError(
                "optimizer.step must run torch's hooks, got a "
                f"{type(optimizer).__name__} whose __init__ does not call that of "
                "torch.optim.Optimizer, and whose step was replaced; attach the "
                "clipper before a learning-rate scheduler is made"
            )
        optimizer._patch_step_function()
    elif not getattr(step, "hooked", step is None):
        optimizer.step = MethodType(_check_first_update(step), optimizer)


def _check_first_update(step: Any) -> Any:
    """Return a `step` of an object that checks whether its first update ran the hooks.

    The given one may call that of the class, in all calls or in some: only an update
    shows which. That of a learning-rate scheduler has the mark `hooked` of the class.
    """
    is_checked = False

    @functools.wraps(step)
    def checked_step(optimizer: Any, *args: Any, **keywords: Any) -> Any:
        nonlocal is_checked
        has_hooks = bool(optimizer._optimizer_step_pre_hooks)
        if is_checked or not has_hooks or torch.compiler.is_compiling():
            return step(*args, **keywords)
        ran: list[Any] = []
        weights = list(stepped_parameters(optimizer))
        before = copy_values(weights)
        handle = optimizer.register_step_pre_hook(lambda *_: ran.append(True))
        try:
            result = step(*args, **keywords)
        finally:
            handle.remove()
        is_checked = bool(ran)
        if not ran and not are_equal(before, copy_values(weights)):
            raise RuntimeError(
                "optimizer.step must run torch's hooks, got a "
                f"{type(optimizer).__name__} whose step was replaced by one that runs "
                "none, so this update was not clipped; define that one as step in a "
                "subclass"
            )
        return result

    checked_step.hooked = True  # type: ignore[attr-defined]
    return checked_step


def _name(optimizer: Any) -> str:
    return type(optimizer).__name__
