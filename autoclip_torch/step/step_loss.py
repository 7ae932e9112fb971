"""The loss of a step: from the training loop to the decision, the same on all ranks."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autoclip_core.checks import format_error
from autoclip_core.loss import LossDecision
from autoclip_torch.gradients.ranks import Ranks, is_sharded
from autoclip_torch.state.policy_states import PolicyStates


class StepLoss:
    """The loss that the next step decides on; a clipper without loss policy has none.

    Args:
      is_needed: whether the clipper has a loss policy.
    """

    def __init__(self, is_needed: bool) -> None:
        """Start without a loss."""
        self.is_needed = is_needed
        self._loss: Tensor | None = None

    def give(self, loss: Any) -> None:
        """Keep the loss for the next step; it replaces one that no step has used.

        Raises:
          ValueError: there is no loss policy, or the loss has more than one element.
          TypeError: the loss is not a real number.
        """
        if not self.is_needed:
            raise ValueError(
                "loss must be left out without a loss policy; make the clipper with "
                "loss_policy=MeanStd(6.0, history_length=128)"
            )
        loss = loss.full_tensor() if is_sharded(loss) else loss
        is_complex = isinstance(loss, Tensor) and loss.is_complex()
        if is_complex or isinstance(loss, str | complex):
            rule, way_out = "a real number", "give the mean loss of the step"
            raise TypeError(format_error("loss", rule, loss, way_out))
        value = torch.as_tensor(loss).detach()
        if value.numel() != 1 or value.ndim > 1:
            rule, way_out = "of shape () or (1,)", "reduce it first: loss.mean()"
            raise ValueError(format_error("loss", rule, tuple(value.shape), way_out))
        self._loss = value.reshape(1)

    def give_closure_loss(self, loss: Any) -> None:
        """Keep what a closure returned, unless the training loop gave a loss."""
        if self.is_needed and self._loss is None and loss is not None:
            self.give(loss)

    def take(self) -> Tensor | None:
        """Return the loss of this step, or None without a loss policy.

        Raises:
          ValueError: the training loop gave no loss for this step.
        """
        if not self.is_needed:
            return None
        loss, self._loss = self._loss, None
        if loss is None:
            raise ValueError(
                "loss must be given in each step of a clipper with a loss policy, got "
                "none; call clipper.step(loss=loss), or clipper.observe_loss(loss) "
                "before optimizer.step() if the clipper is attached or wrapped"
            )
        return loss


def decide_on_loss(
    loss: Tensor | None, states: PolicyStates, ranks: Ranks | None
) -> LossDecision | None:
    """Return the decision on the mean loss of the ranks; None without a loss policy."""
    if loss is None or states.losses is None:
        return None
    device = states.device
    if device is None:  # NumPy reads the loss, so the copy must be complete
        loss = loss.to("cpu", torch.float32)
    else:
        loss = loss.to(device, torch.float32, non_blocking=True)
    return states.losses.decide(_average(loss, ranks))


def _average(loss: Tensor, ranks: Ranks | None) -> Tensor:
    """Return the mean over the ranks that sum norms; without these, over all ranks."""
    if ranks is not None:
        groups = ranks.groups
    elif dist.is_available() and dist.is_initialized():
        groups = (dist.group.WORLD,)
    else:
        return loss
    for group in groups:
        loss = loss / dist.get_world_size(group)
        dist.all_reduce(loss, group=group)
    return loss
