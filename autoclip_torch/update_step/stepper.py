"""One step of an `UpdateClipper`: measure the update, decide, and scale it."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from autoclip_core import Decision
from autoclip_core.checks import format_error
from autoclip_core.clipper.parts import get_part_scales
from autoclip_torch.gradients import cpu
from autoclip_torch.gradients.layout import Gradients, RowNorms
from autoclip_torch.rows.groups import Group
from autoclip_torch.rows.rows import Rows
from autoclip_torch.step.amp import LossScale
from autoclip_torch.step.stepper import Stepper

from .changes import Change, measure_on_cpu, scale_on_cpu_
from .copies import Copies
from .run_checks import UpdateChecks


class UpdateStepper(Stepper):
    """The steps of an `UpdateClipper`: `begin` before the optimizer's, `finish` after.

    Args:
      groups, rows, nonfinite, dry_run: as in `Stepper`.

    Raises:
      ValueError: a policy cancels whole updates.
    """

    quantity = "update"

    def __init__(
        self, groups: Sequence[Group], rows: Rows, *, nonfinite: str, dry_run: bool
    ) -> None:
        """Start without history, on the device of the parameters."""
        super().__init__(
            groups,
            rows,
            nonfinite=nonfinite,
            dry_run=dry_run,
            most_skips=None,
            process_group=None,
        )
        if self.policy_states.may_skip:
            policies = [block.policy for block in rows.by_policy]
            rule = 'without Drop(action="skip"), which cancels whole updates'
            way_out = (
                "the optimizer's moments and step count have advanced already; "
                'use action="zero" here, or skip in a Clipper of the gradients'
            )
            raise ValueError(format_error("policy", rule, policies[0], way_out))
        self.checks = UpdateChecks()
        self._copies = Copies()

    def begin(self, has_closure: bool) -> None:
        """Copy the weights before a step of the optimizer."""
        self._copies.take(self.rows.by_parameter, has_closure)

    def finish(self) -> None:
        """Clip the update that the optimizer has made.

        Raises:
          FloatingPointError: an update is not finite and `nonfinite="raise"`; all
            weights are those before the step.
        """
        try:
            self.clip()
        except FloatingPointError:
            self._copies.restore_()
            raise
        finally:
            self._copies.clear()
        self.check()

    def read_gradients(self) -> list[Tensor | None]:
        """Return the weights after the step; None if a parameter has no gradient.

        If another clipper cancelled the update, there is no gradient.
        """
        parameters = self.rows.parameters
        return [
            p.detach()
            if p.grad is not None and self._copies.get(p) is not None
            else None
            for p in parameters
        ]

    def measure(
        self,
        gradients: Sequence[Tensor | None],
        loss_scale: LossScale,
        *others: Gradients,
    ) -> list[Any]:
        """Return the norm of each row's update, whether it has one, and of `w_old`.

        Args:
          gradients: the weights after the step, one per parameter.
          loss_scale: not used: no loss scale is in an update.
          *others: none.
        """
        states, weights = self.policy_states, self._get_weights()
        first, *further = self._measure_updates(gradients, *weights)
        if self.is_split:
            self._part_norms = first.norms
        norms, observed, states.sizes = self._join(first, gradients)
        return [norms, observed, *[self._join(x, *weights).norms for x in further]]

    def scale(self, gradients: Sequence[Tensor | None], decision: Decision) -> None:
        """Write the scaled update of each row, or the weights before the step."""
        scales = decision.scale
        if self.is_split:
            scales = get_part_scales(decision, self.policy_states.xp)
        changes = self._list_changes(gradients)
        scale_on_cpu_(changes, scales)

    def _measure_updates(
        self, new: Sequence[Tensor | None], *weights: list[Tensor]
    ) -> list[RowNorms]:
        """Return the norms of the updates, and those of the weights if given."""
        changes = self._list_changes(new)
        norms = measure_on_cpu(self.parts, changes)
        first = RowNorms(norms, cpu.find_observed(self.parts, new))
        return [first, *[cpu.measure(self.parts, each) for each in weights]]

    def _list_changes(self, new: Sequence[Tensor | None]) -> list[Change]:
        """Return the parameters that have a gradient, before and after the step."""
        changes = []
        for entry, weights in zip(self.parts.by_parameter, new, strict=True):
            old = self._copies.get(entry.parameter)
            if weights is not None and old is not None and entry.start < entry.stop:
                changes.append(Change(entry, old, weights))
        return changes

    def _get_weights(self) -> list[list[Tensor]]:
        """Return the weights before the step as the only item, if a policy needs them.

        Between two steps, these are the present weights.
        """
        if not super()._get_weights():
            return []
        parameters = self.rows.parameters
        copies = map(self._copies.get, parameters)
        pairs = zip(copies, parameters, strict=True)
        return [[p.detach() if old is None else old for old, p in pairs]]
