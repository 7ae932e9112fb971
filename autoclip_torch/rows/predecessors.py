"""Which parameters continue others, after a model or an optimizer has changed."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple

from torch import Tensor

from .groups import Group, NamedParameter
from .read import read_again


def find_predecessors(
    known: Iterable[NamedParameter],
    present: Iterable[NamedParameter],
    places: Mapping[int, Tensor],
) -> dict[int, NamedParameter]:
    """Return which known parameter each present one continues, by id of the latter.

    A known parameter continues itself. A new one continues one that is gone: the one
    with its name. If one of the two has no name, it continues the one at its place.

    Args:
      known: the parameters of a clipper.
      present: those that the model or the optimizer has now.
      places: the result of `find_places`.
    """
    present = list(present)
    present_ids = {id(each.parameter) for each in present}
    continued = {id(each.parameter): each for each in known}
    gone = {key: each for key, each in continued.items() if key not in present_ids}
    new = {id(p.parameter): p for p in present if id(p.parameter) not in continued}
    for key, old in _pair_by_name(gone.values(), new.values()).items():
        continued[key] = old
        del gone[id(old.parameter)], new[key]
    for key, each in new.items():
        at_place = gone.get(id(places.get(key)))
        if at_place is not None and None in (at_place.name, each.name):
            continued[key] = at_place
            del gone[id(at_place.parameter)]
    return {key: each for key, each in continued.items() if key in present_ids}


def _pair_by_name(
    gone: Iterable[NamedParameter], new: Iterable[NamedParameter]
) -> dict[int, NamedParameter]:
    """Return the parameter that had the name of a new one, by id of the latter.

    If several have the same name, those of the same layer belong together.
    """
    old_by_key, new_by_key = _index_by_name(gone), _index_by_name(new)
    return {
        id(each.parameter): old_by_key[key]
        for key, each in new_by_key.items()
        if key in old_by_key
    }


def _index_by_name(
    members: Iterable[NamedParameter],
) -> dict[tuple[str | None, int | None], NamedParameter]:
    """Return the parameters by name and layer, and by name alone if it is unique."""
    pairs = [
        ((each.name, layer), each)
        for each in members
        if each.name is not None
        for layer in (None, id(each.layer))
    ]
    count = Counter(key for key, _ in pairs)
    return {key: each for key, each in pairs if count[key] == 1}


class Present(NamedTuple):
    """The parameters that a clipper has from now on."""

    groups: list[Group]
    predecessors: dict[int, NamedParameter]
    """The result of `find_predecessors`."""
    unknown: list[NamedParameter]
    """The candidates that no group has."""


def find_present(
    groups: Sequence[Group],
    candidates: Iterable[NamedParameter],
    of_optimizer: Sequence[Group] = (),
    places: Mapping[int, Tensor] = MappingProxyType({}),
) -> Present:
    """Return the groups of a clipper with the parameters that exist now.

    A parameter takes the place of its predecessor. A module's other parameters are
    added to the module's group. The groups of an optimizer become the present ones.

    Args:
      groups: the groups of the clipper.
      candidates: the parameters that exist now, those of `of_optimizer` too.
      of_optimizer: the groups that the optimizer has now.
      places: the result of `find_places`.
    """
    known = [named for group in groups for named in group.parameters]
    present = {id(each.parameter): each for each in candidates}
    predecessors = find_predecessors(known, present.values(), places)
    successors = {id(old.parameter): present[key] for key, old in predecessors.items()}
    changed = []
    for group in groups:
        if group.is_of_optimizer:
            continue
        members = [
            replace(old, parameter=successors[id(old.parameter)].parameter)
            for old in group.parameters
            if id(old.parameter) in successors
        ]
        group = _update_group(group, members, present, predecessors)
        present = _leave_out(present, group)
        changed.append(group)
    if any(group.is_of_optimizer for group in groups):
        of_optimizer = [_keep_only(g, present, predecessors) for g in of_optimizer]
        for group in of_optimizer:
            present = _leave_out(present, group)
        changed = [*of_optimizer, *changed]
    return Present(changed, predecessors, list(present.values()))


def _leave_out(
    candidates: Mapping[int, NamedParameter], group: Group
) -> dict[int, NamedParameter]:
    """Return the candidates that a group does not have, by id of the parameter."""
    ids = {id(each.parameter) for each in group.parameters}
    return {key: each for key, each in candidates.items() if key not in ids}


def _update_group(
    group: Group,
    members: list[NamedParameter],
    candidates: Mapping[int, NamedParameter],
    predecessors: Mapping[int, NamedParameter],
) -> Group:
    """Return a group with new members, and with those that its module also has."""
    if group.module is None:
        return replace(group, parameters=members)
    (again,) = read_again([group])
    ids = {id(each.parameter) for each in members}
    fresh = [
        each
        for each in again.parameters
        if (key := id(each.parameter)) in ids
        or (key in candidates and key not in predecessors)
    ]
    names = {id(each.parameter) for each in fresh}
    others = [each for each in members if id(each.parameter) not in names]
    return replace(group, parameters=[*fresh, *others])


def _keep_only(
    group: Group,
    candidates: Mapping[int, NamedParameter],
    predecessors: Mapping[int, NamedParameter],
) -> Group:
    """Return a group of an optimizer; a new parameter may have its name from before."""
    members = []
    for named in group.parameters:
        key = id(named.parameter)
        old = predecessors.get(key)
        if key not in candidates:
            continue
        if named.name is None and old is not None:
            named = replace(named, name=old.name, layer=named.layer or old.layer)
        members.append(named)
    return replace(group, parameters=members)
