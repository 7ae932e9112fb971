"""Bring a saved state into the rows of a clipper.

The parameters may have another order. A model may also have another head or new
adapters when its run continues.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from autoclip_core.history.full import widen
from autoclip_torch.rows.sources import match_rows

from .by_name import State, describe_other_parameters, find_way_out, index_names
from .differences import format_difference

_Array = np.ndarray[Any, Any]


def arrange_rows(
    saved: State, current: State, strict: bool, make_empty: Callable[[], State]
) -> State:
    """Return a saved state with the parameters and the rows of a clipper.

    Names decide which parameter continues which history. If one side has none, the
    order does. With one norm for all parameters, its history continues.

    Args:
      saved: the state to load, of the clipper's class and scope.
      current: the present state of the clipper.
      strict: whether both must have the same parameters. If not, a parameter that both
        have, with as many rows, continues its history, and the others start.
      make_empty: returns the state of the clipper without history.

    Raises:
      ValueError: the parameters differ, no row continues, or the rows, the policies or
        the arrays do not fit.
    """
    _check_lists(saved)
    changes = describe_other_parameters(saved, current)
    old, new = index_names(saved, current), index_names(current, current)
    if not changes and (not old or list(old) == list(new)):
        return saved
    pairs = [
        (saved["rows"][old[name]], current["rows"][new[name]])
        for name in new
        if name in old
    ]
    total, row_count = (_count(state["rows"]) for state in (saved, current))
    sources = match_rows(pairs, total, row_count, current["scope"])
    has_common = bool((sources >= 0).any())
    if (changes and strict) or not has_common:
        way_out = find_way_out(saved, current, can_load_part=strict and has_common)
        raise ValueError(f"{changes}; {way_out}")
    if not changes:
        _check_same_rows(pairs, sources)
    empty = make_empty()
    return {
        **saved,
        **{name: current[name] for name in ("parameters", "rows", "names")},
        **_take_states(saved, current, empty, sources, has_all=not changes),
        "tally": _take_counts(saved, empty, sources),
    }


def _count(rows: Sequence[Sequence[int]]) -> int:
    """Return the number of rows, from those of each parameter."""
    return max((stop for _, stop in rows), default=0)


def _check_lists(saved: State) -> None:
    """Refuse shapes and rows that no clipper saves."""
    for name in ("parameters", "rows"):
        lists = saved[name]
        is_list = isinstance(lists, list) and all(isinstance(x, list) for x in lists)
        if not is_list or any(type(n) is not int for each in lists for n in each):
            raise ValueError(format_difference(name, lists, "a list of integers each"))
    rows = saved["rows"]
    is_valid = len(rows) == len(saved["parameters"]) and all(
        len(pair) == 2 and 0 <= pair[0] <= pair[1] for pair in rows
    )
    if not is_valid:
        raise ValueError(format_difference("rows", rows, "a range per parameter"))


def _check_same_rows(pairs: Sequence[tuple[Any, Any]], sources: _Array) -> None:
    """Refuse a state of the same parameters that share rows in another way."""
    continued = [sources[start:stop].tolist() for _, (start, stop) in pairs]
    if continued != [list(range(*earlier)) for earlier, _ in pairs]:
        rows = zip(*pairs, strict=True)
        raise ValueError(format_difference("rows", *map(list, rows)))


def _take_states(
    saved: State, current: State, empty: State, sources: _Array, has_all: bool
) -> dict[str, list[Any]]:
    """Return the policies and their states for the rows of a clipper.

    Each policy continues the saved policy of most of its rows. A row of another one
    starts, unless `has_all`. `sources` has the saved row of each row, or -1.
    """
    pair = saved["policies"], current["policies"]
    parts = [pair[0], saved["states"], pair[1]]
    if {type(part) for part in parts} != {list} or len(set(map(len, parts))) > 1:
        raise ValueError(format_difference("policies", *pair))
    starts = _find_bounds(saved["states"], _count(saved["rows"]))
    policies, states = [], []
    bounds = _find_bounds(empty["states"], len(sources))
    for index, (first, last) in enumerate(itertools.pairwise(bounds)):
        part = sources[first:last]
        blocks = np.searchsorted(starts, part[part >= 0], side="right") - 1
        block = int(np.bincount(blocks).argmax()) if len(blocks) else index
        start, stop = starts[block : block + 2]
        rows = np.where((part >= start) & (part < stop), part - start, -1)
        if has_all and (rows < 0).any():
            raise ValueError(format_difference("policies", *pair))
        state = take_saved_rows(saved["states"][block], empty["states"][index], rows)
        policies.append(saved["policies"][block])
        states.append(state)
    return {"policies": policies, "states": states}


def _take_counts(saved: State, empty: State, sources: _Array) -> State:
    """Return the counts for the rows of a clipper."""
    tally, total = saved["tally"], _count(saved["rows"])
    counts = {}
    for name in ("observed", "clipped"):
        count = tally.get(name) if isinstance(tally, Mapping) else None
        if getattr(count, "shape", None) != (total,):
            error = format_difference("rows", saved["rows"], "a row for each count")
            raise ValueError(error)
        counts[name] = take_saved_rows(count, empty["tally"][name], sources)
    return {**tally, **counts}


def _find_bounds(states: Sequence[Any], total: int) -> list[int]:
    """Return the first row of each policy, and the number of rows.

    The state of a policy shows its number of rows. A fixed threshold has no state.

    Raises:
      ValueError: the states do not show it.
    """
    lengths = [_count_rows(state) for state in states]
    unknown = lengths.count(0)
    lengths = [length or total - sum(lengths) for length in lengths]
    if unknown > 1 or sum(lengths) != total or min(lengths) <= 0:
        raise ValueError(
            "state does not fit this clipper: its parameters differ or have another "
            "order, and its policies have no state that shows their rows; give the "
            "parameters in the order of state['names']"
        )
    return [0, *itertools.accumulate(lengths)]


def _count_rows(state: Any) -> int:
    """Return the number of rows of a saved policy state; 0 if it holds no array."""
    if isinstance(state, Mapping):
        return max((_count_rows(part) for part in state.values()), default=0)
    return len(state) if isinstance(state, torch.Tensor) and state.ndim else 0


def take_saved_rows(saved: Any, empty: Any, sources: Any) -> Any:
    """Return the rows of a saved state, and the empty row where a source is -1.

    A part with another structure stays unchanged.

    >>> empty = torch.zeros(2, dtype=int)
    >>> take_saved_rows(torch.tensor([5, 6]), empty, np.array([1, -1]))
    tensor([6, 0])
    """
    if isinstance(empty, Mapping):
        if not isinstance(saved, Mapping) or set(saved) != set(empty):
            return saved
        return {
            name: take_saved_rows(saved[name], empty[name], sources) for name in empty
        }
    if not isinstance(saved, torch.Tensor) or saved.ndim != empty.ndim:
        return saved
    old, new = saved.numpy(force=True), empty.numpy(force=True)
    new = widen(new, old)
    is_like = old.dtype == new.dtype and old.shape[1:] == new.shape[1:]
    if not is_like or len(old) <= sources.max():
        return saved
    indices = np.where(sources < 0, len(old) + np.arange(len(sources)), sources)
    return torch.from_numpy(np.concatenate([old, new])[indices])
