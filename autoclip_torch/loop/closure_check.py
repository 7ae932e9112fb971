"""Notice that the closure of a step computes the gradients after the clip."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .backward_watch import BackwardWatch

_CYCLES = 3
"""It is reported after so many such steps in a row."""

_TEXT = (
    "clipper.step() has no effect: the closure of optimizer.step() computes the "
    "gradients again after it; call clipper.step() at the end of the closure, or "
    "clipper.attach(optimizer) instead"
)


class ClosureCheck:
    """Whether closures compute gradients that they do not clip, after each clip."""

    def __init__(self) -> None:
        """Start before the first closure."""
        self._backward = BackwardWatch()
        self._cycles = 0

    def end_clip(self) -> None:
        """Note a clip. Inside a closure, only later backward passes count."""
        self._backward.reset()

    def watch(
        self,
        closure: Callable[[], Any],
        samples: Sequence[Tensor],
        report: Callable[[str], None],
        *,
        follows_clip: bool,
    ) -> Callable[[], Any]:
        """Return a closure that reports if the given one does not clip its gradients.

        Args:
          closure: the closure of a step.
          samples: parameters whose gradients are looked at.
          report: it receives the text.
          follows_clip: whether there was a clip since the step before.
        """

        def watched_closure() -> Any:
            self._backward.start(samples)
            loss = closure()
            if not self._backward.stop():
                self._cycles = 0
            elif follows_clip:
                self._cycles += 1
                if self._cycles == _CYCLES:
                    report(_TEXT)
            return loss

        return watched_closure
