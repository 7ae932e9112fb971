"""Checks around a step: missing gradients, endless skips, overflows, norms not finite.

A run that does nothing useful warns or raises, instead of continuing in silence.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from autoclip_core import Decision
from autoclip_core.checks import check_count, format_error
from autoclip_core.clipper.metrics import Tally
from autoclip_core.clipper.metrics_checks import (
    ClippedBeforeCheck,
    NonfiniteCheck,
    NoStepCheck,
)
from autoclip_core.scale import as_norms
from autoclip_torch.gradients.dtensor import read_values
from autoclip_torch.gradients.layout import as_real
from autoclip_torch.rows.groups import Group
from autoclip_torch.rows.rows import Rows
from autoclip_torch.state.differences import join_names
from autoclip_torch.state.policy_states import PolicyStates

from .uncleared import UnclearedCheck
from .warn import warn
from .zero_norms import ZeroNormCheck

_MANY_SKIPS = 50
"""So many skips in a row warn. A `GradScaler` that calibrates skips about 16."""


class RunChecks:
    """The checks of each step, and the counts that they need.

    Args:
      most_skips: as in `Stepper`.
      may_skip: whether anything can cancel an update.
    """

    _nonfinite_check: Any = NonfiniteCheck
    """The class that checks the steps that are not finite."""

    def __init__(self, most_skips: int | None, may_skip: bool) -> None:
        """Refuse a limit on skipped updates if nothing can skip one."""
        if most_skips is not None:
            check_count("max_consecutive_skips", most_skips, 1)
            if not may_skip:
                rule = 'given with nonfinite="skip", Drop(action="skip") or loss_policy'
                way_out = "nothing else cancels an update; leave it out"
                error = format_error("max_consecutive_skips", rule, most_skips, way_out)
                raise ValueError(error)
        self.most_skips = most_skips
        self._may_skip = may_skip
        self.nonfinite = self._nonfinite_check()
        self._clipped_before, self._no_step = ClippedBeforeCheck(), NoStepCheck()
        self._zero_norms, self._uncleared = ZeroNormCheck(), UnclearedCheck()
        self._has_had_gradient = self._has_warned = self._has_warned_of_skips = False

    def reset(self) -> None:
        """Restart the counts."""
        self.nonfinite = self._nonfinite_check()

    def check_gradients(
        self,
        groups: Sequence[Group],
        rows: Rows,
        gradients: Sequence[Tensor | None],
        observed: Any,
    ) -> None:
        """Warn once before the first gradient: the clipper may hold other parameters.

        `observed` are the rows that have a gradient on any rank, or None if there is
        only this rank.
        """
        if torch.compiler.is_compiling():
            return  # a flag that a compiled step set would cause another compilation
        self._uncleared.begin_clip()
        if self._has_had_gradient:
            return
        self._has_had_gradient = any(gradient is not None for gradient in gradients)
        _warn_of_partial_norms(rows)
        # Other stages and shards may have gradients although this rank has none.
        is_elsewhere = observed is not None and bool(observed.any())
        replaced = _replaced_parameters(groups)
        is_missing = not self._has_had_gradient and not is_elsewhere
        if self._has_warned or not (replaced or is_missing):
            return
        self._has_warned = True
        if replaced:
            warn(
                f"{len(replaced)} of the clipper's parameters, such as {replaced[0]}, "
                "left the model, and the parameters that are trained instead are not "
                "clipped: fully_shard, among others, replaces parameters; make the "
                "clipper after it, like the optimizer"
            )
        else:
            warn(
                "the clipper has not received a gradient yet: none of its parameters "
                "has one; call backward() first, and no zero_grad() between it and the "
                "clip; for an optimizer that steps in the backward pass, make a "
                "clipper for each parameter and attach it; if a copy of the model is "
                "trained, or fully_shard has replaced parameters, make the clipper of "
                "those that are trained"
            )

    def check_run(
        self, states: PolicyStates, dry_run: bool, is_cancelled: bool
    ) -> None:
        """Check the counts of a run, if reading them does not wait for a device."""
        if not (dry_run or is_cancelled or torch.compiler.is_compiling()):
            self._uncleared.end_clip(states.rows.parameters)
        if states.device is None:
            if not dry_run:
                self.check_zeros(states.decision, states.rows)
            self.check_counts(states.tally, states.nonfinite, dry_run)
        elif states.device.type == "cpu" or is_cancelled:  # the wait is over
            self.check_skips(states.tally)

    def check_counts(self, tally: Tally, nonfinite: str, dry_run: bool) -> None:
        """Check counts that are on the CPU."""
        self.check_skips(tally)
        if not dry_run:
            self._warn_of_skips(tally)
        # A dry run sets no infinity to 0, so it hides no overflow from a GradScaler.
        if nonfinite == "zero" and not dry_run:
            if text := self.nonfinite.check(tally):
                warn(text)

    def check_zeros(self, decision: Decision, rows: Rows) -> None:
        """Warn once if all gradients were set to 0; the decision is on the CPU."""
        self._zero_norms.check(decision, rows)

    def check_steps(self, steps: float, rows: Rows) -> None:
        """Warn once if the metrics are read and the clipper takes no step."""
        way_out = (
            "call clipper.step() before optimizer.step(), or step the optimizer that "
            "the clipper is attached to"
        )
        if text := self._no_step.check(steps, partial(_read_weights, rows), way_out):
            warn(text)

    def check_norm(self, norm: float, *, is_shared: bool) -> None:
        """Warn once if another clip acts before this one.

        Args:
          norm: the norm of all gradients, on the CPU.
          is_shared: whether another clipper clips some of the same parameters. It may
            act first on purpose.
        """
        if (text := self._clipped_before.check(norm)) and not is_shared:
            warn(text)

    def check_skips(self, tally: Tally) -> None:
        """Stop a run that skips every update."""
        most = self.most_skips
        if most is not None and tally.skipped_in_a_row > most:
            raise RuntimeError(
                f"{int(tally.skipped_in_a_row)} updates in a row were skipped, more "
                f"than max_consecutive_skips={most}: the run is not training; "
                "look at the loss and the learning rate"
            )

    def _warn_of_skips(self, tally: Tally) -> None:
        """Warn once of a run that skips every update, without a limit."""
        has_limit = self.most_skips is not None
        if has_limit or self._has_warned_of_skips or not self._may_skip:
            return
        if (count := int(tally.skipped_in_a_row)) >= _MANY_SKIPS:
            self._has_warned_of_skips = True
            warn(
                f"{count} updates in a row were skipped: the run is not training; look "
                "at the loss and at the data of these steps; to stop such a run, set "
                "max_consecutive_skips"
            )


def check_finite(
    states: PolicyStates, norms: Any, observed: Any, quantity: str = "gradient"
) -> None:
    """Raise a FloatingPointError that names the rows whose norm is not finite.

    Args:
      states: the rows.
      norms, observed: as in `PolicyStates.decide`.
      quantity: what was measured, "gradient" or "update".
    """
    _refuse_to_compile('nonfinite="raise"')
    is_bad = (observed & ~states.xp.isfinite(as_norms(norms, states.xp))).tolist()
    names = [name for name, bad in zip(states.rows.names, is_bad, strict=True) if bad]
    if names:
        other = ' or "skip"' if quantity == "gradient" else ""
        raise FloatingPointError(
            f"the {quantity} norm of {join_names(names)} is not finite and "
            f'nonfinite="raise"; to go on without such {quantity}s, set '
            f'nonfinite="zero"{other}'
        )


def is_skipped(decision: Decision) -> bool:
    """Return on the CPU whether the update is cancelled."""
    _refuse_to_compile("what cancels updates")
    return bool(torch.as_tensor(decision.skipped).any())


def _read_weights(rows: Rows) -> Any:
    """Return some weights on the CPU, as an array."""
    trained = [p for p in rows.parameters if p.requires_grad]
    pair = (p for p in trained[:1] + trained[-1:] if p.layout is torch.strided)
    values = [read_values(p) for p in pair if p.itemsize > 1]
    reals = [as_real(each).float().cpu().reshape(-1) for each in values]
    return torch.cat([torch.empty(0), *reals]).numpy()


def _refuse_to_compile(setting: str) -> None:
    """Refuse a setting that reads a value: traced code has no values."""
    if torch.compiler.is_compiling():
        raise RuntimeError(
            f"{setting} must read the norms on the CPU, which a compiled step cannot; "
            'set nonfinite="zero" or "propagate", or call clipper.step() outside of '
            "torch.compile"
        )


def _replaced_parameters(groups: Sequence[Group]) -> list[str]:
    """Return the names of parameters that their layer does not hold any more.

    A parameter with a gradient does not count: FSDP2 may keep the whole parameter in
    place of its shard.
    """
    return [
        str(named.name)
        for group in groups
        for named in group.parameters
        if named.parameter.requires_grad
        and named.parameter.grad is None
        and named.layer is not None
        and all(p is not named.parameter for p in named.layer.parameters())
    ]


def _warn_of_partial_norms(rows: Rows) -> None:
    """Warn inside a backward pass that has not computed all gradients of a row."""
    if torch._C._current_graph_task_id() == -1:  # there is no public way to ask
        return
    entries = rows.by_parameter
    started = {entry.start for entry in entries if entry.parameter.grad is not None}
    missing = [
        entry.parameter
        for entry in entries
        if entry.start in started
        and entry.parameter.requires_grad
        and entry.parameter.grad is None
    ]
    if missing:
        warn(
            "the clipper was stepped within the backward pass, before "
            f"{len(missing)} gradients of the norms that it measures were computed, so "
            "each of its steps measures partial norms; within the backward pass, make "
            "a clipper for each parameter, or step after it"
        )
