"""Notice a clip of gradients that an optimizer has used already."""

import weakref
from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer

from .gradient_samples import GradientVersions

_LATE_TIMES, _OLD_TIMES = 3, 5
"""So many clips are wrong: in a row, and in all."""

_LATE = (
    "clipper.step() clips gradients that another optimizer has used already, not "
    "clipped, or clipped by another clipper; zero all gradients and call backward() "
    "for each optimizer that steps the same parameters, or call one clipper of all "
    "parameters before the first optimizer.step()"
)
_OLD = (
    "clipper.step() measures gradients that another optimizer has used already, "
    "together with those of the next one, so its norm is too large; make a clipper of "
    "what each optimizer steps, or zero the gradients of all before each backward()"
)


class UsedGradientsCheck:
    """Whether clips act on gradients that have not changed since an optimizer's step.

    If the next optimizer uses them, too, they are clipped too late. If it does not,
    they are left over, and in the norm of others. With one optimizer, there is nothing
    to find.
    """

    def __init__(self) -> None:
        """Start before the first clip."""
        self._used: weakref.WeakKeyDictionary[
            Optimizer, tuple[Sequence[Tensor], GradientVersions]
        ] = weakref.WeakKeyDictionary()
        self._again: list[tuple[Optimizer, Sequence[Tensor]]] = []
        self._late = self._old = 0

    def begin_clip(self, *, is_in_step: bool) -> None:
        """Find the gradients that were used before, and are unchanged.

        Args:
          is_in_step: whether the clip runs in the step of an optimizer, as in a closure
            of Lightning: then it acts in time.
        """
        self._again = [
            (optimizer, own)
            for optimizer, (own, versions) in self._used.items()
            if not is_in_step and versions.are_same(own)
        ]

    def begin_update(self, optimizer: Optimizer, own: Sequence[Tensor]) -> None:
        """Note the gradients that an optimizer uses.

        Args:
          optimizer: it steps some of the clipper's parameters.
          own: some of these.
        """
        again = [used for other, used in self._again if other is not optimizer]
        if again:
            ids = set(map(id, own))
            is_late = any(id(p) in ids for used in again for p in used)
            self._late = self._late + 1 if is_late else 0
            self._old += not is_late
            self._again = []
        own = [p for p in own if p.grad is not None and p.numel() > 1]
        if own:
            self._used[optimizer] = own, GradientVersions(own)

    def explain(self, scope: str) -> str | None:
        """Return what is wrong, if it was so several times.

        Args:
          scope: that of the clipper. Only at scope "global" do all share a norm.
        """
        if self._late == _LATE_TIMES:
            return _LATE
        return _OLD if self._old == _OLD_TIMES and scope == "global" else None
