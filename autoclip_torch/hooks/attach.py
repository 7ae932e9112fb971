"""Clipping inside `optimizer.step()`."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from autoclip_torch.step.stepper import Stepper
from autoclip_torch.step.unwrap import stepped_parameter_ids

from .chain import ClipperChain


class Attachment:
    """The handle of `clipper.attach(optimizer)`; `remove()` ends it.

    Pickling or copying an optimizer drops its hooks, as torch does with all of them; a
    copy of the clipper is not attached either. Attach the copies to each other.
    """

    def __init__(self, stepper: Stepper, optimizer: Optimizer) -> None:
        """Register the hooks."""
        check_steps_all(stepper.rows.parameters, optimizer)
        self._stepper = stepper
        self._optimizer = weakref.ref(optimizer)
        others = _attachments(optimizer)
        self._all: ClipperChain = others[0]._all if others else ClipperChain()
        self._all.add(stepper, optimizer)
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    @property
    def active(self) -> bool:
        """Whether it clips: not after `remove()`, nor when the optimizer is gone."""
        hook = self._hooks[0]
        return hook.id in (hook.hooks_dict_ref() or {})

    def remove(self) -> None:
        """Leave the optimizer as it was."""
        if self.active:
            self._all.remove(self._stepper)
        if (optimizer := self._optimizer()) is not None:
            self._all.restore(optimizer)
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
            self._all.begin(self._stepper, optimizer)
        if kwargs.get("closure") is not None:
            closure = self._clipped(optimizer, kwargs["closure"])
            return args, {**kwargs, "closure": closure}
        if len(args) > 1 and args[1] is not None:  # args[0] is the optimizer
            return (args[0], self._clipped(optimizer, args[1]), *args[2:]), kwargs
        self._clip(optimizer)
        return None

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._all.restore(optimizer)

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
        if not torch.compiler.is_compiling():
            self._all.clip(self._stepper, optimizer)
            return
        # Compiled code would not see what is told to a fused optimizer here.
        if getattr(optimizer, "grad_scale", None) is not None:
            raise RuntimeError(
                "a fused optimizer with a clipper attached cannot be compiled where a "
                "GradScaler leaves its scale to it; call scaler.unscale_(optimizer) "
                "before scaler.step(optimizer)"
            )
        self._stepper.step()


def check_steps_all(clipped: list[Tensor], optimizer: Optimizer) -> None:
    """Refuse an optimizer of only some of what a clipper holds.

    The gradients of the others belong to another backward, as in a GAN, or are not
    there yet, as where each parameter is stepped within the backward pass.
    """
    trained = [parameter for parameter in clipped if parameter.requires_grad]
    stepped = stepped_parameter_ids(optimizer)
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


def _attachments(optimizer: Optimizer) -> list["Attachment"]:
    """Return those that clip in this optimizer already."""
    hooks = optimizer._optimizer_step_pre_hooks.values()
    owners = (getattr(hook, "__self__", None) for hook in hooks)
    return [owner for owner in owners if isinstance(owner, Attachment)]
