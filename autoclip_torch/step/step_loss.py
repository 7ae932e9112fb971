"""The loss of a step: from the training loop to the decision, the same on all ranks."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autoclip_core.checks import format_error
from autoclip_core.loss import LossDecision
from autoclip_torch.gradients.device import get_wide_type
from autoclip_torch.gradients.dtensor import is_sharded
from autoclip_torch.gradients.ranks import Ranks
from autoclip_torch.gradients.step_counter import StepCounter
from autoclip_torch.state.policy_states import PolicyStates


class StepLoss:
    """The loss of the next step; a clipper without loss policy has none."""

    def __init__(self, is_needed: bool) -> None:
        self.is_needed = is_needed
        self._loss: Tensor | None = None
        self._counter: StepCounter | None = None

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

    def decide(
        self, loss: Tensor | None, states: PolicyStates, ranks: Ranks | None
    ) -> LossDecision | None:
        """Return the decision on the mean loss of the ranks; None without a loss.

        Args:
          loss: what `take` returned; every rank must call this.
          states: the policy states of the clipper.
          ranks: the ranks that sum norms. Without them, it is the mean of all ranks.

        Raises:
          RuntimeError: a rank left out a step. Without `ranks`, no other reduction of
            the step shows this.
        """
        if loss is None or states.losses is None:
            return None
        device = states.device
        if device is None:  # NumPy reads the loss, so the copy must be complete
            loss = loss.to("cpu", torch.float32)
        else:
            loss = loss.to(device, torch.float32, non_blocking=True)
        if ranks is not None:
            loss = ranks.average(loss)
        elif dist.is_available() and dist.is_initialized():
            loss = self._average(loss, states.rows.parameters, "step")
        return states.losses.decide(loss)

    def compare_steps(self, states: PolicyStates) -> None:
        """Check that all ranks have taken the same steps, if these average their loss.

        Raises:
          RuntimeError: a rank left out a step.
        """
        if self.is_needed:
            nothing = torch.zeros(1, device=states.device or "cpu")
            self._average(nothing, states.rows.parameters, "check_agreement")

    def _average(
        self, loss: Tensor, parameters: Sequence[Tensor], reason: str
    ) -> Tensor:
        if self._counter is None:
            self._counter = StepCounter()
        self._counter.parameters = parameters
        part = loss.to(get_wide_type(loss.device)) / dist.get_world_size()
        groups = [dist.group.WORLD]
        return self._counter.reduce(part, groups, reason=reason).to(loss.dtype)
