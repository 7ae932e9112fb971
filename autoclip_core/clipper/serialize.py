"""A policy as plain Python, for checkpoints and configurations."""

from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from typing import Any

from autoclip_core.checks import format_error
from autoclip_core.policy import Policy, get_arguments


def policy_to_dict(policy: Policy) -> dict[str, Any]:
    """Return a policy as its type's name and its arguments.

    >>> from autoclip_core import Cap, Fixed
    >>> policy_to_dict(Cap(Fixed(2.0), max_norm=1.0))
    {'type': 'Cap', 'policy': {'type': 'Fixed', 'max_norm': 2.0}, 'max_norm': 1.0}
    """
    plain: dict[str, Any] = {"type": type(policy).__name__}
    for name, value in get_arguments(policy).items():
        plain[name] = policy_to_dict(value) if is_dataclass(value) else value  # type: ignore[arg-type]
    return plain


def policy_from_dict(
    plain: Mapping[str, Any], find: Callable[[str], Any | None]
) -> Policy:
    """Return the policy that `policy_to_dict` described.

    Args:
      plain: the description.
      find: from the name of a type to the type, or to None where there is none.

    Raises:
      ValueError: there is no such type.

    >>> from autoclip_core import Fixed
    >>> policy_from_dict({"type": "Fixed", "max_norm": 2.0}, {"Fixed": Fixed}.get)
    Fixed(max_norm=2.0)
    """
    given = {
        name: policy_from_dict(value, find) if isinstance(value, Mapping) else value
        for name, value in plain.items()
        if name != "type"
    }
    kind = find(plain["type"])
    if kind is None:
        rule = "the name of a policy"
        way_out = "register a policy of your own under its name first"
        raise ValueError(format_error("type", rule, plain["type"], way_out))
    policy: Policy = kind(**given)
    return policy
