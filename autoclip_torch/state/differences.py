"""Describe where a saved state and a clipper differ."""

from collections.abc import Iterator, Mapping
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


def format_difference(path: str, saved: Any, current: Any) -> str:
    """Return the error text for a difference between a state and a clipper."""
    return (
        f"state does not fit this clipper: {path} is {saved!r} in the state and "
        f"{current!r} in the clipper"
    )
