"""Notice a clip before the step of an optimizer that has other parameters."""

import weakref
from collections.abc import Callable, Set
from typing import Any

from torch.optim import Optimizer

from autoclip_core import Decision
from autoclip_torch.step.unwrap import stepped_parameter_ids, stepped_parameters

from .gradient_samples import GradientVersions, choose_samples

_TIMES = 5
"""So many clips must be unused."""


class UnusedClipCheck:
    """Whether an optimizer without a clipper steps after clips of other parameters.

    As in a GAN whose loop clips the discriminator where it should clip the generator. A
    clip counts if its gradients are replaced before their own optimizer steps. It
    counts once between two steps of that optimizer: a `GradScaler` may leave out many
    in a row. An optimizer that also steps after clips that are used is trained without
    a clipper on purpose.
    """

    def __init__(self) -> None:
        """Start before the first clip."""
        self._is_clipped = self._is_used = self._has_updated = False
        self._others: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._exempt: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._suspects: weakref.WeakKeyDictionary[Optimizer, _Suspect]
        self._suspects = weakref.WeakKeyDictionary()

    def begin_clip(self, *, is_replaced: bool) -> None:
        """End what follows the clip before.

        Args:
          is_replaced: whether its gradients were replaced before they were used.
        """
        if is_replaced and self._others and self._has_updated:
            self._has_updated = False
            for other in self._others:
                if other in self._suspects:
                    self._suspects[other].count()
                else:
                    self._suspects[other] = _Suspect(other)
        self._is_clipped = self._is_used = False
        self._others.clear()

    def end_clip(self, decision: Decision, *, has_gradient: bool) -> None:
        """Expect a step of the clipper's own optimizer.

        Args:
          decision: what the clip decided.
          has_gradient: whether there was a gradient to clip.
        """
        self._is_clipped = True
        for suspect in self._suspects.values():
            suspect.end_clip(decision, has_gradient=has_gradient)

    def begin_update(self, *, is_replaced: bool) -> None:
        """Note the first step of the clipper's own optimizer after a clip.

        Args:
          is_replaced: whether it steps other gradients than those that were clipped.
        """
        if is_replaced:
            self.begin_clip(is_replaced=True)
        self._is_used = self._has_updated = True
        for other in self._others:
            self._leave_out(other)

    def explain(
        self,
        other: Optimizer,
        is_shared: Callable[[], bool],
        find_others: Callable[[], Set[int]],
    ) -> str | None:
        """Return what is wrong if an optimizer steps after clips of others, once.

        Args:
          other: an optimizer of other parameters, which is about to step.
          is_shared: as in `LoopCheck.check_update`.
          find_others: returns the ids of the parameters of all other clippers.
        """
        if not self._is_clipped or other in self._exempt:
            return None
        if self._is_used:
            self._leave_out(other)
            return None
        self._others.add(other)
        suspect = self._suspects.get(other)
        if suspect is None or not suspect.begin_update():
            return None
        self._leave_out(other)
        is_known = not find_others().isdisjoint(stepped_parameter_ids(other))
        return None if is_known or is_shared() else _describe(other)

    def _leave_out(self, other: Optimizer) -> None:
        self._exempt.add(other)
        self._suspects.pop(other, None)


def _describe(other: Optimizer) -> str:
    kind, shape = type(other).__name__, tuple(stepped_parameters(other)[0].shape)
    return (
        f"clipper.step() has no effect before {kind}.step(), which steps other "
        f"parameters, such as one of shape {shape}, and no clipper clips these: the "
        "gradients that it clipped are computed again before their own optimizer "
        f"steps; make a clipper of what this {kind} steps, and call that one before "
        f"it; if this {kind} needs no clipping, leave the call before it out"
    )


class _Suspect:
    """How often an optimizer stepped after a clip that its own optimizer did not use.

    Its gradients must be the same at the clip and at the step. So the clip was not one
    that only measures, such as in an evaluation.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        """Start before the first of these clips."""
        self._samples = choose_samples(stepped_parameters(optimizer), 2)
        self._versions: GradientVersions | None = None
        self._is_same = False
        self._is_finite: Any = True
        self._unused: list[Any] = []

    def end_clip(self, decision: Decision, *, has_gradient: bool) -> None:
        """Note the gradients at a clip; this waits for no device.

        A clip that is skipped, or of an overflow, is unused on purpose.

        Args:
          decision, has_gradient: as in `UnusedClipCheck.end_clip`.
        """
        is_stepped = any(sample.grad is not None for sample in self._samples)
        self._versions = GradientVersions(self._samples) if is_stepped else None
        # A `GradScaler` has found an overflow if there are gradients without a norm.
        is_overflow = decision.norm.isnan().all() & has_gradient
        is_overflow = is_overflow | ~decision.finite.all()
        self._is_finite = ~is_overflow & ~decision.skipped.any()

    def begin_update(self) -> bool:
        """Note the gradients at a step; return whether enough clips were unused."""
        versions, self._versions = self._versions, None
        self._is_same = versions is not None and versions.are_same(self._samples)
        if len(self._unused) < _TIMES:
            return False
        self._unused = list(filter(bool, self._unused))
        return len(self._unused) >= _TIMES

    def count(self) -> None:
        """Count the last clip: its gradients were replaced."""
        if self._is_same:
            self._unused.append(self._is_finite)
        self._is_same = False
