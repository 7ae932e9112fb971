"""What a run must not do unnoticed: see no gradient, skip for ever, hide overflows."""

from typing import Any

import torch

from autoclip_core.checks import check_count, format_error
from autoclip_core.clipper.metrics import Tally
from autoclip_torch.gradients.parameters import Parameters
from autoclip_torch.state.policy_states import PolicyStates

from .overflows import Overflows
from .partial import warn_of_partial_norms
from .warn import warn


class RunChecks:
    """What is checked in every step, and what has to be remembered for that.

    Args:
      most_skips: so many updates may be cancelled in a row, or None.
      may_skip: whether anything cancels an update.
    """

    def __init__(self, most_skips: int | None, may_skip: bool) -> None:
        """Refuse a limit on skipped updates where nothing skips one."""
        if most_skips is not None:
            check_count("max_consecutive_skips", most_skips, 1)
            if not may_skip:
                rule = 'given with nonfinite="skip" or with Drop(action="skip")'
                way_out = "nothing else cancels an update; leave it out"
                raise ValueError(
                    format_error("max_consecutive_skips", rule, most_skips, way_out)
                )
        self._most_skips = most_skips
        self.overflows = Overflows()
        self._saw_gradient = False

    def reset(self) -> None:
        """Forget the steps so far."""
        self.overflows = Overflows()

    def check_gradients(self, parameters: Parameters, observed: Any) -> None:
        """Warn if there never was a gradient: the parameters may be others."""
        if torch.compiler.is_compiling() or self._saw_gradient:
            return  # what a compiled step has seen would compile the next one anew
        gradients = parameters.gradients()
        self._saw_gradient = any(gradient is not None for gradient in gradients)
        warn_of_partial_norms(parameters.rows)
        # Of stages and shards, this rank's may have none where those of others do.
        elsewhere = parameters.ranks is not None and bool(observed.any())
        if replaced := parameters.replaced():
            warn(
                f"{len(replaced)} of the clipper's parameters, such as {replaced[0]}, "
                "left the model, and what is trained instead is not clipped: "
                "fully_shard, among others, puts new ones in their place; make the "
                "clipper after it, as the optimizer",
            )
        elif not self._saw_gradient and not elsewhere:
            warn(
                "the clipper has not seen a gradient yet: none of its parameters has "
                "one; call backward() first, and make the clipper of the parameters "
                "that are trained: fully_shard, among others, puts new ones in their "
                "place",
            )

    def check_run(self, states: PolicyStates, dry_run: bool, cancelled: bool) -> None:
        """Check what the run has counted, where the host need not wait for it now."""
        if states.device is None:
            self.check_counts(states.tally, states.nonfinite, dry_run)
        elif states.device.type == "cpu" or cancelled:  # it has just waited
            self.check_skips(states.tally)

    def check_counts(self, tally: Tally, nonfinite: str, dry_run: bool) -> None:
        """Check counts that are on the host."""
        self.check_skips(tally)
        # Whoever only observes hides no overflow from a GradScaler.
        if nonfinite == "zero" and not dry_run:
            self.overflows.look(tally)

    def check_skips(self, tally: Tally) -> None:
        """Stop a run that only skips."""
        most = self._most_skips
        if most is not None and tally.skipped_in_a_row > most:
            raise RuntimeError(
                f"{int(tally.skipped_in_a_row)} updates in a row were skipped, more "
                f"than max_consecutive_skips={most}: the run is not training; "
                "look at the loss and the learning rate"
            )
