"""Clipping the update of an optimizer by its hooks, before and after each step."""

from typing import Any

from torch.optim import Optimizer

from autoclip_torch.hooks.step_hooks import StepHooks
from autoclip_torch.observer.observer import Observer
from autoclip_torch.optimizer_steps.open_steps import is_outermost_step
from autoclip_torch.step.closure import find_closure

from .stepper import UpdateStepper


class UpdateHooks(StepHooks):
    """The hooks of one `UpdateClipper`. The optimizer keeps the clipper alive.

    Args:
      clipper: the clipper.
      stepper: its steps.
      optimizer: the innermost torch optimizer.
    """

    def __init__(
        self, clipper: Observer, stepper: UpdateStepper, optimizer: Optimizer
    ) -> None:
        """Register the hooks. The second one runs first after the step."""
        self._clipper = clipper
        self._stepper = stepper
        super().__init__(optimizer)
        clipper._coverage.expect_steps(optimizer)
        # Other hooks then receive the clipped weights, and may remove the gradients.
        hooks: Any = optimizer._optimizer_step_post_hooks
        hooks.move_to_end(self._hooks[1].id, last=False)

    def _before_step(
        self, optimizer: Optimizer, args: Any, kwargs: dict[str, Any]
    ) -> None:
        if not is_outermost_step(optimizer):
            return
        self._clipper._follow_optimizers(optimizer)
        has_closure = find_closure(args, kwargs) is not None
        self._stepper.begin(optimizer, has_closure)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if is_outermost_step(optimizer):
            self._stepper.finish(optimizer)


def check_has_no_clipper(optimizer: Optimizer) -> None:
    """Refuse a second update clipper on the same optimizer.

    Raises:
      ValueError: an `UpdateClipper` acts in the optimizer already.
    """
    if UpdateHooks.find(optimizer) is not None:
        raise ValueError(
            "optimizer must have at most one update clipper, got one that has one: two "
            "would clip the same update; call detach() on the first one"
        )
