"""The records of metrics that came without a step since the last record."""

import math
from typing import NamedTuple, Self


class Repeats(NamedTuple):
    """Counts the records that repeat a step.

    >>> Repeats().add().add()
    Repeats(total=2, latest=2)
    """

    total: int = 0
    """All of them."""
    latest: int = 0
    """Those after the last step."""

    def add(self) -> Self:
        """Return the counts with one more."""
        return type(self)(self.total + 1, self.latest + 1)


_TIMES, _FALLS = 10, 5
"""So many records in a row repeat the number of a step, with other norms; or it falls
to less than half of it so often."""

_SHORT = 200
"""Longer runs in one log may be those of several models."""

_WAY_OUT = (
    "make the clipper, or call tx.init(params), once before the loop, and pass the "
    "state that an update returned to the next one"
)


class NewStateCheck:
    """Notices that the state of the clipper begins anew again and again."""

    def __init__(self) -> None:
        self._norm = math.nan
        self._number = self._times = self._falls = 0

    def begin_step(self, number: int, norm: float) -> str:
        """Note a step that is recorded; return the text of a warning, or "".

        Args:
          number: the number of the step, from 0.
          norm: its norm.

        >>> check = NewStateCheck()
        >>> texts = [check.begin_step(i % 20, 1.0) for i in range(200)]
        >>> [i for i, text in enumerate(texts) if text]
        [100]
        """
        has_fallen = 2 * number < self._number < _SHORT
        self._number, self._norm, self._times = number, norm, 0
        self._falls += has_fallen
        if not has_fallen or self._falls != _FALLS:
            return ""
        return (
            f"the number of the clipper's steps has fallen {_FALLS} times: its state, "
            f"and so its history, begins anew again and again; {_WAY_OUT}"
        )

    def check_repeat(self, step: float, norm: float) -> str:
        """Return the text of a warning, or "".

        Args:
          step: the number of steps of the clipper, as at the last recorded step.
          norm: the norm that the metrics have now.

        >>> check = NewStateCheck()
        >>> text = check.begin_step(0, 1.0)
        >>> [bool(check.check_repeat(1, norm)) for norm in (1.0, 2.0, 3.0)]
        [False, False, False]
        """
        is_same = norm == self._norm or math.isnan(norm)
        self._times = 0 if is_same or not step else self._times + 1
        if self._times != _TIMES:
            return ""
        return (
            f"the metrics are of step {step:g} again and again, with other norms: each "
            "step begins with a new state of the clipper, so its threshold does not "
            f"adapt; {_WAY_OUT}"
        )
