"""What a variable is called, and which variables a pattern names."""

from typing import Any

from autoclip_core.clipper.patterns import Pattern, matches


def path_of(variable: Any) -> str:
    """Return what a variable is called: its path, or TensorFlow's name without `:0`."""
    path = getattr(variable, "path", None) or variable.name
    return str(path).split(":")[0]


def matches_path(pattern: Pattern, path: str | None, variable: Any) -> bool:
    """Match a path or its end, from any layer on.

    The first part of a path is the name that Keras found for the model.

    >>> [matches_path(p, "sequential_6/head/bias", None) for p in ["head", "bias", "b"]]
    [True, True, False]
    """
    if path is None or callable(pattern):
        return matches(pattern, path, variable, "/")
    parts = path.split("/")
    ends = ("/".join(parts[start:]) for start in range(len(parts)))
    return any(matches(pattern, end, variable, "/") for end in ends)
