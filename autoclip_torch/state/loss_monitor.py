"""The loss policy of a clipper: its state, its last decision, and its checkpoint."""

from typing import Any

import numpy as np
import torch

from autoclip_core import Policy
from autoclip_core.clipper.serialize import policy_to_dict
from autoclip_core.loss import (
    LossDecision,
    LossState,
    check_loss_policy,
    compute_loss_metrics,
    decide_loss,
    empty_loss_decision,
    init_loss,
)
from autoclip_core.policy import limit_and_record

from .compatibility import check_loss_matches
from .namespace import TorchNamespace
from .serialize import state_from_dict, state_to_dict
from .trees import move, store


class LossMonitor:
    """What a loss policy has recorded, on the CPU or on a device.

    Args:
      policy: as `loss_policy` of `Clipper`.

    Raises:
      TypeError, ValueError: the value is not a policy, or the policy does not work on
        negative values.
    """

    def __init__(self, policy: Policy) -> None:
        check_loss_policy(policy)
        self.policy = policy
        self._namespace: TorchNamespace | None = None
        self.state: LossState = init_loss(policy)
        self.decision: LossDecision = empty_loss_decision()

    def decide(self, loss: torch.Tensor) -> LossDecision:
        """Decide on the loss of a step, and record it. On a device nothing is read."""
        xp, device = self._namespace or np, self._device
        value = loss.cpu().numpy() if device is None else loss.to(device)
        state, self.decision = decide_loss(self.policy, self.state, value, xp)
        self.state = store(state, self.state, device)
        return self.decision

    def move_to(self, namespace: TorchNamespace | None) -> None:
        """Move state and decision to the device of a namespace; None is NumPy."""
        self._namespace = namespace
        xp, device = namespace or np, self._device
        # A trial call copies the tables of the policy to the device.
        one = xp.full((1,), 1.0, dtype=xp.float32)
        limit_and_record(self.policy, self.policy.init(1, xp), one, xp=xp)
        self.state = move(self.state, device)
        self.decision = move(self.decision, device)

    def reset(self) -> None:
        """Delete the recorded losses and the count."""
        xp = self._namespace or np
        self.state = store(init_loss(self.policy, xp), self.state, self._device)
        self.decision = empty_loss_decision(xp)

    def compute_metrics(self) -> dict[str, Any]:
        """Return what to log of the last loss; on a device nothing is read."""
        loss, threshold, *_ = self.decision
        return compute_loss_metrics(loss, threshold, self.state)

    def to_dict(self) -> dict[str, Any]:
        """Return the policy and a copy of the state, for a checkpoint."""
        policy = policy_to_dict(self.policy)
        return {"policy": policy, "state": state_to_dict(self.state)}

    def convert(self, saved: Any, strict: bool) -> LossState:
        """Return a saved state in the present structure; None gives an empty state.

        Raises:
          ValueError: the state does not fit; `strict` is as in `load_state_dict`.
        """
        if saved is None:  # saved without a loss policy
            return init_loss(self.policy, self._namespace or np)
        check_loss_matches(saved, self.to_dict(), strict)
        state: LossState = state_from_dict(
            saved["state"], self.state, "loss", is_signed=True
        )
        return state

    def load(self, state: LossState) -> None:
        """Continue from a state that `convert` returned."""
        self.state = store(state, self.state, self._device)
        self.decision = empty_loss_decision(self._namespace or np)

    @property
    def _device(self) -> torch.device | None:
        return None if self._namespace is None else self._namespace.device
