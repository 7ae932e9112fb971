"""Compare what an optimizer steps with what its clipper has."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from autoclip_torch.rows.flat_parts import refuse_flat_parts
from autoclip_torch.rows.groups import Group
from autoclip_torch.rows.read import read_optimizer_groups
from autoclip_torch.step.unwrap import (
    stepped_parameter_ids,
    stepped_parameters,
    unwrap,
)


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


def check_steps_all(clipped: list[Tensor], optimizer: Optimizer) -> None:
    """Refuse an optimizer that steps only a part of the clipper's parameters.

    The gradients of the other parameters belong to another backward pass, as in a GAN.
    Or they do not exist yet, if each parameter is stepped within the backward pass.
    """
    trained = [parameter for parameter in clipped if parameter.requires_grad]
    stepped = stepped_parameter_ids(optimizer)
    count = sum(id(parameter) in stepped for parameter in trained or clipped)
    if not count:
        refuse_flat_parts(clipped, stepped_parameters(optimizer))
        raise ValueError(
            "optimizer must step parameters of this clipper, got one that steps none "
            "of them; make both after the model was moved, wrapped or sharded; if each "
            "layer has an optimizer that steps within the backward pass, attach a "
            "clipper to each of them"
        )
    if count < len(trained):
        raise ValueError(
            f"optimizer must step all parameters of its clipper, got {count} of the "
            f"{len(trained)}: when it steps, the other parameters may have no gradient "
            "yet, or one of another backward pass; make a clipper for each optimizer, "
            "of the parameters that it steps"
        )
