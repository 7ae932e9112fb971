"""`Clipper`: the gradients are clipped in `step()`, by hand or in an optimizer's."""

from collections.abc import Iterable
from typing import Any

import torch

from autoclip_core import Decision, Policy
from autoclip_core.checks import check_flag
from autoclip_core.clipper.patterns import Pattern
from autoclip_core.clipper.settings import PolicyBounds, choose_scope

from .hooks.attach import Attachment
from .hooks.clipped_optimizer import ClippedOptimizer
from .hooks.fused import is_fused
from .hooks.momentum import start_from_zero
from .observer import Observer
from .rows.groups import Given, optimizer_groups
from .step.amp import check_unscaled, share_overflow, unscale_once
from .step.unwrap import unwrap


class Clipper(Observer):
    """Clip gradients in place by any policy, at any scope.

    Call `step()` after `backward()` and before `optimizer.step()`.

    Args:
      parameters: a module, or an iterable of parameters, of (name, parameter) pairs or
        of groups `{"params": ..., "policy": ...}`, each with a policy of its own.
      policy: any policy of `autoclip_core`.
      scope: the gradients that share one norm: each "parameter" (the default), each
        "group", all of them ("global"), or each output "unit" of each parameter.
      global_clipping: the older spelling of `scope="global"`.
      nonfinite: what becomes of a row whose norm is NaN or infinite: "zero" sets its
        gradient to 0, "skip" cancels the whole update (every gradient becomes None,
        those of excluded parameters too), "raise" raises, "propagate" leaves it as it
        came. It is never recorded.
      warmup_steps: norms that each row records before the policy takes over, >= 0.
      warmup_threshold: the threshold until then, > 0; by default nothing is clipped.
      min_threshold: the threshold is never below this, > 0.
      max_threshold: the threshold is never above this, > 0, the warm-up included.
      exclude: parameters to leave out: names, names of modules, patterns with `*`,
        compiled regular expressions, or functions of (name, parameter).
      dry_run: observe, decide and learn, but touch no gradient.
      max_consecutive_skips: how many updates may be cancelled in a row before `step`
        (on an accelerator: `metrics`) raises a RuntimeError.
      process_group: the ranks that hold different parameters of one model, such as the
        stages of a pipeline, or experts: squared norms are summed over them, and every
        one must call `step`. The rows must be the same on all, as with scope="global".
        Sharded parameters (`DTensor`) bring their ranks along and need none.

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
        parameters: Given,
        policy: Policy,
        *,
        scope: str | None = None,
        global_clipping: bool | None = None,
        nonfinite: str = "zero",
        warmup_steps: int = 0,
        warmup_threshold: float | None = None,
        min_threshold: float | None = None,
        max_threshold: float | None = None,
        exclude: Pattern | Iterable[Pattern] | None = (),
        dry_run: bool = False,
        max_consecutive_skips: int | None = None,
        process_group: Any = None,
    ) -> None:
        """Check the arguments and lay out the rows."""
        super().__init__(
            parameters,
            policy,
            scope=choose_scope(scope, global_clipping, self._default_scope),
            nonfinite=nonfinite,
            bounds=PolicyBounds(
                warmup_steps, warmup_threshold, min_threshold, max_threshold
            ),
            exclude=exclude,
            dry_run=check_flag("dry_run", dry_run),
            most_skips=max_consecutive_skips,
            process_group=process_group,
        )
        self._attachment: Attachment | None = None

    @property
    def dry_run(self) -> bool:
        """Whether every gradient is left alone; it may be set between steps."""
        return self._stepper.dry_run

    @dry_run.setter
    def dry_run(self, value: bool) -> None:
        self._stepper.dry_run = check_flag("dry_run", value)

    def step(self, *, scaler: Any = None, optimizer: Any = None) -> Decision:
        """Measure the gradients, decide, scale them in place, and learn their norms.

        Args:
          scaler: a `torch.amp.GradScaler`, given together with `optimizer`. It unscales
            the gradients first if it has not, and a step that overflowed is no norm to
            learn from. Without it, call `scaler.unscale_(optimizer)` before this:
            scaled gradients have no threshold, and an infinity that is set to 0 before
            `unscale_` would never lower the loss scale.
          optimizer: the optimizer whose gradients the scaler unscales.

        Returns:
          A `Decision` of tensors with one entry per row (see `names`), on the
          gradients' device. On an accelerator nothing is read back to the host, except
          with `nonfinite="raise"` or where an update may have to be skipped.

        Raises:
          FloatingPointError: a norm is not finite and `nonfinite="raise"`; no gradient
            and no history was changed.
          RuntimeError: more than `max_consecutive_skips` updates in a row were skipped;
            the scaler has stepped the optimizer already; or the clipper is attached and
            clips inside the optimizer's step.
          ValueError: a gradient of another optimizer is still multiplied by the scale.

        >>> from autoclip_core import Fixed
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> clipper = Clipper([weight], Fixed(1.0))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> clipper.step().scale, weight.grad
        (tensor([0.2000]), tensor([0.6000, 0.8000]))
        """
        if not torch.compiler.is_compiling() and self._is_attached:
            raise RuntimeError(
                "an attached clipper clips inside optimizer.step(), and a second time "
                "in a step it would clip what it has clipped; leave clipper.step() "
                "out, or call clipper.detach() first"
            )
        if scaler is None and optimizer is None:
            return self._stepper.step()
        scale = unscale_once(scaler, optimizer)
        if scale.overflow is None:  # the scaler is not enabled
            return self._stepper.step()
        optimizer, stepper = unwrap(optimizer), self._stepper
        check_unscaled(stepper.rows.parameters, scaler, optimizer)
        if is_fused(optimizer):  # the scaler may cancel its first step
            start_from_zero(optimizer)
        decision = stepper.step(scale)
        if stepper.ranks is not None:
            share_overflow(scaler, optimizer, scale.overflow)
        return decision

    def attach(self, optimizer: Any) -> Attachment:
        """Clip inside `optimizer.step()`; the loop has no other line to add.

        With a closure (LBFGS, Lightning) clipping follows each backward in it. Wrappers
        such as Accelerate's are looked through. After a `GradScaler` overflow nothing
        is learned. With `fused=True`, gradients that share one norm are scaled in the
        optimizer's own kernel, and a cancelled update is cancelled there: no pass over
        the gradients, nothing read back; there, nonfinite="zero" cancels the update.
        A cancelled update cancels all that the optimizer steps, once every clipper that
        is attached to it has seen its gradients.

        Args:
          optimizer: the torch optimizer of these parameters, or a wrapper around it.

        Returns:
          A handle; `remove()` ends the attachment. A copied or unpickled optimizer has
          no hooks: attach to it anew.

        Raises:
          RuntimeError: the clipper is attached already.
          ValueError: the optimizer does not step all that the clipper has and trains.
          TypeError: it is no torch optimizer.

        >>> from autoclip_core import Fixed
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> handle = Clipper([weight], Fixed(1.0)).attach(optimizer)
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> optimizer.step()
        >>> weight.data
        tensor([-0.6000, -0.8000])
        """
        if self._is_attached:
            raise RuntimeError(
                "the clipper is attached already, and twice in a step it would clip "
                "what it has clipped; call remove() on the handle first, or make a "
                "clipper for each optimizer"
            )
        optimizer = unwrap(optimizer)
        if getattr(optimizer, "clipper", None) is self:
            raise RuntimeError(
                "this optimizer was made by as_optimizer() and clips already; leave "
                "attach() out"
            )
        self._attachment = Attachment(self._stepper, optimizer)
        return self._attachment

    def detach(self) -> None:
        """End the attachment, if there is one.

        >>> from autoclip_core import Fixed
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> clipper = Clipper([weight], Fixed(1.0))
        >>> handle = clipper.attach(torch.optim.SGD([weight]))
        >>> clipper.detach()
        >>> handle.active
        False
        """
        if self._attachment is not None:
            self._attachment.remove()
            self._attachment = None

    @property
    def _is_attached(self) -> bool:
        return self._attachment is not None and self._attachment.active

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
          optimizer: any torch optimizer; each of its groups is a group here, and none
            of its settings is read.
          *policy: the policy of a `Clipper`; of a named clipper the argument that may
            follow the parameters by position, such as the quantile.
          model: the module the parameters belong to, for their names and layers.
          **keywords: what the constructor accepts.

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
        clipper = cls(optimizer_groups(optimizer, model), *policy, **keywords)
        return ClippedOptimizer(optimizer, clipper)
