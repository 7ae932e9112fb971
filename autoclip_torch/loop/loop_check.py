"""Check at which place of a training loop a clipper by hand steps.

Version numbers of gradients show what happened between two of its steps. The check
reads those of some parameters.
"""

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from autoclip_core import Decision
from autoclip_torch.optimizer_steps.open_steps import list_step_arguments
from autoclip_torch.rows.rows import Rows
from autoclip_torch.step.closure import find_closure, replace_closure
from autoclip_torch.step.warn import warn

from .after_clip import AfterClipCheck
from .backward_watch import BackwardWatch
from .closure_check import ClosureCheck
from .gradient_samples import GradientVersions, Samples
from .left_out_step import LeftOutStepCheck
from .other_model import OtherModelCheck
from .scaler_rule import ScalerRule
from .unused_clip import UnusedClipCheck
from .used_gradients import UsedGradientsCheck

_CYCLES = 3
"""A wrong order is reported if so many updates in a row have it."""

_WATCHED, _PERIOD = 10, 400
"""So many of this many steps are watched, and those after a change of optimizers."""

_PAUSE = 100
"""So many steps after the last watched ones began, they begin again after a step that
used other gradients than those that were clipped."""

_SCALED = (
    "clipper.step() was called before the GradScaler had unscaled the gradients, so it "
    "clipped gradients that are multiplied by the loss scale; if a trainer has the "
    "scaler, as Lightning does, call clipper.attach(optimizer) or use its "
    "ClipCallback; otherwise call clipper.step(scaler=scaler, optimizer=optimizer)"
)
_EARLY = (
    "backward() was called between clipper.step() and optimizer.step(), so the "
    "optimizer used gradients that are not clipped; call clipper.step() after the last "
    "backward() and before optimizer.step()"
)
_REPEATED = (
    "clipper.step() was called several times before each optimizer.step(), so it "
    "clipped gradients again that it had clipped already; when accumulating, call it "
    "once, after the last backward pass; set dry_run=True to measure only"
)


class LoopCheck:
    """The steps of a clipper by hand, and the updates of its parameters."""

    def __init__(self) -> None:
        """Start before the first step."""
        self.is_watched = False
        """Whether `check_update` is called before each step of an optimizer."""
        self.scaler_rule = ScalerRule()
        self._rows: Rows | None = None
        self._thread = 0
        self._samples = Samples()
        self._backward, self._count = BackwardWatch(), 0
        self._other_model = OtherModelCheck()
        self._restart()
        self._can_warn = True
        self.served: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        """The optimizers that have stepped clipped gradients, as far as is known."""

    def _restart(self) -> None:
        """Count again, and expect nothing of the next update."""
        self._clipped: GradientVersions | None = None
        self._has_clipped_again = self._has_changed = False
        self._early = self._repeated = 0
        self._after_clip, self._left_out = AfterClipCheck(), LeftOutStepCheck()
        self._closure, self._unused = ClosureCheck(), UnusedClipCheck()
        self._used = UsedGradientsCheck()
        self._other_model.restart()
        self._backward.stop()

    @property
    def optimizers(self) -> Iterator[Optimizer]:
        """The optimizers that have stepped parameters of the clipper."""
        return self._samples.optimizers

    def begin(self, stepper: Any, scaler: Any = None, optimizer: Any = None) -> None:
        """Check the place of a step that follows.

        Args:
          stepper, scaler, optimizer: as in `ScalerRule.begin`.

        Raises:
          RuntimeError: as in `ScalerRule.begin`.
        """
        self.scaler_rule.begin(stepper, scaler, optimizer)
        thread, self._thread = self._thread, threading.get_ident()
        is_changed = stepper.rows is not self._rows
        if is_changed or thread != self._thread:
            self._other_model = OtherModelCheck(stepper.rows.parameters)
        if is_changed:
            self._rows = stepper.rows
            self._samples = Samples(self._rows.parameters)
            self.served.clear()
            self._count = 0
        clipped = self._clipped
        is_kept = clipped is not None and clipped.are_kept(self._samples.all)
        self._has_clipped_again |= is_kept
        is_in_step = self._samples.may_be_shared and any(list_step_arguments())
        self._left_out.begin_clip(is_in_step=is_in_step)
        self._used.begin_clip(is_in_step=is_in_step)
        self._unused.begin_clip(is_replaced=clipped is not None and not is_kept)

    def end(self, decision: Decision, *, is_dry: bool) -> None:
        """Note the gradients that the step has clipped.

        A clip inside the step of an optimizer, such as in a hook, is at the right place
        if no closure computes the gradients again.

        Args:
          decision: what the step decided.
          is_dry: whether it changed no gradient.
        """
        open_steps = [
            arguments
            for arguments in list_step_arguments()
            if self._find_own(arguments[0][0])
        ]
        if optimizers := [a[0] for a, kw in open_steps if not find_closure(a, kw)]:
            self.served.update(optimizers)
            self._restart()
            return
        if not open_steps and not is_dry:
            has_gradient = any(p.grad is not None for p in self._samples.all)
            self._unused.end_clip(decision, has_gradient=has_gradient)
        self._closure.end_clip()
        self._clipped = clipped = GradientVersions(self._samples.all)
        if self._count == 0:
            self._after_clip = AfterClipCheck()
        self._other_model.end_clip(decision)
        self._left_out.end_clip(clipped, self._samples.all)
        self._after_clip.end_clip(self._samples.all)
        self._backward.stop()
        # `ClosureCheck` watches what follows a clip in a closure.
        if not open_steps and self._has_changed and self._count < _WATCHED:
            self._backward.start(self._samples.all)
        self._count = (self._count + 1) % _PERIOD

    def check_update(
        self,
        optimizer: Optimizer,
        args: Any,
        kwargs: dict[str, Any],
        is_shared: Callable[[], bool],
        find_others: Callable[[], Set[int]],
    ) -> tuple[Any, dict[str, Any]] | None:
        """Check the place of the step of an optimizer, before it.

        It is not checked in another thread than the last clip, or if the clipper does
        not step by hand.

        Args:
          optimizer: any optimizer.
          args, kwargs: the arguments of its step, as for a hook of torch.
          is_shared: returns whether another clipper clips some of the same parameters.
            It may clip in the other steps.
          find_others: returns the ids of the parameters of all other clippers.

        Returns:
          The arguments with another closure, if that is checked.
        """
        # Another thread may write the gradients of its model while this one reads them.
        if self._rows is None or self._thread != threading.get_ident():
            return None
        own = self._find_own(optimizer)
        if not own:
            self._check_other(optimizer, is_shared, find_others)
            return None
        if self._count <= _WATCHED and optimizer not in self.served:
            if self._left_out.are_clipped(self._samples.all):
                self.served.add(optimizer)
        self._other_model.restart()
        if self.scaler_rule.was_scaled(optimizer):
            self._warn(_SCALED)
        clipped, self._clipped = self._clipped, None
        if self._samples.may_be_shared:
            self._used.begin_update(optimizer, own)
        if clipped is None:
            self._left_out.begin_later_update(optimizer, self._samples.all, own)
        else:
            self._check_first_update(optimizer, clipped, is_shared, find_others)
        closure = find_closure(args, kwargs)
        if closure is None or self._count > _WATCHED:
            return None
        watched = self._closure.watch(
            closure, self._samples.all, self._warn, follows_clip=clipped is not None
        )
        return replace_closure(args, kwargs, watched)

    def _check_first_update(
        self,
        optimizer: Optimizer,
        clipped: GradientVersions,
        is_shared: Callable[[], bool],
        find_others: Callable[[], Set[int]],
    ) -> None:
        """Check the first step after a clip, before it.

        Args:
          optimizer, is_shared, find_others: as in `check_update`.
          clipped: the gradients that were clipped.
        """
        self._left_out.begin_update(optimizer)
        self._has_changed = not clipped.are_same(self._samples.all)
        is_kept = not self._has_changed or clipped.are_kept(self._samples.all)
        self._unused.begin_update(is_replaced=not is_kept)
        if self._has_changed and self._count >= _PAUSE:
            self._count = 0
        self._early = self._early + 1 if self._backward.stop() else 0
        if self._early == _CYCLES:
            self._warn(_EARLY)
        self._repeated = self._repeated + 1 if self._has_clipped_again else 0
        self._has_clipped_again = False
        if self._repeated == _CYCLES:
            self._warn(_REPEATED)
        if text := self._left_out.explain(is_shared, find_others):
            self._warn(text)
        scope = "" if self._rows is None else self._rows.scope
        if text := self._used.explain(scope):
            self._warn(text)
        self._check_changes(self._samples.all)

    def _check_other(
        self,
        optimizer: Optimizer,
        is_shared: Callable[[], bool],
        find_others: Callable[[], Set[int]],
    ) -> None:
        """Warn if the clips were meant for what another optimizer steps.

        Args:
          optimizer, is_shared, find_others: as in `check_update`.
        """
        if text := self._unused.explain(optimizer, is_shared, find_others):
            self._warn(text)
        if text := self._other_model.explain(optimizer):
            self._warn(text)
        if not any(self.optimizers):
            self._check_changes(self._other_model.find_copies(self._samples.all))

    def _check_changes(self, updated: Sequence[Tensor]) -> None:
        """Warn if an update used multiples of the clipped gradients.

        Args:
          updated: the samples, or their copies that an optimizer steps.
        """
        if (text := self._after_clip.explain(updated)) is not None:
            self._warn(text)

    def _find_own(self, optimizer: Optimizer) -> Sequence[Tensor]:
        """Return the samples that an optimizer steps."""
        if (own := self._samples.find(optimizer)) is not None:
            return own
        count, own = len(self._samples), self._samples.add(optimizer)
        if len(self._samples) > count:
            self._restart()
        if own:
            self._count = 0
        return own

    def _warn(self, text: str) -> None:
        if self._can_warn:
            self._can_warn = False
            warn(text)

    def __reduce__(self) -> Any:
        """Copy this object as one that starts before the first step."""
        return type(self), ()
