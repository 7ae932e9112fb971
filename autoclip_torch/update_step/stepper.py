"""One step of an `UpdateClipper`: measure the update, decide, and scale it."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from autoclip_core import Decision
from autoclip_core.checks import format_error
from autoclip_core.clipper.parts import get_part_scales
from autoclip_torch.gradients import device, sharded
from autoclip_torch.gradients.cpu import find_observed
from autoclip_torch.gradients.layout import Gradients, RowNorms
from autoclip_torch.rows.groups import Group
from autoclip_torch.rows.rows import Rows
from autoclip_torch.step.amp import LossScale
from autoclip_torch.step.stepper import Stepper

from . import cpu
from .changes import Change, batch_by_size, subtract, write_
from .copies import Copies, finish_, restore_
from .run_checks import UpdateChecks


class UpdateStepper(Stepper):
    """The steps of an `UpdateClipper`: `begin` before the optimizer's, `finish` after.

    Args:
      groups, rows, nonfinite, dry_run: as in `Stepper`.

    Raises:
      ValueError: a policy cancels whole updates.
    """

    quantity = "update"
    checks: UpdateChecks

    def __init__(
        self, groups: Sequence[Group], rows: Rows, *, nonfinite: str, dry_run: bool
    ) -> None:
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
        self._changes: dict[int, Change] = {}

    def change_rows(self, groups: Sequence[Group], rows: Rows, sources: Any) -> None:
        """Continue with other parameters, without the copies of those that left."""
        super().change_rows(groups, rows, sources)
        self._copies.keep_only(rows.parameters)

    def begin(self, optimizer: Optimizer, has_closure: bool) -> None:
        """Copy the weights before a step of the optimizer."""
        self._copies.take(self.rows.parameters, optimizer, has_closure)

    @torch.no_grad()
    def finish(self, optimizer: Optimizer) -> None:
        """Clip the update that the optimizer has made.

        Raises:
          FloatingPointError: an update is not finite and `nonfinite="raise"`; all
            weights are those before the step.
        """
        self._changes = self._copies.compare(self.parts.by_parameter)
        changes = [*self._changes.values()]
        try:
            self.checks.check_state(optimizer, changes)
            self.clip(LossScale(overflow=getattr(optimizer, "found_inf", None)))
        except FloatingPointError:
            restore_(changes)
            raise
        finally:
            finish_(changes)
            self._changes = {}
        self.check()

    def read_gradients(self) -> list[Tensor | None]:
        """Return the weights after the step; None if a parameter was not copied."""
        changes = map(self._changes.get, map(id, self.rows.parameters))
        return [None if change is None else change.new for change in changes]

    def measure(
        self,
        gradients: Sequence[Tensor | None],
        loss_scale: LossScale,
        *others: Gradients,
    ) -> list[Any]:
        """Return the norm of each row's update, whether it has one, and of `w_old`.

        Args:
          gradients: the weights after the step, one per parameter.
          loss_scale: without a factor; a fused optimizer changes nothing after an
            overflow.
          *others: none.
        """
        states, weights = self.policy_states, self._get_weights()
        first, *further = self._measure_changes(weights)
        if self.is_split:
            self._part_norms = first.norms
        norms, observed, states.sizes = self._join(first, gradients)
        observed = self._leave_out_cancelled(norms, observed)
        observed = loss_scale.leave_out(observed, states)
        return [norms, observed, *[self._join(x, *weights).norms for x in further]]

    def _measure_changes(self, weights: Sequence[list[Tensor]]) -> list[RowNorms]:
        """Return the norms of the changes, and of the weights if these are given."""
        parts, changes = self.parts, self._changes
        states_device = self.policy_states.device
        if self.ranks is not None:
            of_id = dict(zip(changes, subtract([*changes.values()]), strict=True))
            differences: list[Any] = [of_id.get(id(p)) for p in parts.parameters]
            sequences = [differences, *weights]
            return sharded.measure(parts, sequences, states_device, self.ranks)
        if states_device is None:
            return cpu.measure(parts, changes, weights)
        changed_rows = replace(parts, by_parameter=[c.entry for c in changes.values()])
        batches = batch_by_size(changes.values(), device.BATCH)
        lazy = chain.from_iterable(map(subtract, batches))
        first = device.measure(changed_rows, lazy, states_device)
        return [first, *[device.measure(parts, w, states_device) for w in weights]]

    def _leave_out_cancelled(self, norms: Any, observed: Any) -> Any:
        """Return which rows have an update, without those that a clipper cancelled.

        Their gradients were removed and their weights did not change. An optimizer or a
        hook may also remove gradients after the weights have changed.
        """
        changes = self._changes.values()
        if all(change.entry.parameter.grad is not None for change in changes):
            return observed
        gradients = [parameter.grad for parameter in self.rows.parameters]
        has_gradient = torch.from_numpy(find_observed(self.rows, gradients))
        return observed & ((norms != 0) | self.policy_states.as_array(has_gradient))

    def scale(self, gradients: Sequence[Tensor | None], decision: Decision) -> None:
        """Write the scaled update of each row, or the weights before the step."""
        states, scales = self.policy_states, decision.scale
        if self.is_split:
            scales = get_part_scales(decision, states.xp)
        changes = self._changes.values()
        if states.device is None:
            cpu.scale_(changes, scales)
            return
        for change in changes:
            write_(change, scales[change.entry.start : change.entry.stop])

    def _get_weights(self) -> list[list[Tensor]]:
        """Return the weights before the step as the only item, if a policy needs them.

        Between two steps, these are the present weights.
        """
        sequences = super()._get_weights()
        for weights in sequences:
            for index, parameter in enumerate(self.rows.parameters):
                if change := self._changes.get(id(parameter)):
                    weights[index] = change.weights
        return sequences
