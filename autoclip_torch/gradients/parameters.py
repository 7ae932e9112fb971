"""What a clipper reads and writes: parameters, their gradients, and who holds them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from autoclip_core import Decision
from autoclip_torch.rows.groups import Group
from autoclip_torch.rows.rows import Rows

from . import measure as here
from . import sharded
from .measure import Gradients, give_each_its_own, on_host
from .ranks import find_ranks


class Parameters:
    """The parameters of a clipper, in rows, here or in parts on many ranks.

    Args:
      groups: all of the update, what is excluded from clipping too.
      rows: which of them are clipped, and which belong together.
      process_group: the ranks that hold different parameters, or None.
    """

    def __init__(
        self, groups: Sequence[Group], rows: Rows, process_group: Any = None
    ) -> None:
        """Find out whom to add up norms with."""
        self.groups = groups
        self.rows = rows
        self.ranks = find_ranks(rows.parameters, process_group)
        self._may_differ = self.process_group is not None

    @property
    def process_group(self) -> Any:
        """The ranks that hold different parameters of one model, or None."""
        return None if self.ranks is None else self.ranks.process_group

    def gradients(self) -> list[Tensor | None]:
        """Return the gradient of each entry."""
        return [entry.parameter.grad for entry in self.rows.by_parameter]

    def own_gradients(self) -> list[Tensor | None]:
        """Return the gradient of each entry, before they are scaled: shared by none."""
        gradients = self.gradients()
        # While compiling, an id would tie the code to this step's gradients.
        if torch.compiler.is_compiling():
            return gradients
        return give_each_its_own(self.rows.by_parameter, gradients)

    def replaced(self) -> list[str]:
        """Return the names of those that their layer does not hold any more.

        One with a gradient is not asked: FSDP2 may keep the whole of it in its place.
        """
        parameters = [named for group in self.groups for named in group.parameters]
        return [
            str(named.name)
            for named in parameters
            if named.parameter.requires_grad
            and named.parameter.grad is None
            and named.layer is not None
            and all(p is not named.parameter for p in named.layer.parameters())
        ]

    def present(self, gradients: Sequence[Tensor | None]) -> list[Tensor]:
        """Return the tensors that say where to decide, now that these are measured."""
        # A rank whose shards have no gradient must decide where the others do.
        tensors = gradients if self.ranks is None else self.rows.parameters
        return [tensor for tensor in tensors if tensor is not None]

    def measure(
        self,
        device: torch.device | None,
        *sequences: Gradients,
        overflow: Tensor | None = None,
    ) -> list[tuple[Any, Any]]:
        """Return of each sequence the norm of each row, and which rows have one.

        Args:
          device: where the norms are wanted; None is the host, as NumPy arrays.
          *sequences: gradients, or parameters: one tensor per entry in each.
          overflow: not 0 where this rank's gradients overflowed; it becomes 1 where
            those of any rank did, and what overflowed on one is observed on none.
        """
        rows = self.rows
        if self.ranks is None:
            return [here.measure(rows, tensors, device) for tensors in sequences]
        if self._may_differ and not torch.compiler.is_compiling():
            self.ranks.check_rows(len(rows.names), device or torch.device("cpu"))
            self._may_differ = False
        return sharded.measure(rows, sequences, device, self.ranks, overflow)

    def weights(self) -> list[list[Tensor]]:
        """Return the parameters in a list, where a policy needs their norms."""
        if not any(block.policy.needs_param_norms for block in self.rows.by_policy):
            return []
        return [[entry.parameter.detach() for entry in self.rows.by_parameter]]

    def norms(self, device: torch.device | None) -> Any:
        """Return the norms of the parameters, or None where no policy needs them."""
        if not (weights := self.weights()):
            return None
        ((norms, _),) = self.measure(device, *weights)
        return norms

    def rescale(self, gradients: Gradients, decision: Decision) -> None:
        """Scale the gradients in place, as decided."""
        scale_ = here.scale_ if self.ranks is None else sharded.scale_
        scale_(self.rows, gradients, decision.scale)

    def cancel(self) -> None:
        """Take every gradient away: an optimizer leaves such parameters alone.

        Moments, step count and weight decay, too; a gradient of 0 would not do that.
        The excluded parameters belong to the same update.
        """
        for group in self.groups:
            for named in group.parameters:
                named.parameter.grad = None


def where(tensors: Sequence[Tensor]) -> torch.device | None:
    """Return the device on which to decide about these tensors; None is the host."""
    if on_host(tensors) and not torch.compiler.is_compiling():
        return None
    accelerators = (t.device for t in tensors if t.device.type != "cpu")
    return next(accelerators, tensors[0].device)
