"""Warn if an optimizer steps parameters that its clipper does not have."""

from collections.abc import Iterable

from torch import Tensor
from torch.optim import Optimizer

from autoclip_torch.step.unwrap import stepped_parameters
from autoclip_torch.step.warn import warn


class LeftOutCheck:
    """Whether one clipper had all that its optimizer trained at first.

    If not, it is meant for a part.
    """

    def __init__(self) -> None:
        self._had_all: bool | None = None

    def accept(self) -> None:
        """Do not warn: a warning has named the parameters."""
        self._had_all = False

    def check(
        self,
        optimizer: Optimizer,
        clipped: Iterable[Tensor],
        known: set[int],
        stepped_by_others: set[int],
    ) -> None:
        """Warn once of parameters that were frozen or not in the optimizer at first.

        Nothing is concluded from an optimizer that steps only a part of what is
        clipped, except if it stepped all at first, and the other part was replaced.

        Args:
          optimizer: any optimizer.
          clipped: the parameters that the clipper clips.
          known: their ids, and those of the parameters that it leaves out.
          stepped_by_others: the ids of what other optimizers step.
        """
        stepped = stepped_parameters(optimizer)
        ids = set(map(id, stepped))
        others = {id(p) for p in clipped if p.requires_grad} - ids
        if others and (self._had_all is None or others & stepped_by_others):
            return
        left_out = [p for p in stepped if p.requires_grad and id(p) not in known]
        if self._had_all is None:
            self._had_all = not left_out
        new = [p for p in left_out if p.grad is not None]
        if not (self._had_all and new):
            return
        self.accept()
        warn(
            f"the optimizer steps {len(new)} parameters, such as one of shape "
            f"{tuple(new[0].shape)}, that were frozen or not in it before; no clipper "
            "has them, so they are not clipped; call "
            'clipper.add_param_group({"params": ...}) with them, or give the clipper '
            "the model"
        )
