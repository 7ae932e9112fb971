"""Groups of parameters after the user has removed or replaced some of them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from autoclip_torch.rows.groups import Group, NamedParameter
from autoclip_torch.rows.read import read_groups
from autoclip_torch.rows.rows import ParameterRows


def remove_parameters(groups: Sequence[Group], given: Sequence[Tensor]) -> list[Group]:
    """Return the groups without some parameters.

    Raises:
      ValueError: a parameter is in no group, or none would be left.
    """
    removed = {id(_find(groups, "parameters", parameter)) for parameter in given}
    groups = [
        replace(group, parameters=[p for p in group.parameters if id(p) not in removed])
        for group in groups
    ]
    if not any(group.parameters for group in groups):
        raise ValueError(
            "parameters must be only a part of the clipper's, got all of them; "
            "make another clipper, or call replace_param(old, new)"
        )
    return groups


def replace_parameter(
    groups: Sequence[Group], old: Tensor, new: Tensor
) -> tuple[NamedParameter, list[Group]]:
    """Return the old parameter with its name, and the groups with the new one.

    Raises:
      TypeError: the new parameter is not a tensor.
      ValueError: the old parameter is in no group, or the new one is in a group.
    """
    before = _find(groups, "old", old)
    if not isinstance(new, Tensor):
        raise TypeError(f"new must be a tensor, got {_label(new)}")
    if any(new is named.parameter for group in groups for named in group.parameters):
        raise ValueError(
            "new must be one that the clipper does not have, got one that it has; "
            "call remove_params([old])"
        )
    read_groups([new])  # checks it

    def substitute(each: NamedParameter) -> NamedParameter:
        return replace(each, parameter=new) if each is before else each

    return before, [
        replace(group, parameters=list(map(substitute, group.parameters)))
        for group in groups
    ]


def check_replaces(restarted: Sequence[tuple[ParameterRows, int]]) -> None:
    """Refuse a new parameter with another number of units than the old one.

    Args:
      restarted: the result of `find_restarted`.

    Raises:
      ValueError: a parameter would restart its history.
    """
    for entry, count in restarted:
        raise ValueError(
            f"new must have {count} units like the old one, got "
            f"{entry.count}; call remove_params([old]) and "
            'add_param_group({"params": [new]})'
        )


def _find(groups: Sequence[Group], argument: str, parameter: Tensor) -> NamedParameter:
    """Return a parameter of the clipper, with its name."""
    for group in groups:
        for named in group.parameters:
            if named.parameter is parameter:
                return named
    raise ValueError(
        f"{argument} must be of this clipper, got {_label(parameter)}; "
        "clipper.parameters lists them"
    )


def _label(value: Any) -> str:
    is_tensor = isinstance(value, Tensor)
    shape = f" of shape {tuple(value.shape)}" if is_tensor else ""
    return type(value).__name__ + shape
