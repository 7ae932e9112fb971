"""Which rows continue the history of others, after parameters have changed."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from .groups import NamedParameter
from .rows import ParameterRows, Rows


def find_source_rows(
    old: Rows, new: Rows, predecessors: Mapping[int, NamedParameter]
) -> np.ndarray[Any, Any]:
    """Return the old row that each new row continues, or -1; shape (rows,).

    A parameter with another number of rows than its predecessor continues none.
    """
    sources = np.full(len(new.names), -1, np.intp)
    if new.scope == "global":
        sources[:] = 0
        return sources
    is_continued = np.zeros(len(old.names), bool)
    for entry, before in _pair_entries(old, new, predecessors):
        rows, earlier = slice(entry.start, entry.stop), slice(before.start, before.stop)
        if entry.count != before.count:
            continue
        if (sources[rows] < 0).all() and not is_continued[earlier].any():
            sources[rows] = np.arange(before.start, before.stop)
            is_continued[earlier] = True
    return sources


def find_restarted(
    old: Rows, new: Rows, predecessors: Mapping[int, NamedParameter]
) -> list[tuple[ParameterRows, int]]:
    """Return the parameters that get another number of rows, and the number before."""
    if new.scope != "unit":
        return []
    return [
        (entry, before.count)
        for entry, before in _pair_entries(old, new, predecessors)
        if entry.count != before.count
    ]


def _pair_entries(
    old: Rows, new: Rows, predecessors: Mapping[int, NamedParameter]
) -> list[tuple[ParameterRows, ParameterRows]]:
    """Return each new entry that has a predecessor, and the entry of the latter."""
    entries = {id(entry.parameter): entry for entry in old.by_parameter}
    pairs = []
    for entry in new.by_parameter:
        named = predecessors.get(id(entry.parameter))
        key = id(entry.parameter if named is None else named.parameter)
        if key in entries:
            pairs.append((entry, entries[key]))
    return pairs
