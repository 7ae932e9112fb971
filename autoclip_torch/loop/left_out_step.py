"""Notice updates between two clips that use gradients without a clip."""

import weakref
from collections.abc import Callable, Sequence, Set

from torch import Tensor
from torch.optim import Optimizer

from autoclip_torch.step.unwrap import stepped_parameter_ids, stepped_parameters

from .backward_watch import BackwardWatch
from .gradient_samples import GradientVersions

_CYCLES = 3
"""So many clips are followed by such updates."""

_WATCHED = 20
"""The backward passes after so many clips are watched, if it may be so."""

_LEFT_OUT = (
    "optimizer.step() is called in some steps without clipper.step(), with gradients "
    "that are not clipped; call clipper.step() before each optimizer.step(), or "
    "clipper.attach(optimizer) instead"
)
_PART = (
    "another optimizer steps parameters of this clipper with gradients that are "
    "computed after clipper.step(), and so not clipped; make a clipper of what each "
    "optimizer steps, call it before the step of that optimizer, and zero the "
    "gradients of all before each backward(); to leave a part unclipped on purpose, "
    "make the clipper with exclude=[...]"
)


class LeftOutStepCheck:
    """How often updates after the first one behind a clip used other gradients.

    An optimizer that is not the first may step some of the same parameters without a
    clip on purpose, or a single number, such as a temperature.
    """

    def __init__(self) -> None:
        """Start before the first clip."""
        self._clipped: GradientVersions | None = None
        self._first: weakref.ref[Optimizer] | None = None
        self._others: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._backward, self._clips_to_watch = BackwardWatch(), 0
        self._has_left_out = self._has_left_out_part = False
        self._times = self._parts = 0

    def begin_clip(self, *, is_in_step: bool) -> None:
        """Count what the updates since the last clip have done.

        Args:
          is_in_step: whether the clip runs in the step of an optimizer, as in a closure
            of Lightning. What the optimizer was about to use is then clipped.
        """
        self._parts += self._has_left_out_part and not is_in_step
        self._times += self._has_left_out
        self._has_left_out = self._has_left_out_part = False
        self._backward.stop()

    def end_clip(self, clipped: GradientVersions, samples: Sequence[Tensor]) -> None:
        """Expect one step, with the gradients that were clipped."""
        self._clipped, self._first = clipped, None
        if self._clips_to_watch:
            self._clips_to_watch -= 1
            self._backward.start(samples)

    def begin_update(self, optimizer: Optimizer) -> None:
        """Note the first step after a clip."""
        self._first = weakref.ref(optimizer)

    def begin_later_update(
        self, optimizer: Optimizer, samples: Sequence[Tensor], own: Sequence[Tensor]
    ) -> None:
        """Note a later step. If its gradients are others, their clip was left out.

        Args:
          optimizer: it steps parameters of the clipper.
          samples: some parameters of the clipper.
          own: those of them that it steps.
        """
        first = None if self._first is None else self._first()
        if first is None or not _has_gradient(samples) or self.are_clipped(samples):
            return
        if first is optimizer:
            self._has_left_out = True
            return
        if optimizer in self._others:
            self._has_left_out_part |= bool(self._backward.list_computed(own))
            return
        is_number = sum(p.numel() for p in stepped_parameters(optimizer)) == 1
        ids = stepped_parameter_ids(optimizer)
        if not is_number and ids.isdisjoint(stepped_parameter_ids(first)):
            self._others.add(optimizer)
            self._clips_to_watch = _WATCHED

    def explain(
        self, is_shared: Callable[[], bool], find_others: Callable[[], Set[int]]
    ) -> str | None:
        """Return what is wrong, if it was so several times.

        Args:
          is_shared, find_others: as in `LoopCheck.check_update`.
        """
        if self._times == _CYCLES and not is_shared():
            return _LEFT_OUT
        if self._parts < _CYCLES:
            return None
        self._parts, known = 0, find_others()
        are_unknown = (known.isdisjoint(stepped_parameter_ids(o)) for o in self._others)
        return _PART if any(are_unknown) else None

    def are_clipped(self, samples: Sequence[Tensor]) -> bool:
        """Return whether the gradients are those of the last clip, unchanged."""
        clipped = self._clipped
        return (
            clipped is not None and _has_gradient(samples) and clipped.are_same(samples)
        )


def _has_gradient(samples: Sequence[Tensor]) -> bool:
    return any(sample.grad is not None for sample in samples)
