"""Bring a saved state into the order of a clipper's parameters, by their names."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .differences import format_difference

_WRAPPERS = (
    "module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
)
"""The attributes in which DDP, torch.compile, FSDP1 and checkpointing keep a module."""


def strip_wrappers(names: Sequence[str]) -> list[str]:
    """Return the names without the prefixes of wrappers, wherever these stand.

    If this makes two names equal, all are returned unchanged.

    >>> strip_wrappers(["module.layers.0._orig_mod.weight", "module.head.bias"])
    ['layers.0.weight', 'head.bias']
    """
    parts = [[p for p in name.split(".") if p not in _WRAPPERS] for name in names]
    stripped = [".".join(part) or name for part, name in zip(parts, names, strict=True)]
    return stripped if len(set(stripped)) == len(set(names)) else list(names)


def order_by_name(
    saved: Mapping[str, Any], current: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Return a saved state with its parameters and rows in the order of a clipper.

    Without names on one side, the state is returned unchanged.

    Args:
      saved: the state to load, of the clipper's class and scope, with its parameters.
      current: the present state of the clipper.

    Raises:
      ValueError: the rows or policies of the parameters differ.
    """
    order = _find_order(saved, current)
    if order == list(range(len(order))):
        return saved
    parameters, rows = (_as_list(saved[key], order) for key in ("parameters", "rows"))
    sources = _find_sources(rows, current["rows"])
    by_row = {"observed", "clipped"}
    tally = {
        name: _take(part, sources) if name in by_row else part
        for name, part in _as_mapping(saved["tally"]).items()
    }
    policies, states = _order_policies(saved, current, sources)
    ordered = {
        "parameters": parameters,
        "rows": current["rows"],
        "names": current["names"],
        "policies": policies,
        "states": states,
        "tally": tally,
    }
    return {**saved, **ordered}


def find_unnamed(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Return names in a state of which only the order says which parameter is meant.

    The clipper has no names, and these are of parameters with one shape, but with
    different rows.

    Args:
      saved: a state that fits the clipper.
      current: the present state of the clipper.
    """
    if saved["names"] is None or current["names"] is not None:
        return []
    first: dict[tuple[int, ...], tuple[list[int], str]] = {}
    parts = (saved[part] for part in ("parameters", "rows", "names"))
    for shape, rows, name in zip(*parts, strict=True):
        other_rows, other_name = first.setdefault(tuple(shape), (rows, name))
        if rows != other_rows:
            return [other_name, name]
    return []


def _find_order(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[int]:
    """Return the index of each of the clipper's parameters in the state."""
    index = index_names(saved, current)
    return [index[key] for key in index_names(current, current)] if index else []


def index_names(
    state: Mapping[str, Any], current: Mapping[str, Any]
) -> dict[tuple[str, int], int]:
    """Return the index of each parameter by its name and the number of equal names.

    Without names in the state or in the clipper it is empty.

    Args:
      state: a saved state.
      current: the present state of the clipper.

    Raises:
      ValueError: the names are not one string per parameter.
    """
    names, wanted = state["names"], current["names"]
    if names is None or wanted is None:
        return {}
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not is_list or len(names) != _count(state["parameters"]):
        raise ValueError(format_difference("names", names, wanted))
    numbered = _number(strip_wrappers(names))
    return {key: position for position, key in enumerate(numbered)}


def _number(names: Sequence[str]) -> list[tuple[str, int]]:
    """Return each name, with the number of equal names before it."""
    counts: Counter[str] = Counter()
    numbered = []
    for name in names:
        numbered.append((name, counts[name]))
        counts[name] += 1
    return numbered


def _count(part: Any) -> int:
    return len(part) if isinstance(part, list) else 0


def _find_sources(
    saved: Sequence[Any], current: Sequence[Sequence[int]]
) -> torch.Tensor:
    """Return the saved row of each row of the clipper.

    Args:
      saved: the first and the last row + 1 of each parameter in the state, in the order
        of the clipper.
      current: the same in the clipper.
    """
    sources: dict[int, int] = {}
    for old, new in zip(saved, current, strict=True):
        is_pair = isinstance(old, list) and [type(row) for row in old] == [int, int]
        if not is_pair or old[1] - old[0] != new[1] - new[0]:
            raise ValueError(format_difference("rows", list(saved), list(current)))
        for offset in range(new[1] - new[0]):
            row = sources.setdefault(new[0] + offset, old[0] + offset)
            if row != old[0] + offset:  # a group with other parameters
                raise ValueError(format_difference("rows", list(saved), list(current)))
    ordered = [sources[row] for row in sorted(sources)]
    if sorted(ordered) != list(range(len(ordered))):
        raise ValueError(format_difference("rows", list(saved), list(current)))
    return torch.tensor(ordered)


def _order_policies(
    saved: Mapping[str, Any], current: Mapping[str, Any], sources: torch.Tensor
) -> tuple[list[Any], list[Any]]:
    """Return the policies and their states in the order of the clipper's rows."""
    policies, states = saved["policies"], saved["states"]
    is_list = isinstance(policies, list) and isinstance(states, list)
    if not is_list or not len(policies) == len(states) == len(current["policies"]):
        raise ValueError(format_difference("policies", policies, current["policies"]))
    total = len(sources)
    starts, bounds = [find_bounds(each["states"], total) for each in (saved, current)]
    if starts is None or bounds is None:
        raise ValueError(
            "state does not fit this clipper: its parameters have another order, and "
            "its policies have no state that shows their rows; give the parameters in "
            "the order of state['names']"
        )
    ordered_policies, ordered_states = [], []
    for first, last in itertools.pairwise(bounds):
        rows = sources[first:last]
        block = sum(start <= int(rows[0]) for start in starts) - 1
        part = rows - starts[block]
        if int(part.min()) < 0 or int(rows.max()) >= starts[block + 1]:
            raise ValueError(
                format_difference("policies", policies, current["policies"])
            )
        ordered_policies.append(policies[block])
        ordered_states.append(_take(states[block], part))
    return ordered_policies, ordered_states


def find_bounds(states: Sequence[Any], total: int) -> list[int] | None:
    """Return the first row of each policy, and the number of rows; None if unknown.

    The state of a policy shows its number of rows. A fixed threshold has no state.
    """
    lengths = [_count_rows(state) for state in states]
    unknown = lengths.count(0)
    if unknown > 1:
        return None
    lengths = [length or total - sum(lengths) for length in lengths]
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    return bounds if bounds[-1] == total and min(lengths) > 0 else None


def _count_rows(state: Any) -> int:
    """Return the number of rows of a saved policy state; 0 if it holds no array."""
    if isinstance(state, Mapping):
        return max((_count_rows(part) for part in state.values()), default=0)
    return len(state) if isinstance(state, torch.Tensor) and state.ndim else 0


def _take(state: Any, rows: torch.Tensor) -> Any:
    """Return the given rows of a saved state. A broken part stays unchanged."""
    if isinstance(state, Mapping):
        return {name: _take(part, rows) for name, part in state.items()}
    is_array = isinstance(state, torch.Tensor) and state.ndim > 0
    if not is_array or len(state) <= int(rows.max()):
        return state
    return state[rows.to(state.device)]


def _as_list(part: Any, order: list[int]) -> list[Any]:
    """Return the entries of a list in another order."""
    if not isinstance(part, list) or len(part) != len(order):
        raise ValueError(
            format_difference("parameters", part, f"a list of {len(order)}")
        )
    return [part[index] for index in order]


def _as_mapping(part: Any) -> Mapping[str, Any]:
    return part if isinstance(part, Mapping) else {}
