"""Select parameters by patterns: what is excluded, scaled, or replicated."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from autoclip_core.checks import format_error
from autoclip_core.clipper.patterns import (
    Pattern,
    as_patterns,
    as_scale_patterns,
    check_patterns_match,
    matches,
)

from .groups import Group, NamedParameter

Patterns = Pattern | Iterable[Pattern] | None
"""One pattern, several, or none."""


class Selection:
    """The patterns of a clipper.

    Args:
      exclude, scale_only, replicated, process_group: as in `Clipper`.

    Raises:
      TypeError: an entry is neither a name, a pattern nor a function.
      ValueError: `scale_only` is empty, or `replicated` has no process group.
    """

    def __init__(
        self,
        exclude: Patterns,
        scale_only: Patterns,
        replicated: Patterns = None,
        process_group: Any = None,
    ) -> None:
        self.exclude = as_patterns(exclude)
        self.scale_only = as_scale_patterns(scale_only)
        self.replicated: list[Pattern] | None = None
        """None leaves open what is replicated."""
        if replicated is None:
            return
        self.replicated = as_patterns(replicated, "replicated")
        if process_group is None:
            rule = "given together with process_group"
            way_out = "without it, plain parameters count once already"
            raise ValueError(format_error("replicated", rule, replicated, way_out))

    def check(self, groups: Sequence[Group]) -> None:
        """Refuse a pattern that matches no parameter of the groups or their modules.

        A parameter of the module may be frozen, or another optimizer may step it.

        Raises:
          ValueError: the parameters have no names, or no name matches.
        """
        named = _list_named(groups)
        _check_patterns(named, self.exclude, "exclude")
        if self.scale_only or self.replicated:
            named = [p for p in named if not _is_matched(p, self.exclude)] or named
            _check_patterns(named, self.scale_only, "scale_only")
            _check_patterns(named, self.replicated or (), "replicated")

    def select(self, groups: Sequence[Group]) -> list[Group]:
        """Return the groups without excluded parameters; the others are marked.

        Raises:
          ValueError: no parameter is left.
        """
        return [
            replace(group, parameters=list(map(self._mark, group.parameters)))
            for group in self._exclude_from(groups)
        ]

    def _exclude_from(self, groups: Sequence[Group]) -> list[Group]:
        left = []
        for index, group in enumerate(groups):
            named = group.parameters
            parameters = [p for p in named if not _is_matched(p, self.exclude)]
            if parameters:
                name = f"group {index}"
                left.append(replace(group, parameters=parameters, name=name))
        if not left:
            raise ValueError(
                f"exclude must leave a parameter to clip, got {self.exclude!r}, which "
                "excludes all of them"
            )
        return left

    def _mark(self, named: NamedParameter) -> NamedParameter:
        """Return a parameter that says whether it is scaled and replicated."""
        is_scaled = not self.scale_only or _is_matched(named, self.scale_only)
        named = replace(named, is_scaled=is_scaled)
        if self.replicated is None:
            return named
        return replace(named, is_replicated=_is_matched(named, self.replicated))


def _list_named(groups: Sequence[Group]) -> list[NamedParameter]:
    """Return the parameters of the groups, and all of the modules that hold them."""
    named = {id(p.parameter): p for group in groups for p in group.parameters}
    for module in {id(group.module): group.module for group in groups}.values():
        if module is not None:
            for name, parameter in module.named_parameters():
                named.setdefault(id(parameter), NamedParameter(parameter, name))
    return list(named.values())


def _check_patterns(
    named: Sequence[NamedParameter], patterns: Sequence[Pattern], argument: str
) -> None:
    pairs = [(each.name, each.parameter) for each in named]
    way_out = "pass the model or model.named_parameters()"
    match = partial(matches, separator=".")
    check_patterns_match(patterns, pairs, match, way_out, argument)


def _is_matched(named: NamedParameter, patterns: Iterable[Pattern]) -> bool:
    return any(matches(p, named.name, named.parameter, ".") for p in patterns)
