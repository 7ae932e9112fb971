"""Warn once if an update is not finite, or if the optimizer may undo the clipping."""

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from autoclip_core.clipper.metrics import Tally
from autoclip_torch.step.run_checks import RunChecks
from autoclip_torch.step.warn import warn

from .changes import Change
from .optimizers import Suspect, find_weights_in_state


class FirstNonfinite:
    """Reports once that an update was not finite and was therefore undone."""

    def __init__(self) -> None:
        self._earlier: int | None = 0
        self._has_warned = False

    def check(self, tally: Tally) -> str:
        """Return the text of a warning, or ""; the counts are on the CPU."""
        count = int(tally.nonfinite)
        if self._earlier is None:
            self._earlier = count
        if count <= self._earlier or self._has_warned:
            return ""
        self._has_warned = True
        return (
            f"an update was not finite in {count - self._earlier} of the first "
            f"{int(tally.steps)} steps, and its rows kept their earlier weights; the "
            "optimizer's moments may hold the same NaN or infinity, so clip or skip "
            "the gradients first, with a Clipper that is attached to the same optimizer"
        )

    def ignore_earlier_steps(self) -> None:
        """Ignore the steps so far: they were observed, or belong to another run."""
        self._earlier = None


class UpdateChecks(RunChecks):
    """The checks of each step of an `UpdateClipper`."""

    _nonfinite_check = FirstNonfinite

    def __init__(self) -> None:
        super().__init__(most_skips=None, may_skip=False)
        self._is_first_step = True
        self._suspects: dict[str, Suspect] = {}

    def check_gradients(self, *arguments: Any) -> None:
        """Accept a step without gradients: the optimizer then changes nothing."""

    def check_zeros(self, *arguments: Any) -> None:
        """Accept updates of 0: the learning rate may be 0."""

    def check_state(self, optimizer: Optimizer, changes: Sequence[Change]) -> None:
        """Look for weights in the optimizer's state, after its first step.

        On a device, the result is read by the next call of `metrics`.
        """
        if self._is_first_step and changes:
            self._suspects = find_weights_in_state(optimizer, changes)
            self._is_first_step = False

    def check_counts(self, tally: Tally, nonfinite: str, dry_run: bool) -> None:
        """Check counts that are on the CPU."""
        super().check_counts(tally, nonfinite, dry_run)
        suspects = {k: each for k, each in self._suspects.items() if each.is_copy}
        self._suspects = suspects
        if names := sorted(name for name, each in suspects.items() if each.has_moved()):
            self._suspects = {}
            warn(
                f"{' and '.join(map(repr, names))} in the optimizer's state equals the "
                "weights; if the optimizer computes its next weights from it, the "
                "update clipper has little effect; clip the gradients instead"
            )
