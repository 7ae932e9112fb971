"""Read what an optimizer steps for its clipper; warn of what no clipper has."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from autoclip_core.clipper.patterns import (
    Pattern,
    as_patterns,
    check_patterns_match,
    matches,
)
from autoclip_torch.rows.groups import Group, NamedParameter
from autoclip_torch.rows.read import read_optimizer_groups
from autoclip_torch.step.unwrap import stepped_parameter_ids, unwrap
from autoclip_torch.step.warn import warn


def read_arguments(
    optimizers: Sequence[Any], model: nn.Module | None, keywords: Mapping[str, Any]
) -> tuple[list[Group], dict[str, Any]]:
    """Return the groups that optimizers step, and the keywords of their clipper.

    Args:
      optimizers: torch optimizers, or wrappers that hold one. Their groups follow each
        other.
      model: the module whose parameters they step. With None, the parameters have the
        names that the optimizers know, if any.
      keywords: the keywords of a clipper. `exclude` and `scale_only` may name any
        parameter of the model, also if another optimizer steps it or if it is still
        frozen.

    Raises:
      ValueError: an optimizer steps no parameter of the model, or a pattern matches
        no parameter of the model.
    """
    optimizers = list(map(unwrap, optimizers))
    groups = [g for each in optimizers for g in read_optimizer_groups(each, model)]
    if model is None:
        members = [member for group in groups for member in group.parameters]
        parameters: list[Any] = [(m.name, m.parameter) for m in members]
    else:
        parameters = list(model.named_parameters())
    for each in optimizers:
        if stepped_parameter_ids(each).isdisjoint(id(p) for _, p in parameters):
            raise ValueError(
                f"optimizer must step parameters of the model, got a "
                f"{type(each).__name__} that steps none of them; make it after the "
                "model was moved, wrapped or sharded; if each layer has an optimizer "
                "that steps within the backward pass, attach a clipper to each of them"
            )
    functions = {
        argument: _join_patterns(keywords[argument], argument, parameters)
        for argument in ("exclude", "scale_only")
        if keywords.get(argument)
    }
    return groups, {**keywords, **functions}


def _join_patterns(
    given: Any, argument: str, parameters: Sequence[tuple[str, Tensor]]
) -> Callable[[str | None, Tensor], bool]:
    """Return a function that says whether a pattern of the argument matches."""
    patterns, match = as_patterns(given, argument), partial(matches, separator=".")
    way_out = "name those of the model"
    check_patterns_match(patterns, parameters, match, way_out, argument)
    return _PatternMatch(patterns)


@dataclass(frozen=True, eq=False, repr=False)
class _PatternMatch:
    """Whether one of several patterns matches; error messages show the patterns."""

    patterns: Sequence[Pattern]

    def __call__(self, name: str | None, parameter: Tensor) -> bool:
        """Return whether a pattern matches."""
        return any(matches(p, name, parameter, separator=".") for p in self.patterns)

    def __repr__(self) -> str:
        return ", ".join(map(repr, self.patterns))


def warn_of_left_out(new: Sequence[NamedParameter]) -> None:
    """Warn of parameters that an optimizer got later, and that no clipper has."""
    if new:
        warn(
            f"the optimizer was given {len(new)} parameters after its clipper, such as "
            f"{new[0].label}; no clipper has them, so they are not clipped; call "
            'clipper.add_param_group({"params": ...}) with them, too'
        )
