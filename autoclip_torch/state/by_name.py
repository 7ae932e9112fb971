"""Match the parameters of a saved state and of a clipper by their names."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from .differences import compare, format_difference, join_names

State = Mapping[str, Any]

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


def describe_other_parameters(saved: State, current: State) -> str:
    """Return which parameters differ, at most three of a kind; empty if none does."""
    old, new = index_names(saved, current), index_names(current, current)
    shapes = saved["parameters"], current["parameters"]
    if not old or not new:
        if len(shapes[0]) != len(shapes[1]):
            return format_difference("the number of parameters", *map(len, shapes))
        differences = compare(*shapes, "parameters")
        return next(itertools.starmap(format_difference, differences), "")
    parts = {
        "only the state has {}": [name for name in old if name not in new],
        "only the clipper has {}": [name for name in new if name not in old],
        "another shape has {}": [
            name
            for name in new
            if name in old and shapes[0][old[name]] != shapes[1][new[name]]
        ],
    }
    texts = [text.format(join_names(n for n, _ in k)) for text, k in parts.items() if k]
    return f"state does not fit this clipper: {', '.join(texts)}" if texts else ""


def find_way_out(saved: State, current: State, *, can_load_part: bool) -> str:
    """Return what to do if parameters differ.

    Args:
      saved, current: the state to load, and that of the clipper.
      can_load_part: whether `strict=False` would load a part.
    """
    has_names = saved["names"] is not None and current["names"] is not None
    if not has_names and current["scope"] != "global":
        return "make both clippers of the model, so that names match the parameters"
    way_out = "pass strict=False to keep the history in common"
    rename = "correct state['names'], or set it to None to load by position"
    is_renamed = has_names and len(saved["parameters"]) == len(current["parameters"])
    ways = [way_out] * can_load_part + [rename] * is_renamed
    return ", or ".join(ways) or "no parameter is in both, so start without the state"


def describe_ambiguity(saved: State, current: State) -> str:
    """Return a warning if only the order says which parameter is meant; or "".

    The clipper has no names, and parameters of one shape have different rows.
    """
    if saved["names"] is None or current["names"] is not None:
        return ""
    first: dict[tuple[int, ...], tuple[list[int], str]] = {}
    parts = (saved[part] for part in ("parameters", "rows", "names"))
    for shape, rows, name in zip(*parts, strict=True):
        other_rows, other_name = first.setdefault(tuple(shape), (rows, name))
        if rows != other_rows:
            return (
                f"the state has names, such as {other_name} and {name}, and the "
                "clipper has none, so parameters of equal shapes are matched by their "
                "order; make the clipper of the model, or of model.named_parameters(), "
                "to match them by name"
            )
    return ""


def index_names(state: State, current: State) -> dict[tuple[str, int], int]:
    """Return the index of each parameter by its name and the number of equal names.

    Without names in the state or in the clipper it is empty.

    Raises:
      ValueError: the names are not one string per parameter.
    """
    names, wanted = state["names"], current["names"]
    if names is None or wanted is None:
        return {}
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not is_list or len(names) != len(state["parameters"]):
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
