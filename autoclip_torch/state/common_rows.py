"""Compare the parameters of a saved state and a clipper, and load those in common.

A model may have another head or new adapters when its run continues.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from autoclip_core.history.full import widen

from .by_name import find_bounds, index_names
from .differences import compare, format_difference, join_names

State = Mapping[str, Any]

COUNTS = ("observed", "clipped")
"""The counts of each row."""


def check_same_parameters(saved: State, current: State) -> None:
    """Raise a ValueError if names or shapes differ, or the number of parameters."""
    if changes := describe_other_parameters(saved, current):
        raise ValueError(f"{changes}; {_find_way_out(saved, current)}")


def describe_other_parameters(saved: State, current: State) -> str:
    """Return which parameters differ, at most three of a kind; empty if none does."""
    old, new = index_names(saved, current), index_names(current, current)
    shapes = saved["parameters"], current["parameters"]
    if not old or not new:
        if isinstance(shapes[0], list) and len(shapes[0]) != len(shapes[1]):
            return format_difference("the number of parameters", *map(len, shapes))
        differences = compare(*shapes, "parameters")
        return next(itertools.starmap(format_difference, differences), "")
    reshaped = [
        name
        for name in new
        if name in old and any(compare(shapes[0][old[name]], shapes[1][new[name]], ""))
    ]
    parts = {
        "only the state has {}": [name for name in old if name not in new],
        "only the clipper has {}": [name for name in new if name not in old],
        "another shape has {}": reshaped,
    }
    texts = [text.format(join_names(n for n, _ in k)) for text, k in parts.items() if k]
    return f"state does not fit this clipper: {', '.join(texts)}" if texts else ""


def keep_common_rows(
    saved: State, current: State, make_empty: Callable[[], State]
) -> State:
    """Return a saved state with the rows of a clipper.

    With one norm for all parameters, its history continues. Otherwise each parameter
    that both have, with as many rows, continues its history, and the others start.

    Args:
      saved: the state to load, of the clipper's class and scope.
      current: the present state of the clipper.
      make_empty: returns the state of the clipper without history.

    Raises:
      ValueError: no row continues, or the policies or the arrays do not fit.
    """
    _check_lists(saved)
    if not (changes := describe_other_parameters(saved, current)):
        return saved
    sources = _find_sources(saved, current)
    if not (sources >= 0).any():
        raise ValueError(f"{changes}; {_find_way_out(saved, current, strict=False)}")
    empty = make_empty()
    states = _take_states(saved, empty, sources)
    counts = {
        name: take_saved_rows(saved["tally"][name], empty["tally"][name], sources)
        for name in COUNTS
    }
    kept = {name: current[name] for name in ("parameters", "rows", "names")}
    return {**saved, **kept, "states": states, "tally": {**saved["tally"], **counts}}


def _check_lists(saved: State) -> None:
    """Refuse shapes, rows or counts of rows that no clipper saves."""
    for name in ("parameters", "rows"):
        lists = saved[name]
        is_list = isinstance(lists, list) and all(isinstance(x, list) for x in lists)
        if not is_list or any(type(n) is not int for each in lists for n in each):
            raise ValueError(format_difference(name, lists, "a list of integers each"))
    rows, tally = saved["rows"], saved["tally"]
    counts = [tally.get(n) if isinstance(tally, Mapping) else None for n in COUNTS]
    total = max((stop for *_, stop in filter(None, rows)), default=0)
    is_valid = len(rows) == len(saved["parameters"]) and all(
        len(pair) == 2 and 0 <= pair[0] <= pair[1] for pair in rows
    )
    shapes = [getattr(count, "shape", None) for count in counts]
    if not is_valid or any(shape != (total,) for shape in shapes):
        raise ValueError(format_difference("rows", rows, "a row for each count"))


def _find_way_out(saved: State, current: State, *, strict: bool = True) -> str:
    """Return what to do if parameters differ; `strict` is as in `load_state_dict`."""
    has_names = saved["names"] is not None and current["names"] is not None
    if not has_names and current["scope"] != "global":
        return "make both clippers of the model, so that names match the parameters"
    way_out = "pass strict=False to keep the history in common"
    rename = "correct state['names'], or set it to None to load by position"
    is_renamed = has_names and len(saved["parameters"]) == len(current["parameters"])
    ways = [way_out] * strict + [rename] * is_renamed
    return ", or ".join(ways) or "no parameter is in both, so start without the state"


def _find_sources(saved: State, current: State) -> Any:
    """Return the saved row that each row continues, or -1; shape (rows,)."""
    sources = np.full(max(stop for _, stop in current["rows"]), -1)
    if current["scope"] == "global":
        return sources + 1
    old, new = index_names(saved, current), index_names(current, current)
    is_continued: set[int] = set()
    for name in (name for name in new if name in old):
        bounds = saved["rows"][old[name]], current["rows"][new[name]]
        before, rows = (range(*pair) for pair in bounds)
        is_free = (sources[rows] < 0).all() and is_continued.isdisjoint(before)
        if is_free and len(before) == len(rows):
            sources[rows] = before
            is_continued.update(before)
    return sources


def _take_states(saved: State, empty: State, sources: Any) -> list[Any]:
    """Return the state of each policy; a row under another policy starts."""
    pair = saved["states"], empty["states"]
    if not isinstance(pair[0], list):
        raise ValueError(format_difference("states", pair[0], "a list"))
    totals = len(saved["tally"]["observed"]), len(sources)
    starts, bounds = map(find_bounds, pair, totals)
    if starts is None or bounds is None or len(starts) != len(bounds):
        raise ValueError(format_difference("the number of states", *map(len, pair)))
    states = []
    for index, (first, last) in enumerate(itertools.pairwise(bounds)):
        start, stop = starts[index : index + 2]
        part = sources[first:last]
        rows = np.where((part >= start) & (part < stop), part - start, -1)
        states.append(take_saved_rows(pair[0][index], pair[1][index], rows))
    return states


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
    if old.dtype != new.dtype or old.shape[1:] != new.shape[1:]:
        return saved
    indices = np.where(sources < 0, len(old) + np.arange(len(sources)), sources)
    return torch.from_numpy(np.concatenate([old, new])[indices])
