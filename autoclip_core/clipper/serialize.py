"""Converts a policy to plain Python and back, for checkpoints and configurations."""

from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from typing import Any

from autoclip_core.checks import format_error
from autoclip_core.policy import Policy, get_arguments


def policy_to_dict(policy: Policy) -> dict[str, Any]:
    """Return a policy as a dict of its type's name and its arguments.

    >>> from autoclip_core import Cap, Fixed
    >>> policy_to_dict(Cap(Fixed(2.0), max_norm=1.0))
    {'type': 'Cap', 'policy': {'type': 'Fixed', 'max_norm': 2.0}, 'max_norm': 1.0}
    """
    saved: dict[str, Any] = {"type": type(policy).__name__}
    for name, value in get_arguments(policy).items():
        saved[name] = _as_plain(value)
    return saved


def _as_plain(value: Any) -> Any:
    """Return a policy as a dict, a tuple as a list, and any other value unchanged."""
    if is_dataclass(value):
        return policy_to_dict(value)  # type: ignore[arg-type]
    if isinstance(value, tuple):
        return [_as_plain(part) for part in value]
    return value


def policy_from_dict(
    saved: Mapping[str, Any], find: Callable[[str], Any | None]
) -> Policy:
    """Return the policy whose dict `policy_to_dict` returned.

    Args:
      saved: the dict.
      find: returns the type with a given name, or None if there is none.

    Raises:
      ValueError: there is no type with the saved name.

    >>> from autoclip_core import Fixed
    >>> policy_from_dict({"type": "Fixed", "max_norm": 2.0}, {"Fixed": Fixed}.get)
    Fixed(max_norm=2.0)
    """
    arguments = {
        name: policy_from_dict(value, find) if isinstance(value, Mapping) else value
        for name, value in saved.items()
        if name != "type"
    }
    kind = find(saved["type"])
    if kind is None:
        rule = "the name of a policy"
        way_out = "register your own policy under its name first"
        raise ValueError(format_error("type", rule, saved["type"], way_out))
    policy: Policy = kind(**arguments)
    return policy
