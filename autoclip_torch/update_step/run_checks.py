"""Warn once about an update that is not finite."""

from typing import Any

from autoclip_core.clipper.metrics import Tally
from autoclip_torch.step.run_checks import RunChecks
from autoclip_torch.step.warn import warn


class UpdateChecks(RunChecks):
    """The checks of each step of an `UpdateClipper`."""

    def __init__(self) -> None:
        """Start at the beginning of a run; nothing cancels an update."""
        super().__init__(most_skips=None, may_skip=False)

    def _start_overflow_check(self) -> Any:
        """Return the check of the norms that are not finite."""
        return FirstNonfinite()


class FirstNonfinite:
    """Warns once that an update was not finite and was therefore undone."""

    def __init__(self) -> None:
        """Start at the beginning of a run."""
        self._earlier: int | None = 0
        self._has_warned = False

    def check(self, tally: Tally) -> None:
        """Check counts that are on the CPU."""
        count = int(tally.nonfinite)
        if self._earlier is None:
            self._earlier = count
        if count > self._earlier and not self._has_warned:
            self._has_warned = True
            warn(
                f"an update was not finite in {count - self._earlier} of the first "
                f"{int(tally.steps)} steps, and its rows kept their earlier weights; "
                "the optimizer's moments may hold the same NaN or infinity, so clip "
                "or skip the gradients first, with a Clipper that is attached to the "
                "same optimizer"
            )

    def ignore_earlier_steps(self) -> None:
        """Ignore the steps so far: they were observed, or belong to another run."""
        self._earlier = None
