"""The patterns that `exclude` accepts, in every framework."""

import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

Pattern = str | re.Pattern[str] | Callable[[str | None, Any], bool]
"""A name, a module's name, a pattern with `*`, a regular expression, or a function."""


def as_patterns(exclude: Pattern | Iterable[Pattern] | None) -> list[Pattern]:
    """Return the patterns in an argument: one pattern, several, or None.

    Raises:
      TypeError: an entry is neither a name, a pattern nor a function.
    """
    if exclude is None:
        return []
    is_list = isinstance(exclude, Iterable) and not isinstance(exclude, str)
    patterns: Any = list(exclude) if is_list else [exclude]  # type: ignore[arg-type]
    for pattern in patterns:
        if not isinstance(pattern, str | re.Pattern) and not callable(pattern):
            raise TypeError(
                "exclude must hold names, patterns or a function of (name, parameter), "
                f"got {pattern!r}"
            )
    return patterns  # type: ignore[no-any-return]


def check_patterns_match(
    patterns: Iterable[Pattern],
    parameters: Sequence[tuple[str | None, Any]],
    match: Callable[[Pattern, str | None, Any], bool],
    way_out: str,
) -> None:
    """Check that each pattern except a function matches at least one parameter.

    Args:
      patterns: what `as_patterns` returned.
      parameters: pairs of name and parameter.
      match: returns whether a pattern matches a name and a parameter.
      way_out: for the error if no parameter has a name: how to pass names.

    Raises:
      ValueError: the parameters have no names, or a pattern matches none of them.
    """
    for pattern in patterns:
        if callable(pattern):
            continue
        if all(name is None for name, _ in parameters):
            raise ValueError(
                f"exclude={pattern!r} needs named parameters, got unnamed ones; "
                f"{way_out}"
            )
        if not any(match(pattern, *parameter) for parameter in parameters):
            names = ", ".join(str(name) for name, _ in parameters[:8])
            names += ", ..." if len(parameters) > 8 else ""
            raise ValueError(
                f"exclude must match a parameter's name, got {pattern!r}; the names "
                f"are {names}"
            )


def matches(pattern: Pattern, name: str | None, parameter: Any, separator: str) -> bool:
    """Return whether a pattern matches a parameter.

    A string matches the name, the name of an enclosing module, or as a pattern with
    `*`. A regular expression matches if it is found in the name. A function decides.

    Args:
      pattern: one of the patterns that `as_patterns` returned.
      name: the parameter's name, if it has one.
      parameter: the parameter, which is passed to a function.
      separator: the text between a module's name and the name of its parameter.

    >>> [matches(p, "head.bias", None, ".") for p in ["head", "*.bias", "bias"]]
    [True, True, False]
    """
    if isinstance(pattern, str):
        if name is None:
            return False
        is_inside = pattern != "" and name.startswith(pattern + separator)
        return name == pattern or is_inside or fnmatchcase(name, pattern)
    if isinstance(pattern, re.Pattern):
        return name is not None and pattern.search(name) is not None
    return bool(pattern(name, parameter))
