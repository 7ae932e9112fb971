"""Which gradient belongs to which row, and which row belongs to which policy."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from autoclip_core import Policy
from autoclip_core.checks import format_error
from autoclip_core.clipper.norms import to_rms
from autoclip_core.clipper.units import Units, name_units

from .groups import Group, NamedParameter
from .row_index import RowIndex


@dataclass(frozen=True)
class ParameterRows:
    """One parameter and the range of rows of its gradient."""

    parameter: torch.Tensor
    name: str | None
    start: int
    """Its first row."""
    stop: int
    """One more than its last row. At scope "global" and "group" rows are shared."""
    units: Units | None = None
    """How it is cut at scope "unit", if it has more than one unit."""
    is_scaled: bool = True
    """Whether clipping scales it; a row that is removed is removed in any case."""
    is_replicated: bool | None = None
    """Whether every rank of the process group holds it; None if nothing says so."""

    @property
    def count(self) -> int:
        """How many rows it has."""
        return self.stop - self.start

    @property
    def size(self) -> int:
        """The number of its elements in each of its rows."""
        return self.parameter.numel() // max(1, self.count)


@dataclass(frozen=True)
class PolicyRows:
    """Consecutive rows that share a policy: one call of `decide`."""

    policy: Policy
    start: int
    stop: int

    @property
    def count(self) -> int:
        """How many rows they are."""
        return self.stop - self.start


@dataclass(frozen=True)
class Rows:
    """All rows of a clipper. Rows that share a policy are consecutive."""

    by_parameter: list[ParameterRows]
    by_policy: list[PolicyRows]
    names: list[str]
    """One name per row; no two are equal."""
    scope: str
    """Which gradients share a row."""
    ranges: dict[int, int]
    """The ranges of rows that parameters have, in order: first row to length."""
    scales_all: bool
    """Whether clipping scales every parameter. Without `scale_only` it does."""
    norm: str = "l2"
    """The norm of a row: "l2", "rms" or "max"."""

    @property
    def parameters(self) -> list[torch.Tensor]:
        """Every clipped parameter, in the order of `by_parameter`."""
        return [entry.parameter for entry in self.by_parameter]

    @cached_property
    def index(self) -> RowIndex:
        """The rows of each parameter, as arrays."""
        pairs = ((entry.start, entry.stop) for entry in self.by_parameter)
        return RowIndex(pairs, self.ranges)

    def count_elements(self, tensors: Sequence[Any]) -> dict[int, int]:
        """Return the number of elements of each row: the first row of a range to it.

        A parameter without a tensor does not count.
        """
        sizes = dict.fromkeys(self.ranges, 0)
        for entry, tensor in zip(self.by_parameter, tensors, strict=True):
            if tensor is not None:
                sizes[entry.start] += entry.size
        return sizes

    def to_rms(self, norms: Any, sizes: Any) -> Any:
        """Return l2 norms as rms norms: `n / sqrt(N)` for N elements.

        Args:
          norms: an array or a tensor of shape (rows,).
          sizes: the number of elements of each row, of the same kind as `norms`; or
            what `count_elements` returned.
        """
        is_numpy = isinstance(norms, np.ndarray)
        if not isinstance(sizes, dict):
            return to_rms(norms, sizes, np if is_numpy else torch)
        if is_numpy:
            return to_rms(norms, self.repeat(sizes))
        # The divisors are arguments of a kernel. A copy to a device would synchronize.
        divisors = [math.sqrt(max(size, 1)) for size in sizes.values()]
        parts = torch.split(norms, [*self.ranges.values()])
        return torch.cat(torch._foreach_div(parts, divisors))

    def repeat(self, numbers: dict[int, int]) -> np.ndarray[Any, Any]:
        """Return a number of each range of rows once for each of its rows."""
        return np.repeat([*numbers.values()], [*self.ranges.values()])


def make_rows(
    groups: Sequence[Group],
    scope: str,
    policy_of: Callable[[dict[str, Any]], Policy],
    units_of: Callable[[NamedParameter], Units],
    scales_all: bool = True,
    norm: str = "l2",
) -> Rows:
    """Cut the parameters into rows.

    Args:
      groups: the parameters.
      scope: "global" (one row), "group", "parameter" or "unit".
      policy_of: returns the policy of a group from the overrides in its dict.
      units_of: returns how a parameter is cut at scope "unit".
      scales_all: whether clipping scales every parameter, also on other ranks.
      norm: the norm of each row.

    Raises:
      ValueError: a group overrides the policy, although all groups share one row.
    """
    if scope == "global":
        _refuse_overrides(groups)
        parameters = [named for group in groups for named in group.parameters]
        groups = [Group(parameters, name="global")]
    policies = [policy_of(group.overrides) for group in groups]
    by_parameter: list[ParameterRows] = []
    by_policy: list[PolicyRows] = []
    names: list[str] = []
    for policy in dict.fromkeys(policies):
        first = len(names)
        for group, group_policy in zip(groups, policies, strict=True):
            if group_policy == policy:
                _add_group(by_parameter, names, group, scope, units_of)
        by_policy.append(PolicyRows(policy, first, len(names)))
    # Parameters are in the order of their rows.
    ranges = {entry.start: entry.count for entry in by_parameter}
    names = _make_unique(names)
    return Rows(by_parameter, by_policy, names, scope, ranges, scales_all, norm)


def split_rows(rows: Rows) -> Rows:
    """Return two parts of each row: first what is scaled of all rows, then the rest.

    Without `scale_only`, the rows are returned as they are. With it, this rank may have
    only one part of a row, and another rank the other part.
    """
    if rows.scales_all:
        return rows
    count = len(rows.names)
    by_parameter = [
        entry
        if entry.is_scaled
        else replace(entry, start=entry.start + count, stop=entry.stop + count)
        for entry in rows.by_parameter
    ]
    names = [*rows.names, *(f"rest of {name}" for name in rows.names)]
    rest = {start + count: length for start, length in rows.ranges.items()}
    return replace(
        rows, by_parameter=by_parameter, names=names, ranges=rows.ranges | rest
    )


def _refuse_overrides(groups: Sequence[Group]) -> None:
    for group in groups:
        if group.overrides:
            rule = 'without settings of its own at scope="global", which is one row'
            way_out = (
                'for one norm, give the model, or groups with only "params"; '
                'scope="group" has a norm and settings for each group'
            )
            raise ValueError(format_error("a group", rule, group.overrides, way_out))


def _make_unique(names: list[str]) -> list[str]:
    """Return the names; the row number is added to names that occur twice."""
    count = Counter(names)
    return [f"{n} (row {i})" if count[n] > 1 else n for i, n in enumerate(names)]


def _add_group(
    by_parameter: list[ParameterRows],
    names: list[str],
    group: Group,
    scope: str,
    units_of: Callable[[NamedParameter], Units],
) -> None:
    """Append the rows of a group's parameters, and the names of the rows."""
    start, units = len(names), None
    if scope in ("group", "global"):
        names.append(group.name)
    for named in group.parameters:
        name = named.name or f"parameter {len(by_parameter)}"
        if scope == "parameter":
            start = len(names)
            names.append(name)
        elif scope == "unit":
            start, units = len(names), units_of(named)
            names.extend(name_units(name, named.parameter.shape, units))
            if len(names) - start == 1:
                units = None
        rows = start, len(names), units, named.is_scaled, named.is_replicated
        by_parameter.append(ParameterRows(named.parameter, named.name, *rows))
