"""`Attachable`: a clipper that can act inside the step of an optimizer."""

import weakref
from typing import Any

import torch

from autoclip_core import Policy
from autoclip_torch.observer.observer import Observer
from autoclip_torch.step.unwrap import unwrap

from .clipper_chain import Attachment


class Attachable(Observer):
    """A clipper that can be attached, and then gets its loss before the step.

    `Clipper` derives from it.
    """

    _attachment: weakref.ref[Attachment] | None = None

    def attach(self, optimizer: Any) -> Attachment:
        """Clip inside `optimizer.step()`; the training loop needs no other line.

        With a closure (LBFGS, Lightning), each backward pass in it is clipped. The
        optimizer inside a wrapper, such as Accelerate's, is used. After a `GradScaler`
        overflow nothing is recorded.

        With `fused=True`, the optimizer's kernel cancels updates, so nothing is read
        back. If all gradients share one norm, the kernel also scales them, without
        another pass over them; nonfinite="zero" then cancels the update. A cancelled
        update is cancelled for all parameters of the optimizer, after every clipper
        that is attached to it has measured its gradients.

        Args:
          optimizer: the torch optimizer of these parameters, or a wrapper around it.

        Returns:
          A handle; `remove()` ends the attachment. A copied or unpickled optimizer has
          no hooks: attach to it again.

        Raises:
          RuntimeError: the clipper is attached already.
          ValueError: the optimizer does not step all trained parameters of the clipper.
          TypeError: `optimizer` is not a torch optimizer.

        >>> from autoclip_core import Fixed
        >>> from autoclip_torch import Clipper
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> handle = Clipper([weight], Fixed(1.0)).attach(optimizer)
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> optimizer.step()
        >>> weight.data
        tensor([-0.6000, -0.8000])
        """
        if self._find_attachment() is not None:
            raise RuntimeError(
                "the clipper is attached already, and would clip the gradients twice; "
                "call remove() on the handle first, or make a clipper for each "
                "optimizer"
            )
        optimizer = unwrap(optimizer)
        if getattr(optimizer, "clipper", None) is self:
            raise RuntimeError(
                "this optimizer was made by as_optimizer() and clips already; leave "
                "attach() out"
            )
        return self._attach(optimizer)

    @property
    def loss_policy(self) -> Policy | None:
        """The policy for the loss, or None."""
        losses = self._policy_states.losses
        return None if losses is None else losses.policy

    def observe_loss(self, loss: Any) -> None:
        """Give the loss of the next step to a clipper with a `loss_policy`.

        Call it before `optimizer.step()` if the clipper is attached or wrapped. If the
        optimizer gets a closure, leave it out: the clipper uses what the closure
        returns. A loss given here replaces the first of these.

        Args:
          loss: the loss of the whole step, a number or a tensor with one element: not
            multiplied by a loss scale, and with gradient accumulation the mean. With
            several ranks, the mean over `process_group`, over the ranks of sharded
            parameters, or else over all ranks decides; each rank must give its loss. A
            tensor on an accelerator is not read here.

        Raises:
          ValueError: the clipper has no `loss_policy`, or the loss is not one number.

        >>> import torch
        >>> from autoclip_core import Fixed
        >>> from autoclip_torch import Clipper
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> clipper = Clipper([weight], Fixed(1.0), loss_policy=Fixed(5.0))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> clipper.observe_loss(7.0)
        >>> clipper.step().skipped, weight.grad
        (tensor([True]), None)
        """
        self._stepper.loss.give(loss)

    def _attach(self, innermost: torch.optim.Optimizer, **keywords: Any) -> Attachment:
        attachment = Attachment(self, innermost, **keywords)
        self._attachment = weakref.ref(attachment)
        return attachment

    def _detach(self) -> None:
        if (attachment := self._find_attachment()) is not None:
            attachment.remove()
        self._coverage.end()

    def _find_attachment(self) -> Attachment | None:
        """Return the attachment if it acts. The optimizer keeps it alive."""
        attachment = None if self._attachment is None else self._attachment()
        return attachment if attachment is not None and attachment.active else None

    def _refuse_if_attached(self) -> None:
        """Refuse a step by hand, unless the optimizer was deleted."""
        if self._attachment is None:
            return
        if self._find_attachment() is not None:
            raise RuntimeError(
                "an attached clipper clips inside optimizer.step(), so clipper.step() "
                "would clip the gradients twice; leave clipper.step() out, or call "
                "clipper.detach() first; to log, call log.record(clipper.metrics()) "
                "after optimizer.step()"
            )
        self._attachment = None
        self._coverage.end()

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle and deepcopy copy: a copy is not attached."""
        return {**vars(self), "_attachment": None}
