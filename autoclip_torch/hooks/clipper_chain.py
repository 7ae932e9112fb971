"""Clipping inside `optimizer.step()`: the clippers attached to one optimizer."""

import weakref
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from autoclip_torch.observer.observer import Observer
from autoclip_torch.optimizer_steps.open_steps import is_outermost_step
from autoclip_torch.step import amp
from autoclip_torch.step.closure import find_closure, replace_closure, run_after
from autoclip_torch.step.stepper import Stepper
from autoclip_torch.step.unwrap import stepped_parameters

from .backward_in_step import BackwardCheck
from .fused import Controls, is_fused
from .step_hooks import StepHooks
from .stepped_parameters import check_steps_all


class Attachment:
    """The handle of `clipper.attach(optimizer)`; `remove()` ends it.

    A copied optimizer has no hooks, and a copied clipper is not attached either. Attach
    the two copies again.

    Args:
      clipper: the clipper.
      optimizer: the innermost optimizer, which keeps the clipper alive.
      is_trust_clip: whether the clipper is the gradient filter of a `TrustClip`.
    """

    def __init__(
        self, clipper: Observer, optimizer: Optimizer, *, is_trust_clip: bool = False
    ) -> None:
        clipper._parameters.add_stepped(optimizer)
        check_steps_all(clipper._stepper.rows.parameters, optimizer)
        refuse_beside_trust_clip(clipper._stepper, optimizer)
        self.clipper, self.is_trust_clip = clipper, is_trust_clip
        chain = ClipperChain.find(optimizer) or ClipperChain(optimizer)
        chain.add(self, optimizer)
        self._chain = weakref.ref(chain)
        if not is_trust_clip:  # its other half is checked
            clipper._coverage.expect_steps(optimizer)

    @property
    def active(self) -> bool:
        """Whether it acts: until `remove()`, or until the optimizer is deleted."""
        chain = self._chain()
        return chain is not None and chain.active and self in chain.attachments

    def remove(self) -> None:
        """Take the clipper out of the steps of the optimizer."""
        self.clipper._coverage.end()
        if (chain := self._chain()) is not None:
            chain.discard(self)

    def __reduce__(self) -> Any:
        """Copy this object as None, because the copied optimizer has no hooks."""
        return type(None), ()


class ClipperChain(StepHooks):
    """The hooks of all clippers of one optimizer, in the order of attaching.

    Each measures its gradients, then one update follows.

    Args:
      optimizer: the innermost optimizer. A reference from here would keep it alive.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer)
        self.attachments: list[Attachment] = []
        self._controls = Controls()
        self._backward_check = BackwardCheck()
        self._requires_every_step = False

    def add(self, attachment: Attachment, optimizer: Optimizer) -> None:
        """Append a clipper."""
        self.attachments.append(attachment)
        if self._has_process_group:
            self._requires_every_step |= amp.require_every_step(optimizer)

    def discard(self, attachment: Attachment) -> None:
        """Remove a clipper, if it is there, and what it has set on the optimizer."""
        self.attachments = [a for a in self.attachments if a is not attachment]
        if (optimizer := self._optimizer()) is not None:
            self._controls.restore(optimizer)
            if self._requires_every_step and not self._has_process_group:
                amp.allow_skipped_steps(optimizer)
                self._requires_every_step = False
        if not self.attachments:
            self.remove()

    @property
    def steppers(self) -> list[Stepper]:
        """The steps of each clipper."""
        return [attachment.clipper._stepper for attachment in self.attachments]

    def _before_step(
        self, optimizer: Optimizer, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        """Clip. If `step` has a closure, wrap it instead.

        The closure computes the gradients after this hook.
        """
        if not is_outermost_step(optimizer):
            return None
        if not torch.compiler.is_compiling():
            self._controls.begin(optimizer)
        if (closure := find_closure(args, kwargs)) is not None:
            clipped = run_after(closure, partial(self._clip, optimizer))
            return replace_closure(args, kwargs, clipped)
        self._clip(optimizer)
        self._backward_check.begin(stepped_parameters(optimizer))
        return None

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._controls.restore(optimizer)
        if is_outermost_step(optimizer):
            self._backward_check.end(optimizer)

    def _clip(self, optimizer: Optimizer, closure_loss: Any = None) -> None:
        steppers = self.steppers
        for stepper in steppers:
            stepper.loss.give_closure_loss(closure_loss)
        if torch.compiler.is_compiling():
            _clip_in_compiled_code(steppers, optimizer)
            return
        for attachment in self.attachments:
            attachment.clipper._follow_optimizers(optimizer)
        self._controls.restore(optimizer)  # a closure may have clipped before
        if self._has_process_group:
            amp.refuse_scaler(optimizer)
        if is_fused(optimizer):
            self._controls.clip(steppers, optimizer)
        else:
            _clip_in_place(steppers, optimizer)

    @property
    def _has_process_group(self) -> bool:
        return any(stepper.process_group is not None for stepper in self.steppers)


def _clip_in_place(steppers: list[Stepper], optimizer: Optimizer) -> None:
    """Clip gradients. If one clipper cancels the update, remove all of them."""
    cancels = [stepper.cancels(stepper.clip()) for stepper in steppers]
    if any(cancels):
        for parameter in stepped_parameters(optimizer):
            parameter.grad = None
    for stepper, is_cancelled in zip(steppers, cancels, strict=True):
        stepper.check(is_cancelled)


def _clip_in_compiled_code(steppers: list[Stepper], optimizer: Optimizer) -> None:
    # Compiled code ignores attributes that are set on a fused optimizer here.
    if getattr(optimizer, "grad_scale", None) is not None:
        raise RuntimeError(
            "a fused optimizer with a clipper attached cannot be compiled if it "
            "unscales the gradients for a GradScaler; call "
            "scaler.unscale_(optimizer) before scaler.step(optimizer)"
        )
    for stepper in steppers:
        stepper.step()


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
    chain = ClipperChain.find(optimizer)
    return chain is not None and any(a.is_trust_clip for a in chain.attachments)


def list_attached(optimizer: Optimizer) -> list[Stepper]:
    """Return the steppers that are attached to the optimizer."""
    chain = ClipperChain.find(optimizer)
    return [] if chain is None else chain.steppers
