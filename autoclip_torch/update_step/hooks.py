"""Clipping the update of an optimizer by its hooks, before and after each step."""

import weakref
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from autoclip_torch.hooks.outermost import is_outermost_step

from .stepper import UpdateStepper


class UpdateHooks:
    """The hooks of one `UpdateClipper`. The optimizer keeps the clipper alive.

    A copy of the clipper has no hooks, because torch drops those of a copied optimizer.

    Args:
      stepper: the steps of the clipper.
      optimizer: the innermost torch optimizer.
      add_parameters: called before each step; it adds the optimizer's new parameters.
    """

    def __init__(
        self,
        stepper: UpdateStepper,
        optimizer: Optimizer,
        add_parameters: Callable[[Optimizer], None],
    ) -> None:
        """Register the hooks. The second one runs first after the step."""
        self._stepper = stepper
        self._add_parameters = add_parameters
        self._optimizer = weakref.ref(optimizer)
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        # Other hooks then receive the clipped weights, and may remove the gradients.
        hooks: Any = optimizer._optimizer_step_post_hooks
        hooks.move_to_end(self._hooks[1].id, last=False)

    @property
    def active(self) -> bool:
        """Whether it clips: until `remove()`, or until the optimizer is deleted."""
        hook = self._hooks[0]
        return hook.id in (hook.hooks_dict_ref() or {})

    def remove(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def __reduce__(self) -> Any:
        """Copy this handle as None, because the copied optimizer has no hooks."""
        return type(None), ()

    def _before_step(
        self, optimizer: Optimizer, args: Any, kwargs: dict[str, Any]
    ) -> None:
        if not is_outermost_step(optimizer):
            return
        self._add_parameters(optimizer)
        has_closure = kwargs.get("closure") is not None
        has_closure |= len(args) > 1 and args[1] is not None  # args[0]: the optimizer
        self._stepper.begin(optimizer, has_closure)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if is_outermost_step(optimizer):
            self._stepper.finish(optimizer)


def check_has_no_clipper(optimizer: Optimizer) -> None:
    """Refuse a second update clipper on the same optimizer.

    Raises:
      ValueError: an `UpdateClipper` acts in the optimizer already.
    """
    hooks = optimizer._optimizer_step_pre_hooks.values()
    owners = (getattr(hook, "__self__", None) for hook in hooks)
    if any(isinstance(owner, UpdateHooks) for owner in owners):
        raise ValueError(
            "optimizer must have at most one update clipper, got one that has one: two "
            "would clip the same update; call detach() on the first one"
        )
