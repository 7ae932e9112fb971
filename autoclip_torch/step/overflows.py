"""Steps that are not finite, so many that a loss scale must have been hidden from."""

from autoclip_core.clipper.metrics import Tally

from .warn import warn

_MANY = 10
"""A calibrating GradScaler halves its scale as often at most."""

_RECENT = 100


class Overflows:
    """Warns once of ten such steps among the last hundred.

    Of the run's counts it remembers two earlier ones, of 50 to 100 steps ago and of 50
    at most. Where looks are rarer, they are those of the last two looks, and the same
    share of what lies between is warned of.
    """

    def __init__(self) -> None:
        """Start with a run that has not begun."""
        self._earlier: list[tuple[int, int]] = [(0, 0), (0, 0)]
        self._has_warned = False

    def look(self, tally: Tally) -> None:
        """Look at counts that are on the host."""
        now = int(tally.steps), int(tally.nonfinite)
        if not self._earlier:
            self._earlier = [now, now]
        steps, bad = (a - b for a, b in zip(now, self._earlier[0], strict=True))
        if bad >= max(_MANY, _MANY * steps / _RECENT) and not self._has_warned:
            self._has_warned = True
            warn(
                f"the gradients of {bad} of the last {steps} steps were not finite; "
                "with a GradScaler, call step(scaler=scaler, optimizer=optimizer) or "
                "unscale_ before it, else its scale never falls; without one, look at "
                "the loss"
            )
        if now[0] - self._earlier[1][0] >= _RECENT // 2:
            self._earlier = [self._earlier[1], now]

    def leave_out(self) -> None:
        """Leave out what was counted so far: it was observed, or in another run."""
        self._earlier = []
