"""Clipping inside `optimizer.step()`."""

import warnings
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from .amp import stepped_ids, unwrap
from .fused import Controls, is_fused

if TYPE_CHECKING:
    from .clipper import Clipper


class Attachment:
    """The handle of `clipper.attach(optimizer)`; `remove()` ends it.

    Pickling or copying an optimizer drops its hooks, as torch does with all of them; a
    copy of the clipper is not attached either. Attach the copies to each other.
    """

    def __init__(self, clipper: "Clipper", optimizer: Any) -> None:
        """Register the hooks on the innermost optimizer."""
        optimizer = unwrap(optimizer)
        _check_owner(clipper, optimizer)
        self._clipper = clipper
        self._saw_gradient = False
        self._optimizer = weakref.ref(optimizer)
        others = _attachments(optimizer)
        self._controls: Controls
        self._controls = others[0]._controls if others else Controls()
        self._controls.clippers.append(clipper)
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

    def remove(self) -> None:
        """Leave the optimizer as it was."""
        if self.active:
            self._controls.clippers.remove(self._clipper)
        if (optimizer := self._optimizer()) is not None:
            self._controls.restore(optimizer)
        for hook in self._hooks:
            hook.remove()
        if self._clipper._attachment is self:
            self._clipper._attachment = None

    def __reduce__(self) -> Any:
        """Become None in a copy, whose optimizer has lost its hooks."""
        return type(None), ()

    def _before_step(
        self, optimizer: Optimizer, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        """Clip, or let the closure clip: it computes the gradients after this hook."""
        if kwargs.get("closure") is not None:
            closure = self._clipped(optimizer, kwargs["closure"])
            return args, {**kwargs, "closure": closure}
        if len(args) > 1 and args[1] is not None:  # args[0] is the optimizer
            return (args[0], self._clipped(optimizer, args[1]), *args[2:]), kwargs
        self._clip(optimizer)
        return None

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
        self._check_gradients()
        compiling = torch.compiler.is_compiling()
        if is_fused(optimizer) and not compiling:
            self._controls.clip(self._clipper, optimizer)
            return
        # Compiled code would not see what is told to a fused optimizer here.
        if compiling and getattr(optimizer, "grad_scale", None) is not None:
            raise RuntimeError(
                "a fused optimizer with a clipper attached cannot be compiled where a "
                "GradScaler leaves its scale to it; call scaler.unscale_(optimizer) "
                "before scaler.step(optimizer)"
            )
        self._clipper._step()

    def _check_gradients(self) -> None:
        """Warn if there never was a gradient: the parameters may be others."""
        if torch.compiler.is_compiling() or self._saw_gradient:
            return  # what a compiled step has seen would compile the next one anew
        slots = self._clipper._learner.rows.slots
        self._saw_gradient = any(slot.parameter.grad is not None for slot in slots)
        if not self._saw_gradient:
            warnings.warn(
                "an attached clipper has not seen a gradient yet: none of its "
                "parameters has one in optimizer.step(); call backward() first, and "
                "make the clipper of the parameters that are trained",
                stacklevel=5,
            )


def _check_owner(clipper: "Clipper", optimizer: Optimizer) -> None:
    """Refuse an optimizer of other parameters, and to clip twice in a step."""
    current = clipper._attachment
    if current is not None and current.active:
        raise RuntimeError(
            "the clipper is attached already, and twice in a step it would clip what "
            "it has clipped; call remove() on the handle first, or make a clipper for "
            "each optimizer"
        )
    if getattr(optimizer, "clipper", None) is clipper:
        raise RuntimeError(
            "this optimizer was made by as_optimizer() and clips already; leave "
            "attach() out"
        )
    check_steps_all(clipper, optimizer)


def check_steps_all(clipper: "Clipper", optimizer: Optimizer) -> None:
    """Refuse an optimizer of only some of what a clipper holds.

    The gradients of the others belong to another backward, as in a GAN, or are not
    there yet, as where each parameter is stepped within the backward pass.
    """
    slots = clipper._learner.rows.slots
    trained = [slot for slot in slots if slot.parameter.requires_grad]
    stepped = stepped_ids(optimizer)
    here = sum(id(slot.parameter) in stepped for slot in trained or slots)
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


def check_unscaled(clipper: "Clipper", scaler: Any, optimizer: Optimizer) -> None:
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
        slot.parameter
        for slot in clipper._learner.rows.slots
        if id(slot.parameter) not in stepped and slot.parameter.grad is not None
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
