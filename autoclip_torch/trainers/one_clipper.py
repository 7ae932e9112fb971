"""One clipper for the optimizers of a trainer: their gradients have one global norm."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch.optim import Optimizer

from autoclip_torch.step.unwrap import unwrap
from autoclip_torch.step.warn import warn


class OneClipper:
    """Clips the gradients of several optimizers once after each backward pass.

    The first optimizer that steps after a backward pass clips the gradients of all.
    """

    def __init__(self, clipper: Any, optimizers: Iterable[Optimizer]) -> None:
        self.clipper = clipper
        self._optimizers: Sequence[Optimizer] = list(map(unwrap, optimizers))
        self._stepped: list[Optimizer] = []
        self._is_clipped = False
        self._has_warned = False

    def begin_backward(self) -> None:
        """Note that gradients follow which are not clipped."""
        self._is_clipped = False

    def step(self, optimizer: Optimizer) -> None:
        """Clip before a step of an optimizer, unless the gradients are clipped."""
        if not self._is_clipped:
            self._check_all_stepped()
            self.clipper._follow_optimizers(*self._optimizers)
            self.clipper.step()
            self._is_clipped, self._stepped = True, []
        self._stepped.append(optimizer)

    def _check_all_stepped(self) -> None:
        """Warn if an optimizer did not step: its gradients are measured again."""
        missing = len(self._optimizers) - len(set(map(id, self._stepped)))
        if self._stepped and missing and not self._has_warned:
            self._has_warned = True
            warn(
                f"with one_clipper=True all {len(self._optimizers)} optimizers must "
                f"step after each backward pass, but {missing} did not: the norm then "
                "includes gradients of an earlier pass; leave one_clipper out, or step "
                "all of them"
            )
