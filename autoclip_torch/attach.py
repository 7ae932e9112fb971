"""Clipping inside `optimizer.step()`."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from .amp import (
    LossScale,
    be_stepped_always,
    be_stepped_as_ever,
    refuse_scaler,
    stepped_ids,
)
from .fused import Controls, is_fused
from .parameters import Parameters
from .stepper import Stepper
from .warn import warn


class Attachment:
    """The handle of `clipper.attach(optimizer)`; `remove()` ends it.

    Pickling or copying an optimizer drops its hooks, as torch does with all of them; a
    copy of the clipper is not attached either. Attach the copies to each other.
    """

    def __init__(self, stepper: Stepper, optimizer: Optimizer) -> None:
        """Register the hooks."""
        check_steps_all(stepper.parameters, optimizer)
        self._stepper = stepper
        self._optimizer = weakref.ref(optimizer)
        self._known_groups = len(optimizer.param_groups)
        others = _attachments(optimizer)
        self._controls: Controls
        self._controls = others[0]._controls if others else Controls()
        self._controls.steppers.append(stepper)
        self._of_stages = stepper.parameters.process_group is not None
        self._marked = self._of_stages and be_stepped_always(optimizer)
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    @property
    def active(self) -> bool:
        """Whether it clips: not after `remove()`, nor when the optimizer is gone."""
        hook = self._hooks[0]
        return hook.id in (hook.hooks_dict_ref() or {})

    def refuse_by_hand(self) -> None:
        """Raise if a step by hand would clip what the optimizer's step clips."""
        if self.active:
            raise RuntimeError(
                "an attached clipper clips inside optimizer.step(), and a second time "
                "in a step it would clip what it has clipped; leave clipper.step() "
                "out, or call clipper.detach() first"
            )

    def refuse_another(self) -> None:
        """Raise if another attachment would clip what this one clips."""
        if self.active:
            raise RuntimeError(
                "the clipper is attached already, and twice in a step it would clip "
                "what it has clipped; call remove() on the handle first, or make a "
                "clipper for each optimizer"
            )

    def remove(self) -> None:
        """Leave the optimizer as it was."""
        if self.active:
            self._controls.steppers.remove(self._stepper)
        if (optimizer := self._optimizer()) is not None:
            self._controls.restore(optimizer)
            if self._marked:
                be_stepped_as_ever(optimizer)
        for hook in self._hooks:
            hook.remove()

    def __reduce__(self) -> Any:
        """Become None in a copy, whose optimizer has lost its hooks."""
        return type(None), ()

    def _before_step(
        self, optimizer: Optimizer, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        """Clip, or let the closure clip: it computes the gradients after this hook."""
        if not torch.compiler.is_compiling():
            self._controls.begin(self._stepper, optimizer)
        if kwargs.get("closure") is not None:
            closure = self._clipped(optimizer, kwargs["closure"])
            return args, {**kwargs, "closure": closure}
        if len(args) > 1 and args[1] is not None:  # args[0] is the optimizer
            return (args[0], self._clipped(optimizer, args[1]), *args[2:]), kwargs
        self._clip(optimizer)
        return None

    def _check_groups(self, optimizer: Optimizer) -> None:
        """Warn of parameters that the optimizer was given since, and nobody clips."""
        new = optimizer.param_groups[self._known_groups :]
        if not new:
            return
        self._known_groups = len(optimizer.param_groups)
        steppers = self._controls.steppers  # another clipper may have them
        groups = [group for each in steppers for group in each.parameters.groups]
        known = {id(member.parameter) for group in groups for member in group.members}
        added = [p for group in new for p in group["params"] if id(p) not in known]
        if added:
            warn(
                f"the optimizer was given {len(added)} parameters after attach() that "
                "no clipper has, so they are not clipped; call "
                'clipper.add_param_group({"params": ...}) with them, too'
            )

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._controls.restore(optimizer)

    def _clipped(
        self, optimizer: Optimizer, closure: Callable[[], Any]
    ) -> Callable[[], Any]:
        """Return the closure, followed by clipping."""

        def clipped_closure() -> Any:
            loss = closure()
            self._clip(optimizer)
            return loss

        return clipped_closure

    def _clip(self, optimizer: Optimizer) -> None:
        compiling = torch.compiler.is_compiling()
        if not compiling:
            self._check_groups(optimizer)
        if self._of_stages and not compiling and not self._controls.telling:
            refuse_scaler(optimizer)
        if is_fused(optimizer) and not compiling:
            self._controls.clip(self._stepper, optimizer)
            return
        # Compiled code would not see what is told to a fused optimizer here.
        if compiling and getattr(optimizer, "grad_scale", None) is not None:
            raise RuntimeError(
                "a fused optimizer with a clipper attached cannot be compiled where a "
                "GradScaler leaves its scale to it; call scaler.unscale_(optimizer) "
                "before scaler.step(optimizer)"
            )
        self._stepper.step(LossScale())


def check_steps_all(parameters: Parameters, optimizer: Optimizer) -> None:
    """Refuse an optimizer of only some of what a clipper holds.

    The gradients of the others belong to another backward, as in a GAN, or are not
    there yet, as where each parameter is stepped within the backward pass.
    """
    clipped = parameters.rows.parameters
    trained = [parameter for parameter in clipped if parameter.requires_grad]
    stepped = stepped_ids(optimizer)
    here = sum(id(parameter) in stepped for parameter in trained or clipped)
    if not here:
        raise ValueError(
            "optimizer must step parameters of this clipper, got one that steps none "
            "of them; make both after the model was moved, wrapped or sharded"
        )
    if here < len(trained):
        raise ValueError(
            f"optimizer must step all parameters of its clipper, got {here} of the "
            f"{len(trained)}: when it steps, the others may have no gradient yet, or "
            "that of another backward; make a clipper of what each optimizer steps"
        )


def check_unscaled(parameters: Parameters, scaler: Any, optimizer: Optimizer) -> None:
    """Refuse gradients of another optimizer that are still multiplied by the scale."""
    if not scaler.is_enabled():
        return
    states = scaler._per_optimizer_states.items()
    others = any(
        key != id(optimizer) and state["stage"].name == "UNSCALED"
        for key, state in states
    )
    stepped = stepped_ids(optimizer)
    outside = [
        parameter
        for parameter in parameters.rows.parameters
        if id(parameter) not in stepped and parameter.grad is not None
    ]
    if outside and not others:
        raise ValueError(
            f"optimizer must step all parameters of its clipper, got one that leaves "
            f"out {len(outside)} with a gradient, which is still multiplied by the "
            "loss scale; call scaler.unscale_ with the other optimizer first, or make "
            "a clipper of what each optimizer steps"
        )


def _attachments(optimizer: Optimizer) -> list["Attachment"]:
    """Return those that clip in this optimizer already."""
    hooks = optimizer._optimizer_step_pre_hooks.values()
    owners = (getattr(hook, "__self__", None) for hook in hooks)
    return [owner for owner in owners if isinstance(owner, Attachment)]
