"""Which rows continue the history of others, after parameters have changed."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .groups import NamedParameter
from .rows import ParameterRows, Rows

_Range = Sequence[int]


def find_source_rows(
    old: Rows, new: Rows, predecessors: Mapping[int, NamedParameter]
) -> np.ndarray[Any, Any]:
    """Return the old row that each new row continues, or -1; shape (rows,).

    A parameter with another number of rows than its predecessor continues none.
    """
    pairs = [
        ((before.start, before.stop), (entry.start, entry.stop))
        for entry, before in _pair_entries(old, new, predecessors)
    ]
    return match_rows(pairs, len(old.names), len(new.names), new.scope)


def match_rows(
    pairs: Iterable[tuple[_Range, _Range]], old_count: int, new_count: int, scope: str
) -> np.ndarray[Any, Any]:
    """Return the old row that each new row continues, or -1; shape (new_count,).

    With one norm for all parameters, its history continues.

    Args:
      pairs: the old and the new rows of a parameter, each as start and stop. If their
        numbers differ, or if other parameters have continued them, they start.
      old_count, new_count: the number of old and of new rows.
      scope: which gradients share a row.
    """
    sources = np.full(new_count, 0 if scope == "global" else -1, np.intp)
    is_continued = np.zeros(old_count, bool)
    for old, new in pairs:
        earlier, rows = np.arange(*old), slice(*new)
        is_free = (sources[rows] < 0).all() and not is_continued[earlier].any()
        if is_free and len(earlier) == len(sources[rows]):
            sources[rows] = earlier
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
