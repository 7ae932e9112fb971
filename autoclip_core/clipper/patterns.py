"""The patterns that `exclude` and `scale_only` accept, in every framework."""

import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from autoclip_core.checks import format_error

Pattern = str | re.Pattern[str] | Callable[[str | None, Any], bool]
"""A name, a module's name, a pattern with `*`, a regular expression, or a function."""


def as_patterns(
    given: Pattern | Iterable[Pattern] | None, argument: str = "exclude"
) -> list[Pattern]:
    """Return the patterns in an argument: one pattern, several, or None.

    Args:
      given: the value of the argument.
      argument: its name, for the error message.

    Raises:
      TypeError: an entry is neither a name, a pattern nor a function.
    """
    if given is None:
        return []
    is_list = isinstance(given, Iterable) and not isinstance(given, str)
    patterns: Any = list(given) if is_list else [given]  # type: ignore[arg-type]
    for pattern in patterns:
        if not isinstance(pattern, str | re.Pattern) and not callable(pattern):
            raise TypeError(
                f"{argument} must hold names, patterns or a function of (name, "
                f"parameter), got {pattern!r}"
            )
    return patterns  # type: ignore[no-any-return]


def as_scale_patterns(
    scale_only: Pattern | Iterable[Pattern] | None,
) -> list[Pattern]:
    """Return the patterns of `scale_only`; no pattern means that all are scaled.

    Raises:
      TypeError: an entry is neither a name, a pattern nor a function.
      ValueError: the argument holds no pattern.
    """
    patterns = as_patterns(scale_only, "scale_only")
    if scale_only is not None and not patterns:
        rule, way_out = "None or hold a pattern", "to scale nothing, set dry_run=True"
        raise ValueError(format_error("scale_only", rule, scale_only, way_out))
    return patterns


def check_patterns_match(
    patterns: Iterable[Pattern],
    parameters: Sequence[tuple[str | None, Any]],
    match: Callable[[Pattern, str | None, Any], bool],
    way_out: str,
    argument: str = "exclude",
) -> None:
    """Check that each pattern except a function matches at least one parameter.

    Args:
      patterns: what `as_patterns` returned.
      parameters: pairs of name and parameter.
      match: returns whether a pattern matches a name and a parameter.
      way_out: for the error if no parameter has a name: how to pass names.
      argument: the argument that holds the patterns, for the error message.

    Raises:
      ValueError: the parameters have no names, or a pattern matches none of them.
    """
    for pattern in patterns:
        if callable(pattern):
            continue
        if all(name is None for name, _ in parameters):
            raise ValueError(
                f"{argument}={pattern!r} needs named parameters, got unnamed ones; "
                f"{way_out}"
            )
        if not any(match(pattern, *parameter) for parameter in parameters):
            names = ", ".join(str(name) for name, _ in parameters[:8])
            names += ", ..." if len(parameters) > 8 else ""
            raise ValueError(
                f"{argument} must match a parameter's name, got {pattern!r}; the "
                f"names are {names}"
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
