"""`Clipper` clips gradients in its own `step()`, or inside an optimizer's `step()`."""

from functools import partial
from typing import Any

import torch
from torch.optim.optimizer import _global_optimizer_pre_hooks

from autoclip_core import Decision, Policy
from autoclip_core.checks import check_flag
from autoclip_core.clipper.settings import PolicyBounds, choose_scope

from .hooks.attachable import Attachable
from .hooks.clipped_optimizer import ClippedOptimizer
from .hooks.clipper_chain import refuse_beside_trust_clip
from .hooks.fused import is_fused
from .hooks.momentum import initialize_momentum
from .hooks.optimizer_wrapper import check_is_optimizer
from .loop.loop_check import LoopCheck
from .observer.active_clippers import check_coverage, find_known, is_shared
from .optimizer_steps.global_hook import add_hook
from .optimizer_steps.weak_hook import WeakHook
from .rows.read import ParametersLike, read_optimizer_groups
from .rows.selection import Patterns
from .rows.settings import StepCallback
from .step.amp import NO_SCALE, check_unscaled, share_overflow, unscale_once
from .step.unwrap import unwrap


class Clipper(Attachable):
    """Clip gradients in place by any policy, at any scope.

    Call `step()` after `backward()` and before `optimizer.step()`.

    Args:
      parameters: a module, or an iterable. The iterable yields parameters,
        (name, parameter) pairs, or groups `{"params": ..., "policy": ...}`; a group may
        have its own policy. If the parameters of a module change, the clipper follows.
      policy: any policy of `autoclip_core`.
      scope: the gradients that share one norm: those of each "parameter" (the default),
        of each "group", of each output "unit" of each parameter, or all ("global").
      global_clipping: the older spelling of `scope="global"`.
      norm: the norm of a row: "l2"; "rms", the l2 norm divided by the square root of
        the number of elements; or "max", the largest magnitude. Thresholds, recorded
        norms and the norms of parameters are norms of this kind. `autoclip_core.
        clipper.norms` has the formulas.
      nonfinite: what happens to a row whose norm is NaN or infinite. "zero" sets its
        gradient to 0. "skip" cancels the whole update: every gradient becomes None,
        also those of excluded parameters. "raise" raises an error. "propagate" leaves
        the gradient unchanged. The norm is never recorded.
      warmup_steps: norms that each row records before the policy applies, >= 0.
      warmup_threshold: the threshold until then, > 0; by default nothing is clipped.
      min_threshold: the threshold is never below this, > 0.
      max_threshold: the threshold is never above this, > 0, also during the warm-up.
      exclude: parameters to leave out: names, names of modules, patterns with `*`,
        compiled regular expressions, or functions of (name, parameter).
      scale_only: the parameters that clipping scales, in the forms of `exclude`; by
        default all. The others belong to the norm of their row and are not scaled. A
        row that is not finite, dropped or skipped is still removed as a whole. In a
        decision, `scale` is then the norm after divided by the norm before.
      dry_run: measure, decide and record, but change no gradient.
      loss_policy: a policy for the loss, such as `MeanStd(6.0, history_length=128)`. A
        loss above its threshold cancels the update; norms and loss are recorded. A loss
        that is not finite cancels it, too, and nothing is recorded. Each step then
        needs its loss: `step(loss=loss)`, or `observe_loss(loss)` before it.
      max_consecutive_skips: if more updates in a row are skipped, `step` raises a
        RuntimeError (on an accelerator, `metrics` does).
      process_group: the ranks that hold different parameters of one model, such as the
        stages of a pipeline, or experts. The norms of these ranks are combined, and
        every rank must call `step`. All ranks must have the same rows, as with
        scope="global". Sharded parameters (`DTensor`) hold their ranks and need no
        group.
      replicated: the plain parameters that every rank of `process_group` holds, in the
        forms of `exclude`. They count once. The others differ from rank to rank.
      on_clip: a function that is called if a row was clipped, dropped or not finite;
        the attribute `on_clip` has its arguments.
      on_skip: a function that is called if the update was skipped.

    Raises:
      ValueError, TypeError: an argument breaks its rule; the message says which.

    >>> from autoclip_core import Fixed
    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> clipper = Clipper([weight], Fixed(1.0))
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> decision = clipper.step()
    >>> weight.grad, decision.norm
    (tensor([0.6000, 0.8000]), tensor([5.]))
    """

    _default_scope = "parameter"

    def __init__(
        self,
        parameters: ParametersLike,
        policy: Policy,
        *,
        scope: str | None = None,
        global_clipping: bool | None = None,
        norm: str = "l2",
        nonfinite: str = "zero",
        warmup_steps: int = 0,
        warmup_threshold: float | None = None,
        min_threshold: float | None = None,
        max_threshold: float | None = None,
        exclude: Patterns = (),
        scale_only: Patterns = None,
        dry_run: bool = False,
        loss_policy: Policy | None = None,
        max_consecutive_skips: int | None = None,
        process_group: Any = None,
        replicated: Patterns = None,
        on_clip: StepCallback | None = None,
        on_skip: StepCallback | None = None,
    ) -> None:
        super().__init__(
            parameters,
            policy,
            scope=choose_scope(scope, global_clipping, self._default_scope),
            norm=norm,
            nonfinite=nonfinite,
            bounds=PolicyBounds(
                warmup_steps, warmup_threshold, min_threshold, max_threshold
            ),
            exclude=exclude,
            scale_only=scale_only,
            dry_run=check_flag("dry_run", dry_run),
            loss_policy=loss_policy,
            most_skips=max_consecutive_skips,
            process_group=process_group,
            replicated=replicated,
        )
        self.on_clip, self.on_skip = on_clip, on_skip
        self._loop_check = LoopCheck()

    def step(
        self, *, loss: Any = None, scaler: Any = None, optimizer: Any = None
    ) -> Decision:
        """Measure the gradients, decide, scale them in place, and record their norms.

        Args:
          loss: as in `observe_loss`.
          scaler: a `torch.amp.GradScaler`, together with `optimizer`. It unscales the
            gradients first, unless it already has. A step that overflowed is not
            recorded. Without this argument, call `scaler.unscale_(optimizer)` first:
            a threshold has no meaning for scaled gradients, and an infinity that is set
            to 0 before `unscale_` would never lower the loss scale.
          optimizer: the optimizer whose gradients the scaler unscales.

        Returns:
          A `Decision` of tensors with one entry per row (see `names`), on the
          gradients' device. On an accelerator nothing is read back, except with
          `nonfinite="raise"` or if an update may have to be skipped.

        Raises:
          FloatingPointError: a norm is not finite and `nonfinite="raise"`; no gradient
            and no history was changed.
          RuntimeError: more than `max_consecutive_skips` updates in a row were skipped.
          RuntimeError: the scaler has stepped the optimizer already, or this clipper
            has been called since `scaler.update()`.
          RuntimeError: another rank left out a step, and the ranks sum norms.
          RuntimeError: the clipper is attached and clips inside the optimizer's step;
            or the optimizer has a `TrustClip`, which is known from the second step on.
          ValueError: a gradient of another optimizer is still multiplied by the scale;
            or the loss is missing, or given without `loss_policy`.

        >>> from autoclip_core import Fixed
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> clipper = Clipper([weight], Fixed(1.0))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> clipper.step().scale, weight.grad
        (tensor([0.2000]), tensor([0.6000, 0.8000]))
        """
        if torch.compiler.is_compiling():
            return self._step(loss, scaler, optimizer)
        self._refuse_if_attached()
        for each in self._loop_check.optimizers:
            refuse_beside_trust_clip(self._stepper, each)
        given = None if optimizer is None else unwrap(optimizer)
        self._parameters.follow(given)
        if not self._coverage.steps:
            self._coverage.end_all()
        check_coverage(self, self._loop_check.served)
        decision = self._step(loss, scaler, optimizer)
        self._loop_check.end(decision, is_dry=self.dry_run)
        return decision

    def _step(self, loss: Any, scaler: Any, optimizer: Any) -> Decision:
        """Step by hand with the parameters of the present."""
        if loss is not None:
            self.observe_loss(loss)
        stepper, scale = self._stepper, NO_SCALE
        if scaler is not None or optimizer is not None:
            scale = unscale_once(scaler, optimizer)
        if scale.overflow is None:  # there is no scaler, or it is not enabled
            self._check_place()
            return stepper.step()
        optimizer = unwrap(optimizer)
        check_unscaled(stepper.rows.parameters, scaler, optimizer)
        self._check_place(scaler, optimizer)
        if is_fused(optimizer):  # the scaler may cancel its first step
            initialize_momentum(optimizer)
        decision = stepper.step(scale)
        if stepper.ranks is not None:
            share_overflow(scaler, optimizer, scale.overflow)
        return decision

    def _before_update(self, optimizer: Any, args: Any, kwargs: Any) -> Any:
        """Check the place of this step, if the clipper steps by hand."""
        check = self._loop_check.check_update
        find_others = partial(find_known, other_than=self)
        return check(optimizer, args, kwargs, partial(is_shared, self), find_others)

    def _check_place(self, *scaler_and_optimizer: Any) -> None:
        """Check at which place of the training loop this step is.

        A dry run may measure anywhere, except gradients that a scaler unscales once.
        """
        if torch.compiler.is_compiling() or (self.dry_run and not scaler_and_optimizer):
            return
        if not self._loop_check.is_watched:
            self._loop_check.is_watched = True
            add_hook(_global_optimizer_pre_hooks, WeakHook(self._before_update))
        self._loop_check.begin(self._stepper, *scaler_and_optimizer)

    @classmethod
    def as_optimizer(
        cls,
        optimizer: torch.optim.Optimizer,
        *policy: Any,
        model: torch.nn.Module | None = None,
        **keywords: Any,
    ) -> ClippedOptimizer:
        """Return an optimizer that clips, then steps.

        Args:
          optimizer: any torch optimizer. Each of its groups is a group of the clipper;
            none of its settings is read.
          *policy: the policy of a `Clipper`; of a named clipper the argument that may
            follow the parameters by position, such as the quantile.
          model: the module the parameters belong to, for their names and layers.
          **keywords: the keywords of the constructor.

        Raises:
          TypeError, ValueError: an argument breaks its rule; the message says which.

        >>> from autoclip_torch import NormClip
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> adam = torch.optim.Adam([weight], lr=1e-3)
        >>> optimizer = NormClip.as_optimizer(adam, max_norm=1.0)
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> optimizer.step()
        >>> weight.grad
        tensor([0.6000, 0.8000])
        """
        check_is_optimizer(optimizer)
        clipper = cls(read_optimizer_groups(optimizer, model), *policy, **keywords)
        return ClippedOptimizer(optimizer, clipper)
