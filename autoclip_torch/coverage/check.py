"""What one clipper checks: does it clip what is trained?"""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from autoclip_torch.step.unwrap import stepped_parameter_ids

from .left_out import LeftOutCheck
from .swap import SwapCheck
from .unstepped import UnsteppedCheck

_INTERVAL = 16
"""Parameters are compared in the first two steps, and in every so many or fewer."""


class CoverageCheck:
    """The checks of one clipper. A copied clipper starts with new ones.

    All but one run in the steps of the clipper. If the optimizer is swapped, there are
    no such steps: see `SwapCheck`.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.left_out = LeftOutCheck()
        self.swap: SwapCheck | None = None
        """The check of a clipper that acts in the step of an optimizer."""
        self._unstepped = UnsteppedCheck()
        self._interval = _INTERVAL

    def begin_step(self) -> bool:
        """Count a step; return whether it compares the parameters."""
        self.steps += 1
        if self.swap is not None:
            self.swap.has_acted = True
        return self.steps < 3 or self.steps % self._interval == 0

    def compare(
        self,
        optimizers: Iterable[Optimizer],
        clipped: Sequence[Tensor],
        others: Iterable[Tensor],
        is_joint: bool,
    ) -> None:
        """Compare the parameters of the clipper with those that are stepped.

        Args:
          optimizers: those that step its parameters, as far as they are known.
          clipped: the parameters that it clips.
          others: those that it leaves out.
          is_joint: whether several gradients share a norm.
        """
        self._interval = _INTERVAL + len(clipped) // 64  # it takes longer
        known = set(map(id, chain(clipped, others)))
        stepped = {each: stepped_parameter_ids(each) for each in optimizers}
        for optimizer in stepped:
            by_others = [ids for each, ids in stepped.items() if each is not optimizer]
            self.left_out.check(optimizer, clipped, known, set(chain(*by_others)))
        # One of several optimizers may step less often.
        if is_joint and self.steps >= _INTERVAL:
            self._unstepped.check(clipped)

    def end(self) -> None:
        """Expect no more steps of the clipper."""
        if self.swap is not None:
            self.swap.remove()
            self.swap = None

    def __reduce__(self) -> Any:
        """Copy this object as a new one: a copied clipper has other parameters."""
        return type(self), (), {"swap": self.swap}
