"""Whether the loss of a run ends far above its level before a spike or a jump."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from autoclip_core.record.step import Array

BEFORE, END = 50, 20
"""The level is that of the last 50 losses before a step, the end of the last 20."""

FAR = 5.0
"""The end is this many times as far above the level as p90 of the 50."""


class LossRise(NamedTuple):
    """A place in the series after which the loss ends far above its level."""

    place: int
    level: float
    end: float

    def __str__(self) -> str:
        """Return the sentence for a verdict."""
        return (
            f" The loss ends at {self.end:.4g}; before that step it was "
            f"{self.level:.4g}. This is damage, unless the data or the loss changed."
        )


def find_loss_rise(losses: Array, places: Iterable[int]) -> LossRise | None:
    """Return the place with the lowest level of those that the loss ends far above.

    `end - level > 5 * (p90 - level)`: level and p90 are the median and the quantile 0.9
    of 50 losses before the place, end is the median of the last 20. A place may be some
    steps late.

    >>> find_loss_rise(np.repeat([2.0, 2.1, 9.0], [90, 10, 30]), [100])
    LossRise(place=100, level=2.0, end=9.0)
    """
    is_finite = np.isfinite(losses)
    values, finite = losses[is_finite], np.flatnonzero(is_finite)
    rises = []
    for place in places:
        count = int(np.searchsorted(finite, place))
        if count < END or len(values) - count < END:
            continue
        before = values[max(count - BEFORE, 0) : count]
        level, end = float(np.median(before)), float(np.median(values[-END:]))
        if end - level > FAR * (float(np.quantile(before, 0.9)) - level):
            rises.append(LossRise(int(place), level, end))
    return min(rises, key=lambda rise: rise.level, default=None)
