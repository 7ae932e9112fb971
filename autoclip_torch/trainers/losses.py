"""The loss of a step, from the losses of its backward passes."""

import torch
from torch import Tensor


class BackwardLosses:
    """The losses of the backward passes before a step.

    With automatic optimization, each step begins without losses. With manual
    optimization, several optimizers may step after the same backward passes.
    """

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._has_stepped = False

    def reset(self) -> None:
        """Remove the losses that an interrupted run may have left."""
        self._losses = []

    def add(self, loss: Tensor) -> None:
        """Add the loss of a backward pass, without a loss scale."""
        if self._has_stepped:
            self._losses, self._has_stepped = [], False
        self._losses.append(loss)

    def take(self, *, is_automatic: bool, accumulated: int) -> Tensor:
        """Return the loss of a step.

        Without a backward pass it is NaN, which cancels the update.

        Args:
          is_automatic: whether the trainer steps.
          accumulated: the number by which the trainer has divided each loss.
        """
        losses, self._has_stepped = self._losses, True
        if is_automatic:
            self._losses = []  # a step without a backward pass has no loss
        if not losses:
            return torch.tensor(float("nan"))
        total = torch.stack(losses).sum()
        return total * (accumulated / len(losses)) if is_automatic else total
