"""Clipping inside `optimizer.step()`."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from autoclip_torch.coverage.open_steps import is_outermost_step
from autoclip_torch.loop.backward_in_step import BackwardCheck
from autoclip_torch.observer.observer import Observer
from autoclip_torch.step.closure import find_closure, replace_closure, run_after
from autoclip_torch.step.stepper import Stepper
from autoclip_torch.step.unwrap import stepped_parameter_ids

from .chain import ClipperChain
from .step_hooks import StepHooks


class Attachment(StepHooks):
    """The handle of `clipper.attach(optimizer)`; `remove()` ends it.

    A copied optimizer has no hooks, and a copied clipper is not attached either. Attach
    the two copies again.

    Args:
      clipper: the clipper.
      optimizer: the innermost optimizer.
      is_trust_clip: whether the clipper is the gradient filter of a `TrustClip`.
    """

    def __init__(
        self, clipper: Observer, optimizer: Optimizer, *, is_trust_clip: bool = False
    ) -> None:
        """Register the hooks."""
        stepper = clipper._stepper
        clipper._take_in(optimizer)
        check_steps_all(stepper.rows.parameters, optimizer)
        refuse_beside_trust_clip(stepper, optimizer)
        self.is_trust_clip = is_trust_clip
        self._clipper, self._stepper = clipper, stepper
        others = Attachment.find_all(optimizer)
        self._chain: ClipperChain = others[0]._chain if others else ClipperChain()
        self._chain.add(clipper, optimizer)
        self._backward_check = BackwardCheck()
        super().__init__(optimizer)
        if not is_trust_clip:  # its other half is checked
            clipper._act_in(optimizer)

    def remove(self) -> None:
        """Remove the hooks and all that was set on the optimizer."""
        self._clipper._coverage.end()
        if self.active:
            self._chain.clippers.remove(self._clipper)
        if (optimizer := self._optimizer()) is not None:
            self._chain.restore(optimizer)
        super().remove()

    def _before_step(
        self, optimizer: Optimizer, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        """Clip. If `step` has a closure, wrap it instead.

        The closure computes the gradients after this hook.
        """
        if not is_outermost_step(optimizer):
            return None
        if not torch.compiler.is_compiling():
            self._chain.controls.begin(self._stepper, optimizer)
        if (closure := find_closure(args, kwargs)) is None:
            self._clip(optimizer)
            self._backward_check.begin(self._stepper.rows.parameters)
            return None
        clip = partial(self._clip_after_closure, optimizer)
        return replace_closure(args, kwargs, run_after(closure, clip))

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._chain.restore(optimizer)
        if is_outermost_step(optimizer):
            self._backward_check.end(optimizer)

    def _clip_after_closure(self, optimizer: Optimizer, loss: Any) -> None:
        self._stepper.loss.give_closure_loss(loss)
        self._clip(optimizer)

    def _clip(self, optimizer: Optimizer) -> None:
        if not torch.compiler.is_compiling():
            self._chain.clip(self._stepper, optimizer)
            return
        # Compiled code ignores attributes that are set on a fused optimizer here.
        if getattr(optimizer, "grad_scale", None) is not None:
            raise RuntimeError(
                "a fused optimizer with a clipper attached cannot be compiled if it "
                "unscales the gradients for a GradScaler; call "
                "scaler.unscale_(optimizer) before scaler.step(optimizer)"
            )
        self._stepper.step()


def check_steps_all(clipped: list[Tensor], optimizer: Optimizer) -> None:
    """Refuse an optimizer that steps only a part of the clipper's parameters.

    The gradients of the other parameters belong to another backward pass, as in a GAN.
    Or they do not exist yet, if each parameter is stepped within the backward pass.
    """
    trained = [parameter for parameter in clipped if parameter.requires_grad]
    stepped = stepped_parameter_ids(optimizer)
    count = sum(id(parameter) in stepped for parameter in trained or clipped)
    if not count:
        raise ValueError(
            "optimizer must step parameters of this clipper, got one that steps none "
            "of them; make both after the model was moved, wrapped or sharded; if each "
            "layer has an optimizer that steps within the backward pass, attach a "
            "clipper to each of them"
        )
    if count < len(trained):
        raise ValueError(
            f"optimizer must step all parameters of its clipper, got {count} of the "
            f"{len(trained)}: when it steps, the other parameters may have no gradient "
            "yet, or one of another backward pass; make a clipper for each optimizer, "
            "of the parameters that it steps"
        )


def refuse_beside_trust_clip(stepper: Stepper, optimizer: Optimizer) -> None:
    """Refuse to clip gradients that a `TrustClip` clips already.

    A clipper in a dry run, or one with a loss policy, may be attached, too.
    """
    if clips_gradients(stepper) and has_trust_clip(optimizer):
        raise RuntimeError(
            "the optimizer has a TrustClip, which clips its gradients already, so they "
            "would be clipped twice; leave this clipper out, or replace the TrustClip "
            "by an UpdateClipper, which bounds the update and clips no gradient"
        )


def clips_gradients(stepper: Stepper) -> bool:
    """Return whether a clipper clips gradients, and is not there for another reason."""
    return not (stepper.dry_run or stepper.loss.is_needed)


def has_trust_clip(optimizer: Optimizer) -> bool:
    """Return whether a `TrustClip` acts in the optimizer."""
    return any(
        attachment.is_trust_clip for attachment in Attachment.find_all(optimizer)
    )


def list_attached(optimizer: Optimizer) -> list[Stepper]:
    """Return the steppers that are attached to the optimizer."""
    return [attachment._stepper for attachment in Attachment.find_all(optimizer)]
