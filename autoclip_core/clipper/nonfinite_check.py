"""Notice a run whose gradients, or updates, are not finite again and again."""

from .metrics import Tally

_COUNT, _RECENT = 10, 100


class NonfiniteCheck:
    """Reports once if 10 of the last 100 steps are not finite.

    A loss scale that calibrates is halved at most as often.

    The check keeps two earlier counts of the run: one from 50 to 100 steps ago and one
    from at most 50 steps ago. If it runs less often, these are the counts of its last
    two runs, and it reports if a tenth of the steps between is not finite.

    Args:
      quantity: what was measured, "gradients" or "updates".
    """

    def __init__(self, quantity: str = "gradients") -> None:
        self._quantity = quantity
        self._earlier: list[tuple[int, int]] = [(0, 0), (0, 0)]
        self._has_warned = False

    def check(self, tally: Tally) -> str:
        """Return the text of a warning, or "".

        Args:
          tally: the counts of the run, on the CPU.
        """
        now = int(tally.steps), int(tally.nonfinite)
        if not self._earlier:
            self._earlier = [now, now]
        steps, nonfinite = (a - b for a, b in zip(now, self._earlier[0], strict=True))
        limit = max(_COUNT, _COUNT * steps / _RECENT)
        text = ""
        if nonfinite >= limit and not self._has_warned:
            self._has_warned = True
            text = (
                f"the {self._quantity} of {nonfinite} of the last {steps} steps were "
                "not finite and became 0, which repairs no run; look at the loss and "
                "at the data of these steps"
            )
        if now[0] - self._earlier[1][0] >= _RECENT // 2:
            self._earlier = [self._earlier[1], now]
        return text

    def ignore_earlier_steps(self) -> None:
        """Ignore the steps so far: they were observed, or belong to another run."""
        self._earlier = []
