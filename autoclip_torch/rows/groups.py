"""What a clipper was given: parameters, their names, their groups, their units."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from autoclip_core.clipper import units
from autoclip_core.clipper.patterns import Pattern, check_names, matches
from autoclip_core.clipper.units import Units

Given = Any
"""A module, an optimizer, or an iterable of parameters, named ones or group dicts."""


@dataclass(frozen=True)
class Member:
    """One parameter of a group."""

    parameter: torch.Tensor
    name: str | None
    layer: nn.Module | None = None
    """The module that owns the parameter, where a module was given."""


@dataclass
class Group:
    """Parameters that share one policy."""

    members: list[Member]
    overrides: dict[str, Any] = field(default_factory=dict)
    """What a group dict said beside "params"."""
    name: str = "group 0"
    """What its row is called; it stays where another group is excluded."""


def read_groups(given: Given) -> list[Group]:
    """Read the first argument of a clipper.

    Raises:
      TypeError: it is none of what is accepted.
      ValueError: it holds no parameter, one that has no gradient of its own, or the
        same one in two groups.
    """
    items = _items(given)
    if items and all(isinstance(item, Group) for item in items):
        return items
    if items and all(isinstance(item, dict) for item in items):
        groups = [_group(item) for item in items]
    else:
        groups = [Group(_members(given, items))]
    refuse_shared(groups)
    return groups


def optimizer_groups(
    optimizer: torch.optim.Optimizer, model: nn.Module | None
) -> list[Group]:
    """Return an optimizer's groups, with names and layers if there is a model."""
    groups = read_groups(optimizer)
    if model is None:
        return groups
    # What the optimizer does not step is none of ours: it may be quantized or lazy.
    names = {id(p): name for name, p in model.named_parameters()}
    layers = _layers(model)
    return [
        Group([_found(m, names, layers) for m in group.members]) for group in groups
    ]


def _found(
    member: Member, names: dict[int, str], layers: dict[int, nn.Module]
) -> Member:
    """Return a member under the name and in the layer that a model has it."""
    key = id(member.parameter)
    return Member(member.parameter, names.get(key, member.name), layers.get(key))


def check_patterns(groups: Sequence[Group], patterns: Sequence[Pattern]) -> None:
    """Refuse a pattern that cannot be meant.

    Raises:
      ValueError: the parameters have no names, or none has this one.
    """
    members = [(m.name, m.parameter) for group in groups for m in group.members]
    way_out = "pass the model or model.named_parameters()"
    check_names(patterns, members, partial(matches, separator="."), way_out)


def exclude_from(groups: Sequence[Group], patterns: Iterable[Pattern]) -> list[Group]:
    """Return the groups without the parameters that a pattern names.

    Raises:
      ValueError: no parameter is left.
    """
    patterns = list(patterns)
    left = [
        Group(
            [m for m in group.members if not _excluded(m, patterns)],
            group.overrides,
            f"group {index}",
        )
        for index, group in enumerate(groups)
    ]
    if not any(group.members for group in left):
        raise ValueError(
            f"exclude must leave a parameter to clip, got {patterns!r}, which excludes "
            "all of them"
        )
    return [group for group in left if group.members]


def _excluded(member: Member, patterns: Iterable[Pattern]) -> bool:
    return any(matches(p, member.name, member.parameter, ".") for p in patterns)


def refuse_shared(groups: Sequence[Group]) -> None:
    """Refuse a parameter that is in two groups.

    Raises:
      ValueError: it is; it would be measured and scaled twice.
    """
    owner: dict[int, int] = {}
    for index, group in enumerate(groups):
        for member in group.members:
            if owner.setdefault(id(member.parameter), index) != index:
                label = member.name or f"of shape {tuple(member.parameter.shape)}"
                raise ValueError(
                    f"a parameter must be in one group, got {label} in groups "
                    f"{owner[id(member.parameter)]} and {index}; list it once, or it "
                    "would be scaled twice"
                )


def units_of(member: Member) -> Units:
    """Return the parameter's output units, by the kind of its layer where it is known.

    | layer                                  | a unit is                         |
    |----------------------------------------|-----------------------------------|
    | Linear, Bilinear, Conv, Embedding, RNN | each index of axis 0              |
    | MultiheadAttention                     | each index of axis 0              |
    | ConvTranspose                          | each output channel (axis 1)      |
    | LayerNorm, RMSNorm, PReLU, any vector  | the whole parameter               |
    | unknown                                | each index of axis 0              |
    """
    shape = tuple(member.parameter.shape)
    layer = member.layer
    # Of what weight_norm makes the weight of, the magnitudes have another shape.
    if isinstance(layer, _Transposed) and shape[:2] == (
        layer.in_channels,
        layer.out_channels // layer.groups,
    ):
        return units.transposed_conv_units(shape, layer.groups)
    if isinstance(layer, _GAINS):
        return units.one_unit(shape)
    return units.units_along_axis(shape, 0)


_Transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_GAINS = (nn.LayerNorm, nn.RMSNorm, nn.PReLU)


def _items(given: Given) -> list[Any]:
    """Return what was given as a list; an iterable is read once, as a generator is."""
    if isinstance(given, nn.Module):
        return list(given.named_parameters())
    if isinstance(given, torch.optim.Optimizer):
        groups = given.param_groups  # an empty one is usual: no decay, nothing frozen
        return [params_only(group) for group in groups if group["params"]]
    if isinstance(given, torch.Tensor | dict):
        return [given]
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(
            "parameters must be a module, an optimizer, or an iterable of parameters, "
            "of (name, parameter) pairs or of group dicts, got "
            f"{type(given).__name__}; pass model.parameters() or the model"
        )
    return list(given)


def params_only(group: dict[str, Any]) -> dict[str, Any]:
    """Return an optimizer's group without lr, eps and the like: never ours to read."""
    names = group.get("param_names")
    if names is None:
        return {"params": group["params"]}
    return {"params": list(zip(names, group["params"], strict=True))}


def _group(item: dict[str, Any]) -> Group:
    if "params" not in item:
        raise ValueError(
            f'a group must have the key "params", got the keys {sorted(item)}; '
            'write {"params": module.parameters(), ...}'
        )
    overrides = {key: value for key, value in item.items() if key != "params"}
    return Group(_members(item["params"], _items(item["params"])), overrides)


def _members(given: Given, items: list[Any]) -> list[Member]:
    """Return the members, each parameter once: tied ones share one gradient."""
    layers = _layers(given) if isinstance(given, nn.Module) else {}
    members: dict[int, Member] = {}
    for place, item in enumerate(items):
        name, parameter = _named(item)
        _check_parameter(place, name, parameter)
        layer = layers.get(id(parameter))
        members.setdefault(id(parameter), Member(parameter, name, layer))
    if not members:
        raise ValueError(
            "parameters must hold at least one parameter, got none; a generator such "
            "as model.parameters() can be read only once: call it anew, or pass a list "
            "or the model"
        )
    return list(members.values())


def _named(item: Any) -> tuple[Any, Any]:
    if not isinstance(item, tuple):
        return None, item
    if len(item) != 2:
        raise TypeError(f"a pair must be (name, parameter), got {len(item)} things")
    return item


def _layers(module: nn.Module) -> dict[int, nn.Module]:
    """Return each parameter's own layer: the first module that holds or makes it."""
    layers: dict[int, nn.Module] = {}
    for layer in module.modules():
        for parameter in layer.parameters(recurse=False):
            layers.setdefault(id(parameter), layer)
        if is_parametrized(layer):  # such as weight_norm: it holds what it is made of
            lists: Any = layer.parametrizations
            for originals in lists.values():
                for parameter in originals.parameters(recurse=False):
                    layers.setdefault(id(parameter), layer)
    return layers


def _check_parameter(place: int, name: Any, parameter: Any) -> None:
    label = f"parameter {place}" if name is None else f"parameter {name!r}"
    if name is not None and not isinstance(name, str):
        types = f"({type(name).__name__}, {type(parameter).__name__})"
        raise TypeError(f"a pair must be (name, parameter), got {types}; swap the two")
    if not isinstance(parameter, torch.Tensor):
        raise TypeError(
            f"{label} must be a tensor, got {type(parameter).__name__}; groups cannot "
            "be mixed with parameters"
        )
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        raise ValueError(
            f"{label} must be initialized, got a lazy parameter without a shape; run "
            "one batch through the model first"
        )
    if not parameter.is_leaf:
        raise ValueError(
            f"{label} must be a leaf tensor, got the result of an operation, whose "
            ".grad is never filled; pass the parameters themselves"
        )
    if not (parameter.is_floating_point() or parameter.is_complex()):
        raise ValueError(
            f"{label} must be of a floating-point or complex type, got "
            f"{parameter.dtype}, which has no gradient; leave it out"
        )
