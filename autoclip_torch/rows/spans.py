"""From slots to rows and back, for all slots at once: arrays in place of a loop."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

_Array = np.ndarray[Any, Any]


class Spans:
    """Which rows each slot has; several may have the same one.

    Args:
      spans: of each slot its first row, and one more than its last row.
    """

    def __init__(self, spans: Iterable[tuple[int, int]]) -> None:
        """Lay out the rows of all slots, one slot after the other."""
        pairs = list(spans)
        bounds = np.array(pairs, np.intp).reshape(-1, 2)
        self._starts, self._stops = bounds.T
        self.counts: _Array = self._stops - self._starts
        """How many rows each slot has, shape (slots,)."""
        ends = self.counts.cumsum()
        shift = (self._starts - ends + self.counts).repeat(self.counts)
        self._rows = np.arange(len(shift)) + shift
        self._widths = {start: stop - start for start, stop in pairs}

    def rows(self, slots: _Array) -> _Array:
        """Return the rows of those slots that are true, one slot after the other."""
        found: _Array = self._rows[slots.repeat(self.counts)]
        return found

    def count(self, rows: _Array) -> _Array:
        """Return how many of each slot's rows are true, shape (slots,)."""
        if rows.all():
            return self.counts
        before = np.concatenate([[0], rows.cumsum()])
        found: _Array = before[self._stops] - before[self._starts]
        return found

    def parts(self, values: Tensor) -> dict[int, Tensor]:
        """Return a vector over the rows in views, by the first row of each slot."""
        widths = list(self._widths.values())
        return dict(zip(self._widths, torch.split(values, widths), strict=True))
