"""What one clipper checks: does it clip what is trained?"""

from collections.abc import Callable, Iterable, Set
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from autoclip_torch.step.stepper import Stepper
from autoclip_torch.step.unwrap import stepped_parameters

from .swap import SwapCheck, end_swap_checks
from .unclipped import UnclippedCheck
from .unstepped import UnsteppedCheck

_INTERVAL = 17
"""After the first steps, parameters are compared at most once in so many steps.

The interval is always odd: a part of the model may have a gradient in every second step
only.
"""

_FIRST = 3
"""Parameters are compared in each of so many first steps.

The optimizer of a clipper by hand is known after its first step.
"""


class CoverageCheck:
    """The checks of one clipper. A copied clipper starts with new ones.

    All but one run in the steps of the clipper. If the optimizer is swapped, there are
    no such steps: see `SwapCheck`.

    Args:
      stepper: the steps of the clipper, which has its present parameters.
    """

    def __init__(self, stepper: Stepper) -> None:
        self._stepper = stepper
        self.steps = 0
        self._next = 0
        self.unclipped = UnclippedCheck()
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
        optimizers: Iterable[Optimizer],
        known: Iterable[Tensor],
        find_others: Callable[[], Set[int]],
    ) -> None:
        """Compare the parameters of the clipper with those that are stepped.

        A clipper in a dry run may have any part of them.

        Args:
          optimizers: those that step what it has clipped, as far as they are known.
          known: its parameters, and those that the user removed from it.
          find_others: returns the ids of those that all clippers know.
        """
        # One of several optimizers may step less often.
        if self.steps >= _INTERVAL and not self.unclipped.has_found:
            self._check_unstepped()
        optimizers = [] if self._stepper.dry_run else list(optimizers)
        ids = set(map(id, known))
        self.unclipped.check(optimizers, ids, find_others)
        self._next = self.steps + 1
        if self.steps >= _FIRST and not self.unclipped.has_found:
            counts = [len(stepped_parameters(each)) for each in optimizers]
            most = max([len(ids), *counts])
            self._next = self.steps + _INTERVAL + most // 128 * 2  # it takes longer

    def _check_unstepped(self) -> None:
        """Warn of parameters that nothing steps, if their gradients share a norm."""
        stepper = self._stepper
        if stepper.quantity == "gradient" and stepper.rows.scope in ("global", "group"):
            self._unstepped.check(stepper.rows.parameters)

    def expect_steps(self, optimizer: Optimizer, *, is_wrapped: bool = False) -> None:
        """Warn from now on if another optimizer steps what the clipper clips.

        Args:
          optimizer, is_wrapped: as in `SwapCheck`.
        """
        self.end_all()
        self.swap = SwapCheck(optimizer, is_wrapped)
        self.update()

    def update(self) -> None:
        """Give the check of a swapped optimizer the present parameters."""
        if self.swap is not None:
            groups, parameters = self._stepper.groups, self._stepper.rows.parameters
            label = next(p.label for group in groups for p in group.parameters)
            modules = {id(g.module): g.module for g in groups if g.module is not None}
            has_modules = all(group.module is not None for group in groups)
            self.swap.set_parameters(
                parameters, modules.values() if has_modules else (), label
            )

    def end(self) -> None:
        """Expect no more steps of the clipper."""
        if self.swap is not None:
            self.swap.remove()
            self.swap = None

    def end_all(self) -> None:
        """Expect no steps of the clipper, or of earlier ones of its parameters."""
        self.end()
        end_swap_checks(self._stepper.rows.parameters)

    def __reduce__(self) -> Any:
        """Copy this object as a new one: a copied clipper has other parameters."""
        return type(self), (self._stepper,), {"swap": self.swap}
