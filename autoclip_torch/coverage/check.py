"""What one clipper checks: does it clip what is trained?"""

from collections.abc import Callable, Iterable, Sequence, Set
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from autoclip_torch.step.unwrap import stepped_parameters

from .left_out import LeftOutCheck
from .swap import SwapCheck
from .unstepped import UnsteppedCheck

_INTERVAL = 17
"""Parameters are compared in the first steps, and in every so many or fewer.

It is odd, and so is its sum with what is added for many parameters: a part may have a
gradient in every second step.
"""

_FIRST = 3
"""So many first steps. The optimizer of a clipper by hand is known after one."""


class CoverageCheck:
    """The checks of one clipper. A copied clipper starts with new ones.

    All but one run in the steps of the clipper. If the optimizer is swapped, there are
    no such steps: see `SwapCheck`.
    """

    def __init__(self) -> None:
        self.steps = 0
        self._next = 0
        self.left_out = LeftOutCheck()
        self.swap: SwapCheck | None = None
        """The check of a clipper that acts in the step of an optimizer."""
        self._unstepped = UnsteppedCheck()

    def begin_step(self) -> bool:
        """Count a step; return whether it compares the parameters."""
        self.steps += 1
        if self.swap is not None:
            self.swap.note_clip()
        return self.steps >= self._next

    def compare(
        self,
        optimizers: Sequence[Optimizer],
        clipped: Sequence[Tensor],
        known: Iterable[Tensor],
        find_others: Callable[[], Set[int]],
        is_joint: bool,
    ) -> None:
        """Compare the parameters of the clipper with those that are stepped.

        Args:
          optimizers: those that step what it has clipped, as far as they are known.
          clipped: the parameters that it clips.
          known: these, and those that it leaves out.
          find_others: returns the ids of those that all clippers know.
          is_joint: whether several gradients share a norm.
        """
        # One of several optimizers may step less often.
        if is_joint and self.steps >= _INTERVAL and not self.left_out.has_found:
            self._unstepped.check(clipped)
        ids = set(map(id, known))
        self.left_out.check(optimizers, ids, find_others)
        self._next = self.steps + 1
        if self.steps >= _FIRST and not self.left_out.has_found:
            counts = [len(stepped_parameters(each)) for each in optimizers]
            most = max([len(ids), *counts])
            self._next = self.steps + _INTERVAL + most // 128 * 2  # it takes longer

    def end(self) -> None:
        """Expect no more steps of the clipper."""
        if self.swap is not None:
            self.swap.remove()
            self.swap = None

    def __reduce__(self) -> Any:
        """Copy this object as a new one: a copied clipper has other parameters."""
        return type(self), (), {"swap": self.swap}
