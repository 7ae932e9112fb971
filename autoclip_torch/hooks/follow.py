"""A clipper of all that an optimizer steps, also of what it is given later."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn

from autoclip_core.clipper.patterns import as_patterns, check_names, matches
from autoclip_torch.observer import Observer
from autoclip_torch.rows.groups import Group, optimizer_groups
from autoclip_torch.step.unwrap import stepped_parameter_ids, unwrap

C = TypeVar("C", bound=Observer)


def clipper_of(
    make: Callable[..., C],
    keywords: Mapping[str, Any],
    optimizer: Any,
    model: nn.Module,
) -> C:
    """Make a clipper of what an optimizer steps, in its groups, named as in the model.

    Args:
      make: a class of clippers, or a function that makes one of groups.
      keywords: what it accepts. `exclude` may name whatever the model has: what another
        optimizer steps, too, and what is frozen as yet.
      optimizer: a torch optimizer, or a wrapper that holds one.
      model: the module whose parameters it steps.

    Raises:
      ValueError: it steps none of them, or `exclude` names nothing in the model.
    """
    optimizer, members = unwrap(optimizer), list(model.named_parameters())
    if stepped_parameter_ids(optimizer).isdisjoint(id(p) for _, p in members):
        raise ValueError(
            f"optimizer must step parameters of the model, got a "
            f"{type(optimizer).__name__} that steps none of them; make it after the "
            "model was moved, wrapped or sharded"
        )
    patterns = as_patterns(keywords.get("exclude"))
    match = partial(matches, separator=".")
    check_names(patterns, members, match, "name those of the model")

    def excluded(name: str | None, parameter: Tensor) -> bool:
        return any(match(pattern, name, parameter) for pattern in patterns)

    groups = optimizer_groups(optimizer, model)
    return make(groups, **{**keywords, "exclude": excluded} if patterns else keywords)


def follow(clipper: Observer, optimizer: Any, model: nn.Module) -> None:
    """Add what the optimizer has been given since; the rows that are there stay."""
    optimizer = unwrap(optimizer)
    known = set(map(id, clipper.parameters))
    if stepped_parameter_ids(optimizer) <= known:
        return
    for group in optimizer_groups(optimizer, model):
        if new := [m for m in group.parameters if id(m.parameter) not in known]:
            clipper.add_param_group(Group(new))
