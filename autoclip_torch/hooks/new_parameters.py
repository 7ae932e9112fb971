"""Keep a clipper up to date with an optimizer that gets parameters later."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn

from autoclip_core.clipper.patterns import as_patterns, check_patterns_match, matches
from autoclip_torch.observer import Observer
from autoclip_torch.rows.groups import Group, read_optimizer_groups
from autoclip_torch.step.unwrap import stepped_parameter_ids, unwrap

C = TypeVar("C", bound=Observer)


def make_clipper(
    make: Callable[..., C],
    keywords: Mapping[str, Any],
    optimizer: Any,
    model: nn.Module,
) -> C:
    """Create a clipper of the optimizer's groups, with the names of the model.

    Args:
      make: a class of clippers, or a function that takes groups and returns a clipper.
      keywords: the keywords of `make`. `exclude` may name any parameter of the model,
        also if another optimizer steps it or if it is still frozen.
      optimizer: a torch optimizer, or a wrapper that holds one.
      model: the module whose parameters the optimizer steps.

    Raises:
      ValueError: the optimizer steps no parameter of the model, or `exclude` matches
        no parameter of the model.
    """
    optimizer, parameters = unwrap(optimizer), list(model.named_parameters())
    if stepped_parameter_ids(optimizer).isdisjoint(id(p) for _, p in parameters):
        raise ValueError(
            f"optimizer must step parameters of the model, got a "
            f"{type(optimizer).__name__} that steps none of them; make it after the "
            "model was moved, wrapped or sharded"
        )
    patterns = as_patterns(keywords.get("exclude"))
    match = partial(matches, separator=".")
    check_patterns_match(patterns, parameters, match, "name those of the model")

    def is_excluded(name: str | None, parameter: Tensor) -> bool:
        return any(match(pattern, name, parameter) for pattern in patterns)

    if patterns:
        keywords = {**keywords, "exclude": is_excluded}
    return make(read_optimizer_groups(optimizer, model), **keywords)


def add_new_parameters(clipper: Observer, optimizer: Any, model: nn.Module) -> None:
    """Add parameters that the optimizer got later; present rows keep their state."""
    optimizer = unwrap(optimizer)
    known = set(map(id, clipper.parameters))
    if stepped_parameter_ids(optimizer) <= known:
        return
    for group in read_optimizer_groups(optimizer, model):
        if new := [p for p in group.parameters if id(p.parameter) not in known]:
            clipper.add_param_group(Group(new))
