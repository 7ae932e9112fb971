"""Which parameters a pattern names: what `exclude` takes, whatever the framework."""

import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

Pattern = str | re.Pattern[str] | Callable[[str | None, Any], bool]
"""A name, a module's name, a pattern with `*`, a regular expression, or a function."""


def as_patterns(exclude: Pattern | Iterable[Pattern] | None) -> list[Pattern]:
    """Return the patterns of an argument that may be one, several or None.

    Raises:
      TypeError: one is neither a name, a pattern nor a function.
    """
    if exclude is None:
        return []
    several = isinstance(exclude, Iterable) and not isinstance(exclude, str)
    patterns: Any = list(exclude) if several else [exclude]  # type: ignore[arg-type]
    for pattern in patterns:
        if not isinstance(pattern, str | re.Pattern) and not callable(pattern):
            raise TypeError(
                "exclude must hold names, patterns or a function of (name, parameter), "
                f"got {pattern!r}"
            )
    return patterns  # type: ignore[no-any-return]


def check_names(
    patterns: Iterable[Pattern],
    members: Sequence[tuple[str | None, Any]],
    match: Callable[[Pattern, str | None, Any], bool],
    way_out: str,
) -> None:
    """Refuse a name that nothing has.

    Args:
      patterns: what `as_patterns` returned.
      members: name and parameter of each.
      match: whether a pattern names a member.
      way_out: how to give names, where no parameter has one.

    Raises:
      ValueError: the parameters have no names, or none has this one.
    """
    for pattern in patterns:
        if callable(pattern):
            continue
        if all(name is None for name, _ in members):
            raise ValueError(
                f"exclude={pattern!r} needs named parameters, got unnamed ones; "
                f"{way_out}"
            )
        if not any(match(pattern, *member) for member in members):
            known = ", ".join(str(name) for name, _ in members[:8])
            raise ValueError(
                f"exclude must name parameters that are there, got {pattern!r}; there "
                f"are {known}{', ...' if len(members) > 8 else ''}"
            )


def matches(pattern: Pattern, name: str | None, parameter: Any, separator: str) -> bool:
    """Match a name, the name of a module above it, a pattern, or by a function.

    Args:
      pattern: one of what `as_patterns` returned.
      name: the parameter's name, if it has one.
      parameter: the parameter, for a function.
      separator: what stands between a module's name and what is in it.

    >>> [matches(p, "head.bias", None, ".") for p in ["head", "*.bias", "bias"]]
    [True, True, False]
    """
    if isinstance(pattern, str):
        if name is None:
            return False
        inside = pattern != "" and name.startswith(pattern + separator)
        return name == pattern or inside or fnmatchcase(name, pattern)
    if isinstance(pattern, re.Pattern):
        return name is not None and pattern.search(name) is not None
    return bool(pattern(name, parameter))
