"""Warn if gradients are not finite again and again; `LoopCheck` names the scaler."""

from autoclip_core.clipper.metrics import Tally

from .warn import warn

_NONFINITE_STEPS, _RECENT_STEPS = 10, 100


class OverflowCheck:
    """Warns once if 10 of the last 100 steps are not finite.

    A calibrating `GradScaler` halves its scale at most as often.

    The check keeps two earlier counts of the run: one from 50 to 100 steps ago and one
    from at most 50 steps ago. If it runs less often, these are the counts of its last
    two runs, and it warns if a tenth of the steps between is not finite.
    """

    def __init__(self) -> None:
        self._earlier: list[tuple[int, int]] = [(0, 0), (0, 0)]
        self._has_warned = False

    def check(self, tally: Tally) -> None:
        """Check counts that are on the CPU."""
        now = int(tally.steps), int(tally.nonfinite)
        if not self._earlier:
            self._earlier = [now, now]
        steps, nonfinite = (a - b for a, b in zip(now, self._earlier[0], strict=True))
        limit = max(_NONFINITE_STEPS, _NONFINITE_STEPS * steps / _RECENT_STEPS)
        if nonfinite >= limit and not self._has_warned:
            self._has_warned = True
            warn(
                f"the gradients of {nonfinite} of the last {steps} steps were not "
                "finite and became 0, which repairs no run; look at the loss and at "
                "the data of these steps"
            )
        if now[0] - self._earlier[1][0] >= _RECENT_STEPS // 2:
            self._earlier = [self._earlier[1], now]

    def ignore_earlier_steps(self) -> None:
        """Ignore the steps so far: they were observed, or belong to another run."""
        self._earlier = []
