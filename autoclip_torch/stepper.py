"""One step: measure the gradients, decide, and scale them or have them scaled."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autoclip_core import Decision

from .amp import LossScale
from .groups import Group
from .learner import Learner
from .parameters import Parameters, where
from .rows import Rows
from .run_checks import RunChecks, is_skipped


class Kernel(NamedTuple):
    """An optimizer that cancels an update itself, when it is told to."""

    scales: bool
    """Whether it scales the gradients itself, too."""


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
        self.learner = Learner(rows, nonfinite)
        self.parameters = Parameters(groups, rows, process_group)
        self.learner.place(where(rows.parameters))
        self.checks = RunChecks(most_skips, self.learner.may_skip)

    @property
    def one_factor(self) -> bool:
        """Whether one number scales every gradient."""
        return self.parameters.rows.scope == "global"

    def extend(self, groups: Sequence[Group], rows: Rows) -> None:
        """Go on with more parameters; the rows that are there keep their history."""
        parameters = Parameters(groups, rows, self.parameters.process_group)
        self.learner = self.learner.extended(rows)
        self.parameters = parameters

    def reset(self) -> None:
        """Forget every norm and count."""
        self.learner.reset()
        self.checks.reset()

    @torch.no_grad()
    def step(self, scale: LossScale, kernel: Kernel | None = None) -> Decision:
        """Measure, decide, learn and scale; return the decision as tensors.

        Args:
          scale: what a loss scale has left in the gradients.
          kernel: the optimizer that is told the decision, if there is one.
        """
        if not self.dry_run:
            self.parameters.make_writable()
        gradients = self.parameters.gradients()
        decision = self._learn(gradients, scale)
        if not self.dry_run:
            self._write(gradients, decision, kernel)
        self.checks.check_run(self.learner, self.dry_run)
        return Decision(*map(torch.as_tensor, decision))

    def decide(
        self,
        gradients: Sequence[Tensor | None],
        norms: Any,
        observed: Any,
        weights: Any,
    ) -> Decision:
        """Decide on one step and learn from it.

        Args:
          gradients: one per slot.
          norms: shape (rows,), where decisions are taken.
          observed: booleans of shape (rows,).
          weights: the norms of the parameters, shape (rows,), or None.
        """
        return self.learner.decide(norms, observed, weights)

    def rescale(self, gradients: Sequence[Tensor | None], decision: Decision) -> None:
        """Scale the gradients in place, as decided."""
        self.parameters.rescale(gradients, decision)

    def _learn(self, gradients: list[Tensor | None], scale: LossScale) -> Decision:
        """Decide and learn; touch no gradient."""
        parameters, learner = self.parameters, self.learner
        if present := parameters.present(gradients):  # else nothing moves
            learner.place(where(present))
        (norms, observed), *weights = parameters.measure(
            learner.device, gradients, *parameters.weights(), overflow=scale.overflow
        )
        if scale.factor is not None:
            norms = norms / learner.here(scale.factor)
        if scale.overflow is not None:
            observed = observed & (learner.here(scale.overflow) == 0)
        self.checks.check_gradients(parameters, observed)
        self.checks.check_norms(learner, norms, observed)
        return self.decide(
            gradients, norms, observed, weights[0][0] if weights else None
        )

    def _write(
        self,
        gradients: list[Tensor | None],
        decision: Decision,
        kernel: Kernel | None,
    ) -> None:
        """Scale or cancel what no kernel is told to scale or to cancel."""
        if (
            kernel is None
            and self.learner.may_skip
            and is_skipped(self.learner, decision)
        ):
            self.parameters.cancel()
            self.checks.check_skips(self.learner.tally)
        elif kernel is None or not kernel.scales:
            self.rescale(gradients, decision)
