"""`LossObserver`: an observer that may decide on the loss of a step, too."""

from typing import Any

from autoclip_core import Policy

from .observer import Observer


class LossObserver(Observer):
    """An `Observer` with an optional loss policy; a `Clipper` derives from it."""

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
