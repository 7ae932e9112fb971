"""One step: measure the gradients, decide, and scale them or have them scaled."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from autoclip_core import Decision
from autoclip_torch.gradients.parameters import Parameters, where
from autoclip_torch.rows.groups import Group
from autoclip_torch.rows.rows import Rows
from autoclip_torch.state.policy_states import PolicyStates

from .amp import NO_SCALE, LossScale
from .looks import is_skipped, refuse_nonfinite
from .run_checks import RunChecks


class Stepper:
    """What a clipper does in a step: by hand, attached, or with a fused optimizer.

    Args:
      groups: all parameters of the update.
      rows: those that are clipped.
      nonfinite: what becomes of a row whose norm is not finite.
      dry_run: whether to leave every gradient alone.
      most_skips: so many updates may be cancelled in a row, or None.
      process_group: the ranks that hold different parameters, or None.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        rows: Rows,
        *,
        nonfinite: str,
        dry_run: bool,
        most_skips: int | None,
        process_group: Any,
    ) -> None:
        """Start with no history, where the parameters are."""
        self.dry_run = dry_run
        self.policy_states = PolicyStates(rows, nonfinite)
        self.parameters = Parameters(groups, rows, process_group)
        self.policy_states.place(where(rows.parameters))
        self.checks = RunChecks(most_skips, self.policy_states.may_skip)

    @property
    def process_group(self) -> Any:
        """The ranks that hold different parameters of one model, or None."""
        return self.parameters.process_group

    @property
    def one_factor(self) -> bool:
        """Whether one number scales every gradient."""
        return self.parameters.rows.scope == "global"

    def extend(self, groups: Sequence[Group], rows: Rows) -> None:
        """Go on with more parameters; the rows that are there keep their history."""
        parameters = Parameters(groups, rows, self.process_group)
        self.policy_states = self.policy_states.extended(rows)
        self.parameters = parameters

    def reset(self) -> None:
        """Forget every norm and count."""
        self.policy_states.reset()
        self.checks.reset()

    def step(self, scale: LossScale = NO_SCALE) -> Decision:
        """Clip, and take every gradient away where the update is to be cancelled."""
        decision = self.clip(scale)
        if cancels := self.cancels(decision):
            self.parameters.cancel()
        self.check(cancels)
        return decision

    @torch.no_grad()
    def clip(self, scale: LossScale = NO_SCALE, *, in_place: bool = True) -> Decision:
        """Measure, decide, learn and scale; return the decision as tensors.

        Args:
          scale: what a loss scale has left in the gradients.
          in_place: whether to scale them here; if not, the optimizer's kernel does.
        """
        own = not self.dry_run
        parameters = self.parameters
        gradients = parameters.own_gradients() if own else parameters.gradients()
        decision = self._learn(gradients, scale)
        if in_place and not self.dry_run:
            self.rescale(gradients, self._kept(decision))
        return Decision(*map(torch.as_tensor, decision))

    def cancels(self, decision: Decision) -> bool:
        """Tell on the host, which may have to wait, whether to cancel the update."""
        may = self.policy_states.may_skip and not self.dry_run
        return may and is_skipped(decision)

    def check(self, cancelled: bool = False) -> None:
        """Check the run, after a step that may have been cancelled on the host."""
        self.checks.check_run(self.policy_states, self.dry_run, cancelled)

    def decide(
        self,
        gradients: Sequence[Tensor | None],
        norms: Any,
        observed: Any,
        weights: Any,
    ) -> Decision:
        """Decide on one step and learn from it.

        Args:
          gradients: one per entry.
          norms: shape (rows,), where decisions are taken.
          observed: booleans of shape (rows,).
          weights: the norms of the parameters, shape (rows,), or None.
        """
        return self.policy_states.decide(norms, observed, weights)

    def rescale(self, gradients: Sequence[Tensor | None], decision: Decision) -> None:
        """Scale the gradients in place, as decided."""
        self.parameters.rescale(gradients, decision)

    def _learn(self, gradients: list[Tensor | None], scale: LossScale) -> Decision:
        """Decide and learn; touch no gradient."""
        parameters, states = self.parameters, self.policy_states
        if present := parameters.present(gradients):  # else nothing moves
            states.place(where(present))
        (norms, observed), *weights = parameters.measure(
            states.device, gradients, *parameters.weights(), overflow=scale.overflow
        )
        if scale.factor is not None:
            norms = norms / states.here(scale.factor)
        if scale.overflow is not None:
            observed = observed & (states.here(scale.overflow) == 0)
        self.checks.check_gradients(parameters, observed)
        if states.nonfinite == "raise":
            refuse_nonfinite(states, norms, observed)
        return self.decide(
            gradients, norms, observed, weights[0][0] if weights else None
        )

    def _kept(self, decision: Decision) -> Decision:
        """Return the decision without the zeros of a cancelled update.

        It is cancelled as a whole, and whoever else clips has to see the gradients.
        """
        if not self.policy_states.may_skip:
            return decision
        xp = self.policy_states.xp
        scale = xp.where(decision.skipped, 1.0, decision.scale)
        return decision._replace(scale=scale)
