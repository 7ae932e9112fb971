"""Describe where a saved state and a clipper differ."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any


def compare(saved: Any, current: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield where two trees of plain Python differ: path, saved and current value."""
    if isinstance(saved, Mapping) and isinstance(current, Mapping):
        for key in dict.fromkeys([*current, *saved]):
            values = saved.get(key, "nothing"), current.get(key, "nothing")
            yield from compare(*values, f"{path}.{key}")
    elif type(saved) is type(current) is list and len(saved) == len(current):
        for index, values in enumerate(zip(saved, current, strict=True)):
            yield from compare(*values, f"{path}[{index}]")
    elif type(saved) is not type(current) or saved != current:
        yield path, saved, current


def check_equal(saved: Any, current: Any, path: str, way_out: str = "") -> None:
    """Raise a ValueError for the first difference of two trees, if there is one."""
    for difference in compare(saved, current, path):
        raise ValueError(format_difference(*difference) + way_out)


def format_difference(path: str, saved: Any, current: Any) -> str:
    """Return the error text for a difference between a state and a clipper."""
    before, now = map(_shorten, (saved, current))
    return (
        f"state does not fit this clipper: {path} is {before} in the state and {now} "
        "in the clipper"
    )


def join_names(names: Iterable[str]) -> str:
    """Return at most three names, and the number of the others.

    >>> join_names("abcde")
    'a, b, c and 2 more'
    """
    given = list(names)
    more = f" and {len(given) - 3} more" if len(given) > 3 else ""
    return f"{', '.join(given[:3])}{more}"


def _shorten(value: Any) -> str:
    """Return the repr, at most 200 characters of it."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]} ..."
