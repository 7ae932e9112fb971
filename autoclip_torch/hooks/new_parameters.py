"""Read what an optimizer steps for its clipper; warn of what no clipper has."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from autoclip_torch.rows.groups import Group, NamedParameter
from autoclip_torch.rows.read import read_optimizer_groups
from autoclip_torch.step.unwrap import stepped_parameter_ids, unwrap
from autoclip_torch.step.warn import warn


def read_stepped(optimizers: Sequence[Any], model: nn.Module | None) -> list[Group]:
    """Return the groups that optimizers step, one optimizer after the other.

    Args:
      optimizers: torch optimizers, or wrappers that hold one.
      model: the module whose parameters they step. With None, the parameters have the
        names that the optimizers know, if any.

    Raises:
      ValueError: an optimizer steps no parameter of the model.
    """
    known = None if model is None else set(map(id, model.parameters()))
    groups: list[Group] = []
    for each in map(unwrap, optimizers):
        if known is not None and known.isdisjoint(stepped_parameter_ids(each)):
            raise ValueError(
                f"optimizer must step parameters of the model, got a "
                f"{type(each).__name__} that steps none of them; make it after the "
                "model was moved, wrapped or sharded; if each layer has an optimizer "
                "that steps within the backward pass, attach a clipper to each of them"
            )
        groups += read_optimizer_groups(each, model)
    return groups


def warn_of_left_out(new: Sequence[NamedParameter]) -> None:
    """Warn of parameters that an optimizer got later, and that no clipper has."""
    if new:
        warn(
            f"the optimizer was given {len(new)} parameters after its clipper, such as "
            f"{new[0].label}; no clipper has them, so they are not clipped; call "
            'clipper.add_param_group({"params": ...}) with them, too'
        )
