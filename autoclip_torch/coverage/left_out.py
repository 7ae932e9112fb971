"""Warn if an optimizer steps parameters that its clipper does not have."""

import weakref

from torch.optim import Optimizer

from autoclip_torch.step.unwrap import stepped_parameters
from autoclip_torch.step.warn import warn


class LeftOutCheck:
    """The optimizers of one clipper: had it all that they trained at first?

    If not, the clipper is meant for a part.
    """

    def __init__(self) -> None:
        """Start without an optimizer."""
        self._had_all: weakref.WeakKeyDictionary[Optimizer, bool]
        self._had_all = weakref.WeakKeyDictionary()

    def accept(self, optimizer: Optimizer) -> None:
        """Do not warn: a warning has named the parameters."""
        self._had_all[optimizer] = False

    def check(self, optimizer: Optimizer, known: set[int]) -> None:
        """Warn once of parameters that were frozen or not in the optimizer at first.

        Args:
          optimizer: it steps parameters of the clipper.
          known: the ids of the parameters of the clipper.
        """
        stepped = stepped_parameters(optimizer)
        left_out = [p for p in stepped if p.requires_grad and id(p) not in known]
        had_all = self._had_all.setdefault(optimizer, not left_out)
        new = [p for p in left_out if p.grad is not None]
        if not (had_all and new):
            return
        self.accept(optimizer)
        warn(
            f"the optimizer steps {len(new)} parameters, such as one of shape "
            f"{tuple(new[0].shape)}, that were frozen or not in it before; no clipper "
            "has them, so they are not clipped; call "
            'clipper.add_param_group({"params": ...}) with them, or give the clipper '
            "the model"
        )
