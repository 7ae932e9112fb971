"""The records of metrics that came without a step since the last record."""

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
