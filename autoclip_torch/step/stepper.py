"""One step of a clipper: measure the gradients, decide, and scale the gradients."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from autoclip_core import Decision, Policy
from autoclip_core.clipper.parts import (
    get_part_scales,
    join_norms,
    join_observed,
    measure_scale,
)
from autoclip_core.loss import LossDecision
from autoclip_torch.gradients import cpu, device, sharded
from autoclip_torch.gradients.layout import Gradients, RowNorms, copy_shared
from autoclip_torch.gradients.ranks import find_ranks
from autoclip_torch.rows.groups import Group
from autoclip_torch.rows.rows import Rows, split_rows
from autoclip_torch.state.changed_rows import continue_rows
from autoclip_torch.state.loss_monitor import LossMonitor
from autoclip_torch.state.policy_states import PolicyStates

from .amp import NO_SCALE, LossScale
from .callbacks import StepCallbacks
from .run_checks import RunChecks, check_finite, is_skipped
from .step_loss import StepLoss


class Stepper:
    """The steps of one clipper: by hand, attached, or with a fused optimizer.

    Args:
      groups: all parameters of the update, the excluded ones too.
      rows: the clipped parameters, cut into rows.
      most_skips: `max_consecutive_skips` of `Clipper`.
      nonfinite, dry_run, process_group, loss_policy: as in `Clipper`.
    """

    quantity = "gradient"
    """What is measured, for error messages."""

    extra_sequences = 0
    """How many sequences `measure` measures besides gradients and weights."""

    def __init__(
        self,
        groups: Sequence[Group],
        rows: Rows,
        *,
        nonfinite: str,
        dry_run: bool,
        most_skips: int | None,
        process_group: Any,
        loss_policy: Policy | None = None,
    ) -> None:
        losses = None if loss_policy is None else LossMonitor(loss_policy)
        self.loss = StepLoss(is_needed=losses is not None)
        self.callbacks = StepCallbacks()
        self.dry_run = dry_run
        self.groups = groups
        self.rows = rows
        self.parts = self.split(rows)
        self._part_norms: Any = None
        self.policy_states = PolicyStates(rows, nonfinite, losses)
        self.ranks = find_ranks(rows, process_group)
        self.policy_states.move_to(device.choose_device(rows.parameters))
        self.checks = RunChecks(most_skips, self.policy_states.may_skip)

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of the clipper that concern its steps, for its repr."""
        losses, most_skips = self.policy_states.losses, self.checks.most_skips
        return {
            "dry_run": self.dry_run,
            "loss_policy": None if losses is None else losses.policy,
            "max_consecutive_skips": most_skips,
        }

    @property
    def process_group(self) -> Any:
        """The ranks that hold different parameters of one model, or None."""
        return None if self.ranks is None else self.ranks.process_group

    @property
    def has_one_factor(self) -> bool:
        """Whether one number scales every gradient."""
        return self.rows.scope == "global" and not self.is_split

    @property
    def is_split(self) -> bool:
        """Whether rows have two parts: what clipping scales, and the rest."""
        return self.parts is not self.rows

    def split(self, rows: Rows) -> Rows:
        """Return the rows, in two parts if some parameters are only measured."""
        return split_rows(rows)

    def change_rows(self, groups: Sequence[Group], rows: Rows, sources: Any) -> None:
        """Continue with other parameters; see `continue_rows`."""
        ranks = find_ranks(rows, self.process_group, self.ranks)
        if ranks and self.ranks:
            ranks.continue_from(self.ranks, self.parts, len(self.split(rows).names))
        self.policy_states = continue_rows(self.policy_states, rows, sources)
        self.groups, self.rows, self.ranks = groups, rows, ranks
        self.parts = self.split(rows)

    def reset(self) -> None:
        """Delete the recorded norms and the counts."""
        self.policy_states.reset()
        self.checks.reset()

    def step(self, loss_scale: LossScale = NO_SCALE) -> Decision:
        """Clip the gradients, and remove all of them if the update is cancelled."""
        decision = self.clip(loss_scale)
        if is_cancelled := self.cancels(decision):
            self.remove_gradients()
        self.check(is_cancelled)
        return decision

    @torch.no_grad()
    def clip(
        self, loss_scale: LossScale = NO_SCALE, *, in_place: bool = True
    ) -> Decision:
        """Measure, check, decide and scale; return the decision as tensors.

        Args:
          loss_scale: the part of a loss scale that is still in the gradients.
          in_place: whether to scale the gradients here. If not, the kernel of a fused
            optimizer scales them.
        """
        loss = self.loss.take()
        gradients = self.read_gradients()
        self.move_states(gradients)
        norms, observed, *others = self.measure(gradients, loss_scale)
        on_any_rank = None if self.ranks is None else observed
        self.checks.check_gradients(self.groups, self.rows, gradients, on_any_rank)
        if self.policy_states.nonfinite == "raise":
            check_finite(self.policy_states, norms, observed, self.quantity)
        loss_decision = self.loss.decide(loss, self.policy_states, self.ranks)
        decision = self.decide(norms, observed, *others, loss=loss_decision)
        if in_place and not self.dry_run:
            self.scale(gradients, decision)
        if self.is_split:
            states, norm = self.policy_states, self._measured_norm
            decision = measure_scale(decision, self._part_norms, norm, xp=states.xp)
            states.decision = decision
        is_numpy = self.policy_states.device is None
        return Decision(*map(torch.from_numpy, decision)) if is_numpy else decision

    def read_gradients(self) -> list[Tensor | None]:
        """Return the gradients, one per parameter; a shared gradient is copied."""
        gradients = [entry.parameter.grad for entry in self.rows.by_parameter]
        # While compiling, an id would tie the compiled code to these gradients.
        if self.dry_run or torch.compiler.is_compiling():
            return gradients
        return copy_shared(self.rows.by_parameter, gradients)

    def measure(
        self,
        gradients: Sequence[Tensor | None],
        loss_scale: LossScale,
        *others: Gradients,
    ) -> list[Any]:
        """Return the norm of each row, whether the row has one, and further norms.

        Args:
          gradients: one per parameter.
          loss_scale: as in `clip`.
          *others: further sequences of one tensor per parameter. By default these are
            the parameters themselves, if a policy needs their norms.
        """
        states, weights = self.policy_states, [] if others else self._get_weights()
        first, *further = self._measure_parts(
            gradients, *others, *weights, overflow=loss_scale.overflow
        )
        if self.is_split:
            self._part_norms = first.norms
        norms, observed, states.sizes = self._join(first, gradients)
        if loss_scale.factor is not None:
            norms = norms / states.as_array(loss_scale.factor)
        observed = loss_scale.leave_out(observed, states)
        present = [gradients, *weights][-1]
        return [norms, observed, *[self._join(x, present).norms for x in further]]

    def decide(
        self, norms: Any, observed: Any, *others: Any, loss: LossDecision | None = None
    ) -> Decision:
        """Decide, and record the norms.

        Args:
          norms, observed, *others: what `measure` returned.
          loss: the decision on the loss of the step.
        """
        return self.policy_states.decide(norms, observed, *others, loss=loss)

    def scale(self, gradients: Sequence[Tensor | None], decision: Decision) -> None:
        """Multiply the gradients by the scale of their row, in place."""
        states, scales = self.policy_states, decision.scale
        # A cancelled update is not scaled to 0: its gradients are removed later, and
        # other clippers of the same optimizer have to measure them before.
        if states.may_skip:
            scales = states.xp.where(decision.skipped, 1.0, scales)
        if self.is_split:
            scales = get_part_scales(decision._replace(scale=scales), states.xp)
        if self.ranks is None and states.device is None:
            cpu.scale_(self.parts, gradients, scales)
        else:
            device.scale_(self.parts, gradients, torch.as_tensor(scales))

    def cancels(self, decision: Decision) -> bool:
        """Return whether the update is cancelled. On a device, this waits for it."""
        may_cancel = self.policy_states.may_skip and not self.dry_run
        return may_cancel and is_skipped(decision)

    def check(self, is_cancelled: bool = False) -> None:
        """Call the user's functions, and check the counts of the run, after a step."""
        if self.callbacks.are_set:
            self.callbacks.report(self.policy_states)
        self.checks.check_run(self.policy_states, self.dry_run, is_cancelled)

    def remove_gradients(self) -> None:
        """Set every gradient to None, so that the optimizer skips the parameters.

        It then leaves moments, step count and weight decay alone. After a gradient of 0
        it would not. The excluded parameters belong to the same update.
        """
        for group in self.groups:
            for named in group.parameters:
                named.parameter.grad = None

    def measure_parameters(self) -> Any:
        """Return the norm of each row's parameters, or None if no policy needs it."""
        if not (weights := self._get_weights()):
            return None
        # The ranks reduce a vector as long as that of a step.
        nothing = [] if self.ranks is None else [[None] * len(self.rows.by_parameter)]
        measured = self._measure_parts(*nothing, *weights, reason="threshold")[-1]
        return self._join(measured, *weights).norms

    def move_states(self, gradients: Sequence[Tensor | None]) -> None:
        """Move the policy states to the device of the gradients, if there are any."""
        # A rank whose shards have no gradient must use the device of the other ranks.
        tensors = gradients if self.ranks is None else self.rows.parameters
        if present := [tensor for tensor in tensors if tensor is not None]:
            self.policy_states.move_to(device.choose_device(present))

    def _measure_parts(self, *sequences: Gradients, **how: Any) -> list[RowNorms]:
        """Return for each sequence the norm of each part, and which parts have one.

        Args:
          *sequences: gradients, or parameters: one tensor per parameter in each.
          **how: further arguments of `sharded.measure`.
        """
        parts, device_used = self.parts, self.policy_states.device
        if self.ranks is not None:
            return sharded.measure(parts, sequences, device_used, self.ranks, **how)
        if device_used is not None:
            return [device.measure(parts, each, device_used) for each in sequences]
        return [cpu.measure(parts, each) for each in sequences]

    @property
    def _measured_norm(self) -> str:
        """The norm of each part; an rms norm is measured as an l2 norm."""
        return "l2" if self.rows.norm == "rms" else self.rows.norm

    def _join(self, parts: RowNorms, tensors: Sequence[Any]) -> RowNorms:
        """Return the norm of each row, and which rows have one, from their parts.

        Args:
          parts: what was measured.
          tensors: one per parameter; None for a parameter that does not count.
        """
        norms, observed, sizes = parts
        if self.is_split:
            xp, count = self.policy_states.xp, len(self.rows.names)
            norms = join_norms(norms, self._measured_norm, xp=xp)
            observed = join_observed(observed)
            sizes = None if sizes is None else sizes[:count] + sizes[count:]
        if self.rows.norm == "rms":
            sizes = self.rows.count_elements(tensors) if sizes is None else sizes
            norms = self.rows.to_rms(norms, sizes)
        return RowNorms(norms, observed, sizes)

    def _get_weights(self) -> list[list[Tensor]]:
        """Return the parameters as the only item of a list.

        The list is empty if no policy needs their norms.
        """
        if not any(block.policy.needs_param_norms for block in self.rows.by_policy):
            return []
        return [[entry.parameter.detach() for entry in self.rows.by_parameter]]
