"""How a clipper cuts its parameters into rows, which stays the same during a run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from autoclip_core import Policy
from autoclip_core.clipper.settings import PolicyBounds
from autoclip_core.clipper.units import Units
from autoclip_core.policy import check_policy

from .groups import Group, NamedParameter
from .rows import Rows, make_rows
from .selection import Selection
from .settings import check_keys


def choose_group_policy(policy: Policy, overrides: dict[str, Any]) -> Policy:
    """Return the policy of a group: its own, or else that of the clipper.

    Args:
      policy: that of the clipper.
      overrides: the entries of the group dict other than "params".

    Raises:
      TypeError, ValueError: the group has another key, or its policy is none.
    """
    check_keys(overrides, ["policy"])
    policy = overrides.get("policy", policy)
    check_policy(policy)
    return policy


@dataclass(frozen=True)
class RowRules:
    """The arguments of a clipper that say which gradients share a row, and its policy.

    The functions are those of the clipper's class. They do not refer to the clipper.
    """

    policy: Policy
    """The policy of all groups that do not set their own."""
    scope: str
    norm: str
    selection: Selection
    bounds: PolicyBounds
    """The warm-up, the floor and the cap of each policy."""
    make_group_policy: Callable[[Policy, dict[str, Any]], Policy]
    """`choose_group_policy`; named clippers take the arguments of a policy instead."""
    find_units: Callable[[NamedParameter], Units]
    """It returns how a parameter is cut at scope "unit"."""

    def make_rows(self, groups: Sequence[Group]) -> Rows:
        """Return the rows of the parameters that are not excluded."""

        def policy_of(overrides: dict[str, Any]) -> Policy:
            return self.bounds.apply(self.make_group_policy(self.policy, overrides))

        return make_rows(
            self.selection.select(groups),
            self.scope,
            policy_of,
            self.find_units,
            scales_all=not self.selection.scale_only,
            norm=self.norm,
        )
