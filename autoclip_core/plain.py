"""A policy as plain Python, for checkpoints and configurations."""

from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

from .policy import Policy, arguments


def policy_to_plain(policy: Policy) -> dict[str, Any]:
    """Return a policy as its type's name and its arguments.

    >>> from autoclip_core import Cap, Fixed
    >>> policy_to_plain(Cap(Fixed(2.0), max_norm=1.0))
    {'type': 'Cap', 'policy': {'type': 'Fixed', 'max_norm': 2.0}, 'max_norm': 1.0}
    """
    plain: dict[str, Any] = {"type": type(policy).__name__}
    for name, value in arguments(policy).items():
        plain[name] = policy_to_plain(value) if is_dataclass(value) else value  # type: ignore[arg-type]
    return plain


def policy_from_plain(plain: Mapping[str, Any], types: Mapping[str, Any]) -> Policy:
    """Return the policy that `policy_to_plain` described.

    Args:
      plain: the description.
      types: the policies that may be made, by the names of their types.

    Raises:
      ValueError: a type has another name.

    >>> from autoclip_core import Fixed
    >>> policy_from_plain({"type": "Fixed", "max_norm": 2.0}, {"Fixed": Fixed})
    Fixed(max_norm=2.0)
    """
    given = {
        name: policy_from_plain(value, types) if isinstance(value, Mapping) else value
        for name, value in plain.items()
        if name != "type"
    }
    if plain["type"] not in types:
        raise ValueError(
            f"the policy's type must be one of {', '.join(sorted(types))}, got "
            f"{plain['type']!r}; register a policy of your own under its name"
        )
    policy: Policy = types[plain["type"]](**given)
    return policy
