"""Read the first argument of a clipper: parameters, names and groups."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from inspect import GEN_SUSPENDED, getgeneratorstate, isgenerator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from .groups import Group, NamedParameter, refuse_shared

ParametersLike = Any
"""A module, an optimizer, or an iterable of parameters, of pairs or of group dicts."""


def read_groups(given: ParametersLike) -> list[Group]:
    """Read the first argument of a clipper.

    Raises:
      TypeError: the type of the argument is not supported.
      ValueError: the argument holds no parameter, a parameter that can have no
        gradient, or the same parameter in two groups.
    """
    items = _as_list(given)
    if items and all(isinstance(item, Group) for item in items):
        return items
    if items and all(isinstance(item, dict) for item in items):
        groups = [_read_group(item) for item in items]
    else:
        module = given if isinstance(given, nn.Module) else None
        groups = [Group(_read_parameters(given, items), module=module)]
    if isinstance(given, torch.optim.Optimizer):
        groups = [replace(group, is_of_optimizer=True) for group in groups]
    refuse_shared(groups)
    return groups


def read_parameters(given: ParametersLike) -> list[Tensor]:
    """Return the parameters of all groups; the rules are those of `read_groups`."""
    return [each.parameter for group in read_groups(given) for each in group.parameters]


def read_optimizer_groups(
    optimizer: torch.optim.Optimizer, model: nn.Module | None
) -> list[Group]:
    """Return an optimizer's groups, with names and layers if a model is given."""
    groups = read_groups(optimizer)
    if model is None:
        return groups
    # Other parameters of the model are not checked: they may be quantized or lazy.
    names = {id(p): name for name, p in model.named_parameters()}
    layers = _find_layers(model)

    def name_as_in_model(named: NamedParameter) -> NamedParameter:
        parameter, key = named.parameter, id(named.parameter)
        return NamedParameter(parameter, names.get(key, named.name), layers.get(key))

    return [
        replace(
            group,
            parameters=list(map(name_as_in_model, group.parameters)),
            module=model,
        )
        for group in groups
    ]


def read_again(groups: Sequence[Group]) -> list[Group]:
    """Return groups with the parameters that their modules have now."""
    return [
        group
        if group.module is None or group.is_of_optimizer
        else replace(group, parameters=_list_present(group.module))
        for group in groups
    ]


def _list_present(module: nn.Module) -> list[NamedParameter]:
    items = _as_list(module)
    return _read_parameters(module, items) if items else []


def _as_list(given: ParametersLike) -> list[Any]:
    """Return the argument as a list. It is iterated once, so a generator works."""
    if isinstance(given, nn.Module):
        return list(given.named_parameters())
    if isinstance(given, torch.optim.Optimizer):
        # Empty groups are common: no decay, nothing frozen.
        return [keep_params(g) for g in given.param_groups if g["params"]]
    if isinstance(given, torch.Tensor | dict):
        return [given]
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(
            "parameters must be a module, an optimizer, or an iterable of parameters, "
            "of (name, parameter) pairs or of group dicts, got "
            f"{type(given).__name__}; pass model.parameters() or the model"
        )
    if isgenerator(given) and getgeneratorstate(given) == GEN_SUSPENDED:
        raise ValueError(
            "parameters must be a generator that was not read before, got one whose "
            "first parameters are gone, as after next(); pass the model or a list"
        )
    return list(given)


def keep_params(group: dict[str, Any]) -> dict[str, Any]:
    """Return an optimizer's group without its own settings, such as lr and eps."""
    names = group.get("param_names")
    if names is None:
        return {"params": group["params"]}
    return {"params": list(zip(names, group["params"], strict=True))}


def _read_group(item: dict[str, Any]) -> Group:
    if "params" not in item:
        raise ValueError(
            f'a group must have the key "params", got the keys {sorted(item)}; '
            'write {"params": module.parameters(), ...}'
        )
    overrides = {key: value for key, value in item.items() if key != "params"}
    given = item["params"]
    module = given if isinstance(given, nn.Module) else None
    return Group(_read_parameters(given, _as_list(given)), overrides, module=module)


def _read_parameters(given: ParametersLike, items: list[Any]) -> list[NamedParameter]:
    """Return each parameter once: tied parameters share one gradient.

    Frozen parameters of integers, such as quantized weights, can have no gradient. They
    are ignored, unless there is no other parameter.
    """
    layers = _find_layers(given) if isinstance(given, nn.Module) else {}
    pairs = list(map(_as_pair, items))
    has_others = not all(_is_integer_parameter(item) for _, item in pairs)
    parameters: dict[int, NamedParameter] = {}
    for index, (name, parameter) in enumerate(pairs):
        if has_others and _is_integer_parameter(parameter):
            continue
        _check_parameter(index, name, parameter)
        layer = layers.get(id(parameter))
        parameters.setdefault(id(parameter), NamedParameter(parameter, name, layer))
    if not parameters:
        raise ValueError(
            "parameters must hold at least one parameter, got none; a generator such "
            "as model.parameters() can be read only once: call it again, or pass a "
            "list or the model"
        )
    return list(parameters.values())


def _as_pair(item: Any) -> tuple[Any, Any]:
    if not isinstance(item, tuple):
        return None, item
    if len(item) != 2:
        raise TypeError(f"a pair must be (name, parameter), got {len(item)} items")
    return item


def _find_layers(module: nn.Module) -> dict[int, nn.Module]:
    """Return each parameter's layer: the first module that holds or computes it."""
    layers: dict[int, nn.Module] = {}
    for layer in module.modules():
        for parameter in layer.parameters(recurse=False):
            layers.setdefault(id(parameter), layer)
        if is_parametrized(layer):  # such as weight_norm: the originals are elsewhere
            parametrizations: Any = layer.parametrizations
            for originals in parametrizations.values():
                for parameter in originals.parameters(recurse=False):
                    layers.setdefault(id(parameter), layer)
    return layers


def _is_integer_parameter(item: Any) -> bool:
    """Return whether an item is a parameter that can have no gradient."""
    is_parameter = isinstance(item, nn.Parameter)
    return is_parameter and not (item.is_floating_point() or item.is_complex())


def _check_parameter(index: int, name: Any, parameter: Any) -> None:
    label = f"parameter {index}" if name is None else f"parameter {name!r}"
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
