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


_TIMES = 10
"""So many records in a row repeat the number of a step, with other norms."""


class NewStateCheck:
    """Notices that each step begins with a new state of the clipper; reports once."""

    def __init__(self) -> None:
        self._norm = math.nan
        self._times = 0

    def begin_step(self, norm: float) -> None:
        """Note the norm of a step that is recorded."""
        self._norm, self._times = norm, 0

    def check_repeat(self, step: float, norm: float) -> str:
        """Return the text of a warning, or "".

        Args:
          step: the number of steps of the clipper, as at the last recorded step.
          norm: the norm that the metrics have now.

        >>> check = NewStateCheck()
        >>> check.begin_step(1.0)
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
            "adapt; make the clipper, or call tx.init(params), once before the loop, "
            "and pass the state that an update returned to the next one"
        )
