"""One step of a `ClippedOptimizer`, inside the step of the optimizer that it holds."""

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from autoclip_torch.coverage.open_steps import is_outermost_step
from autoclip_torch.loop.backward_in_step import BackwardCheck
from autoclip_torch.step.closure import find_closure
from autoclip_torch.step.unwrap import stepped_parameters, unwrap

_KEY = "autoclip"
"""The key of the hooks of a clipped optimizer in the optimizer inside."""


class ClippedStep:
    """The hooks of a clipped optimizer, around those of the optimizer inside.

    They are registered in each step, and not once: a copied optimizer has no hooks, and
    the optimizer inside must not clip in a step of its own.

    Args:
      clipped: the clipped optimizer.
    """

    def __init__(self, clipped: Any) -> None:
        """Prepare a step."""
        self._clipped = clipped
        self._check: BackwardCheck = clipped._backward_check

    def run(self, closure: Callable[[], Any] | None) -> Any:
        """Let the optimizer inside step, with these hooks."""
        inner: Any = unwrap(self._clipped.optimizer)
        # A handle of torch would be new to compiled code in each step.
        before, after = (
            inner._optimizer_step_pre_hooks,
            inner._optimizer_step_post_hooks,
        )
        before[_KEY], after[_KEY] = self._before, self._after
        before.move_to_end(_KEY, last=False)
        try:
            return self._clipped.optimizer.step(*([] if closure is None else [closure]))
        finally:
            del before[_KEY], after[_KEY]

    def _before(
        self, optimizer: Optimizer, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        """Run the hooks before the step, then clip."""
        if not is_outermost_step(optimizer):
            return None
        clipped = self._clipped
        args = (clipped, *args[1:])  # args[0] is the optimizer inside
        for hook in clipped._optimizer_step_pre_hooks.values():
            if (changed := hook(clipped, args, kwargs)) is not None:
                args, kwargs = changed
        if (closure := find_closure(args, kwargs)) is None:
            clipped._clip()
            self._check.begin(stepped_parameters(optimizer))
            return (optimizer,), {}
        return (optimizer, self._wrap(closure)), {}

    def _wrap(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Return a closure that clips after the given one."""

        def clipped_closure() -> Any:
            loss = closure()
            self._clipped._clip(loss)
            return loss

        return clipped_closure

    def _after(self, optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> None:
        """Run the hooks after the step."""
        if is_outermost_step(optimizer):
            clipped = self._clipped
            self._check.end(optimizer)
            for hook in clipped._optimizer_step_post_hooks.values():
                hook(clipped, (clipped, *args[1:]), kwargs)
