"""Notice updates between two clips that use gradients without a clip."""

import weakref
from collections.abc import Callable, Sequence, Set

from torch import Tensor
from torch.optim import Optimizer

from autoclip_torch.step.unwrap import stepped_parameter_ids

from .gradient_samples import GradientVersions

_CYCLES = 3
"""So many clips are followed by such updates."""

_LEFT_OUT = (
    "optimizer.step() is called in some steps without clipper.step(), with gradients "
    "that are not clipped; call clipper.step() before each optimizer.step(), or "
    "clipper.attach(optimizer) instead"
)
_PART = (
    "another optimizer steps parameters of this clipper with gradients that are "
    "computed after clipper.step(), and so not clipped; make a clipper of what each "
    "optimizer steps, call it before the step of that optimizer, and zero the "
    "gradients of all before each backward()"
)
_LATE = (
    "clipper.step() clips gradients that another optimizer has used already, not "
    "clipped, or clipped by another clipper; call backward() for each optimizer that "
    "steps the same parameters, or call one clipper of all parameters before the first "
    "optimizer.step()"
)


class LeftOutStepCheck:
    """How often updates after the first one behind a clip used other gradients.

    An optimizer that is not the first may step some of the same parameters without a
    clip on purpose. It must not use what is clipped only after it.
    """

    def __init__(self) -> None:
        """Start before the first clip."""
        self._clipped: GradientVersions | None = None
        self._used: GradientVersions | None = None
        self._first: weakref.ref[Optimizer] | None = None
        self._others: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._has_left_out = self._has_left_out_part = False
        self._times = self._parts = self._late = 0

    def begin_clip(self, samples: Sequence[Tensor], *, is_in_step: bool) -> None:
        """Count what the updates since the last clip have done.

        Args:
          samples: some parameters of the clipper.
          is_in_step: whether the clip runs in the step of an optimizer, as in a closure
            of Lightning. What the optimizer was about to use is then clipped.
        """
        is_late = self._used is not None and self._used.are_same(samples)
        self._late = self._late + 1 if is_late and not is_in_step else 0
        is_part = self._has_left_out_part and not is_in_step
        self._parts = self._parts + 1 if is_part else 0
        self._times += self._has_left_out
        self._has_left_out = self._has_left_out_part = False
        self._used = None

    def end_clip(self, clipped: GradientVersions) -> None:
        """Expect one step, with the gradients that were clipped."""
        self._clipped, self._first = clipped, None

    def begin_update(self, optimizer: Optimizer) -> None:
        """Note the first step after a clip."""
        self._first = weakref.ref(optimizer)

    def begin_later_update(
        self, optimizer: Optimizer, samples: Sequence[Tensor]
    ) -> None:
        """Note a later step. If its gradients are others, their clip was left out."""
        first = None if self._first is None else self._first()
        if first is None or not _has_gradient(samples) or self.are_clipped(samples):
            return
        if first is optimizer:
            self._has_left_out = True
            return
        self._used = GradientVersions(samples)
        ids = stepped_parameter_ids(optimizer)
        computed = [] if self._clipped is None else self._clipped.list_others(samples)
        is_part = ids.isdisjoint(stepped_parameter_ids(first))
        if is_part and any(id(p) in ids for p in computed):
            self._has_left_out_part = True
            self._others.add(optimizer)

    def explain(
        self, is_shared: Callable[[], bool], find_others: Callable[[], Set[int]]
    ) -> str | None:
        """Return what is wrong, if it was so several times.

        Args:
          is_shared, find_others: as in `LoopCheck.check_update`.
        """
        if self._late == _CYCLES:
            return _LATE
        if self._times == _CYCLES and not is_shared():
            return _LEFT_OUT
        if self._parts != _CYCLES:
            return None
        known = find_others()
        is_known = all(stepped_parameter_ids(each) <= known for each in self._others)
        return None if is_known else _PART

    def are_clipped(self, samples: Sequence[Tensor]) -> bool:
        """Return whether the gradients are those of the last clip, unchanged."""
        clipped = self._clipped
        return (
            clipped is not None and _has_gradient(samples) and clipped.are_same(samples)
        )


def _has_gradient(samples: Sequence[Tensor]) -> bool:
    return any(sample.grad is not None for sample in samples)
