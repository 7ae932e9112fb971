"""Select parameters by patterns: what is excluded, scaled, or replicated."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from autoclip_core.checks import format_error
from autoclip_core.clipper.patterns import (
    Pattern,
    as_patterns,
    check_patterns_match,
    matches,
)

from .groups import Group, NamedParameter


def check_patterns(
    groups: Sequence[Group], patterns: Sequence[Pattern], argument: str
) -> None:
    """Refuse a pattern of an argument that matches no parameter.

    Raises:
      ValueError: the parameters have no names, or no name matches.
    """
    pairs = [(m.name, m.parameter) for group in groups for m in group.parameters]
    way_out = "pass the model or model.named_parameters()"
    match = partial(matches, separator=".")
    check_patterns_match(patterns, pairs, match, way_out, argument)


def exclude_from(groups: Sequence[Group], patterns: Sequence[Pattern]) -> list[Group]:
    """Return the groups without the parameters that a pattern matches.

    Raises:
      ValueError: no parameter is left.
    """
    left = []
    for index, group in enumerate(groups):
        parameters = [p for p in group.parameters if not _is_matched(p, patterns)]
        if parameters:
            name = f"group {index}"
            left.append(replace(group, parameters=parameters, name=name))
    if not left:
        raise ValueError(
            f"exclude must leave a parameter to clip, got {patterns!r}, which excludes "
            "all of them"
        )
    return left


def mark_scaled(groups: Sequence[Group], patterns: Sequence[Pattern]) -> list[Group]:
    """Return the groups; only parameters that a pattern matches are marked as scaled.

    Without patterns, all are scaled.
    """

    def mark(named: NamedParameter) -> NamedParameter:
        return replace(named, is_scaled=not patterns or _is_matched(named, patterns))

    return [replace(g, parameters=list(map(mark, g.parameters))) for g in groups]


def as_replicated(
    replicated: Pattern | Iterable[Pattern] | None, process_group: Any
) -> list[Pattern] | None:
    """Return the patterns of `replicated`; None leaves open what is replicated.

    Raises:
      TypeError: an entry is neither a name, a pattern nor a function.
      ValueError: there is no process group.
    """
    if replicated is None:
        return None
    patterns = as_patterns(replicated, "replicated")
    if process_group is None:
        rule = "given together with process_group"
        way_out = "without it, plain parameters count once already"
        raise ValueError(format_error("replicated", rule, replicated, way_out))
    return patterns


def mark_replicated(
    groups: Sequence[Group], patterns: Sequence[Pattern] | None
) -> list[Group]:
    """Return the groups; parameters that a pattern matches are marked as replicas."""
    if patterns is None:
        return list(groups)

    def mark(named: NamedParameter) -> NamedParameter:
        return replace(named, is_replicated=_is_matched(named, patterns))

    return [replace(g, parameters=list(map(mark, g.parameters))) for g in groups]


def _is_matched(named: NamedParameter, patterns: Iterable[Pattern]) -> bool:
    return any(matches(p, named.name, named.parameter, ".") for p in patterns)
