"""Which gradient belongs to which row, and which rows to which policy."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from autoclip_core import Policy
from autoclip_core.checks import format_error
from autoclip_core.clipper.units import Units, unit_count

from .groups import Group, Member
from .spans import Spans


@dataclass(frozen=True)
class Slot:
    """One parameter and the rows its gradient belongs to."""

    parameter: torch.Tensor
    name: str | None
    start: int
    """Its first row."""
    stop: int
    """One more than its last row; at scope "global" and "group" rows are shared."""
    units: Units | None = None
    """How it is cut, at scope "unit", if into more than one."""


@dataclass(frozen=True)
class Band:
    """Contiguous rows under one policy: one call of `decide`."""

    policy: Policy
    start: int
    stop: int


@dataclass(frozen=True)
class Rows:
    """All rows of a model, those of one policy side by side."""

    slots: list[Slot]
    bands: list[Band]
    names: list[str]
    """One per row, no two the same."""
    scope: str
    """Which gradients share a row."""

    @property
    def parameters(self) -> list[torch.Tensor]:
        """Every parameter once, in the order of the slots."""
        return [slot.parameter for slot in self.slots]

    @cached_property
    def spans(self) -> Spans:
        """Which rows each slot has, as arrays."""
        return Spans((slot.start, slot.stop) for slot in self.slots)


def make_rows(
    groups: Sequence[Group],
    scope: str,
    policy_of: Callable[[dict[str, Any]], Policy],
    units_of: Callable[[Member], Units],
) -> Rows:
    """Cut the parameters into rows.

    Args:
      groups: the parameters.
      scope: "global" (one row), "group", "parameter" or "unit".
      policy_of: the policy of a group, by what its dict says beside "params".
      units_of: how a parameter is cut, at scope "unit".

    Raises:
      ValueError: a group has a policy of its own where all share one row.
    """
    if scope == "global":
        _refuse_overrides(groups)
    policies = [policy_of(group.overrides) for group in groups]
    if scope == "global":
        members = [member for group in groups for member in group.members]
        groups = [Group(members, name="global")]
        policies = policies[:1]
    slots: list[Slot] = []
    bands: list[Band] = []
    names: list[str] = []
    for policy in dict.fromkeys(policies):
        first = len(names)
        for group, own in zip(groups, policies, strict=True):
            if own == policy:
                _add_group(slots, names, group, scope, units_of)
        bands.append(Band(policy, first, len(names)))
    return Rows(slots, bands, _distinct(names), scope)


def _refuse_overrides(groups: Sequence[Group]) -> None:
    for group in groups:
        if group.overrides:
            rule = 'without settings of its own at scope="global", which is one row'
            way_out = 'choose scope="group", or make a clipper for each group'
            raise ValueError(format_error("a group", rule, group.overrides, way_out))


def _distinct(names: list[str]) -> list[str]:
    """Return the names, with its number where a row shares its name with another."""
    count = Counter(names)
    return [
        f"{name} (row {row})" if count[name] > 1 else name
        for row, name in enumerate(names)
    ]


def _add_group(
    slots: list[Slot],
    names: list[str],
    group: Group,
    scope: str,
    units_of: Callable[[Member], Units],
) -> None:
    """Add a group's slots and the names of their rows."""
    start, units = len(names), None
    if scope in ("group", "global"):
        names.append(group.name)
    for member in group.members:
        name = member.name or f"parameter {len(slots)}"
        if scope == "parameter":
            start = len(names)
            names.append(name)
        elif scope == "unit":
            start, units = len(names), units_of(member)
            count = unit_count(member.parameter.shape, units)
            names.extend(
                [name] if count == 1 else [f"{name}[{i}]" for i in range(count)]
            )
            if count == 1:
                units = None
        slots.append(Slot(member.parameter, member.name, start, len(names), units))
