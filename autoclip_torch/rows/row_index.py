"""Look up the rows of many parameters at once, with arrays instead of a loop."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

_Array = np.ndarray[Any, Any]


class RowIndex:
    """The rows of each parameter. Several parameters may share a row.

    Args:
      bounds: the first row of each parameter, and one more than its last row.
      ranges: all rows in order, as in `Rows`.
    """

    def __init__(
        self, bounds: Iterable[tuple[int, int]], ranges: Mapping[int, int]
    ) -> None:
        """Concatenate the rows of all parameters."""
        pairs = list(bounds)
        self._starts, self._stops = np.array(pairs, np.intp).reshape(-1, 2).T
        self.counts: _Array = self._stops - self._starts
        """How many rows each parameter has, shape (parameters,)."""
        ends = self.counts.cumsum()
        shift = (self._starts - ends + self.counts).repeat(self.counts)
        self.rows: _Array = np.arange(len(shift)) + shift
        """The rows of all parameters, one parameter after the other."""
        self._ranges = ranges

    def get_rows(self, is_selected: _Array) -> _Array:
        """Return the rows of the selected parameters, one parameter after the other."""
        rows: _Array = self.rows[is_selected.repeat(self.counts)]
        return rows

    def count(self, is_selected: _Array) -> _Array:
        """Return how many rows of each parameter are selected, shape (parameters,)."""
        if is_selected.all():
            return self.counts
        before = np.concatenate([[0], is_selected.cumsum()])
        counts: _Array = before[self._stops] - before[self._starts]
        return counts

    def split(self, values: Tensor) -> dict[int, Tensor]:
        """Return a vector over the rows as views, by first row of each parameter."""
        if len(self._ranges) == 1:
            return dict.fromkeys(self._ranges, values)
        lengths = list(self._ranges.values())
        return dict(zip(self._ranges, torch.split(values, lengths), strict=True))
