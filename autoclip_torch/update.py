"""`UpdateClipper` clips the change of the weights inside `optimizer.step()`."""

from typing import Any, NoReturn

from torch import nn
from torch.optim import Optimizer

from autoclip_core import Policy
from autoclip_core.checks import check_choice, check_flag
from autoclip_core.clipper.metrics import name_update_metrics
from autoclip_core.clipper.settings import SCOPES, PolicyBounds

from .hooks.stepped_parameters import read_stepped
from .observer.observer import Observer
from .rows.selection import Patterns
from .rows.settings import StepCallback
from .update_step.hooks import UpdateHooks, check_has_no_clipper
from .update_step.optimizers import find_innermost
from .update_step.stepper import UpdateStepper


class UpdateClipper(Observer):
    """Clip the change of the weights in each step, by any policy, at any scope.

    It registers itself on the optimizer, which keeps it alive. The training loop needs
    no other line. The norm n of a row is that of its update `w_new - w_old`. The norm
    of its parameters is that of `w_old`. If n exceeds the threshold T, the row becomes
    `w_old + T / n * (w_new - w_old)`. Other rows are unchanged bit for bit.

    A gradient does not depend on the learning rate, the momentum or the preconditioner.
    The update depends on all three, and on the weight decay. `ParamRatio(0.01)` limits
    each update to 1 % of the norm of its weights.

    Weights that start at 0 need a lower bound, or they would hardly move:
    `ParamRatio(0.01, eps=0.2)` with norm="rms" is T = 0.01 * max(rms(w), 0.2), in l2
    norms 0.01 * max(|w|, 0.2 * sqrt(N)) for N elements.

    The persistent cost is one copy of the weights that have a gradient. Of a parameter
    with a sparse gradient only its rows are copied, with SparseAdam, Adagrad, and SGD
    without momentum.

    Args:
      model: the module whose parameters the optimizer steps. With None, the rows have
        the names that the optimizer knows, if any. Parameters that the optimizer gets
        later are added before its next step.
      optimizer: a torch optimizer, or a wrapper that holds one, such as Accelerate's or
        a `ClippedOptimizer`. An optimizer with weights of its own is refused: see
        Raises.
      policy: any policy of `autoclip_core` that does not skip.
      scope: the weights that share one norm: those of each "parameter", of each "group"
        of the optimizer, of each output "unit" of each parameter, or all ("global").
      norm: as in `Clipper`.
      nonfinite: what happens to a row whose update is NaN or infinite. "zero" restores
        `w_old` and warns once. "raise" restores all rows, then raises an error.
        "propagate" leaves the row unchanged. The norm is never recorded.
      warmup_steps, warmup_threshold, min_threshold, max_threshold: as in `Clipper`.
      exclude, scale_only: as in `Clipper`; names are those of the model.
      dry_run: measure, decide and record, but change no weight.
      on_clip: as in `Clipper`; it is called after the weights were clipped.

    Raises:
      TypeError: `model` is neither a module nor None, or `optimizer` is no torch
        optimizer.
      ValueError: the policy or `nonfinite` skips updates. The moments of the optimizer
        have advanced before the update is known, so skip in a `Clipper` of the
        gradients.
      ValueError: the optimizer keeps weights of its own (schedule-free, Lookahead, SAM,
        ASGD, LBFGS, float32 copies, ZeRO), or has an update clipper already.

    >>> import torch
    >>> from autoclip_core import ParamRatio
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> _ = torch.nn.init.ones_(model.weight)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=100.0)
    >>> clipper = UpdateClipper(model, optimizer, ParamRatio(0.01))
    >>> model(torch.tensor([3.0, 3.0])).backward()
    >>> optimizer.step()
    >>> model.weight.data
    tensor([[0.9900, 0.9900]])
    """

    _stepper_class = UpdateStepper
    _stepper: UpdateStepper
    _hooks: UpdateHooks | None = None

    def __init__(
        self,
        model: nn.Module | None,
        optimizer: Any,
        policy: Policy,
        *,
        scope: str = "parameter",
        norm: str = "l2",
        nonfinite: str = "zero",
        warmup_steps: int = 0,
        warmup_threshold: float | None = None,
        min_threshold: float | None = None,
        max_threshold: float | None = None,
        exclude: Patterns = (),
        scale_only: Patterns = None,
        dry_run: bool = False,
        on_clip: StepCallback | None = None,
    ) -> None:
        check_model(model, "UpdateClipper(model, optimizer, policy)")
        innermost = find_innermost(optimizer)
        check_has_no_clipper(innermost)
        check_choice("scope", scope, SCOPES)
        check_nonfinite(nonfinite)
        super().__init__(
            read_stepped([innermost], model),
            policy,
            scope=scope,
            norm=norm,
            nonfinite=nonfinite,
            bounds=PolicyBounds(
                warmup_steps, warmup_threshold, min_threshold, max_threshold
            ),
            exclude=exclude,
            scale_only=scale_only,
            dry_run=check_flag("dry_run", dry_run),
        )
        self.on_clip = on_clip
        self._register(innermost)

    def step(self) -> NoReturn:
        """Raise a RuntimeError: `optimizer.step()` clips.

        Raises:
          RuntimeError: always.

        >>> import torch
        >>> from autoclip_core import ParamRatio
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters())
        >>> clipper = UpdateClipper(model, optimizer, ParamRatio(0.01))
        >>> clipper.step()  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        RuntimeError: an update clipper clips inside optimizer.step(); ...
        """
        raise RuntimeError(
            "an update clipper clips inside optimizer.step(); leave clipper.step() "
            "out; to log, call log.record(clipper.metrics()) after optimizer.step()"
        )

    def _detach(self) -> None:
        if self._hooks is not None:
            self._hooks.remove()
            self._hooks = None
        self._coverage.end()

    def _read_metrics(self, per_row: bool) -> dict[str, float]:
        return name_update_metrics(super()._read_metrics(per_row))

    def _register(self, innermost: Optimizer) -> None:
        self._hooks = UpdateHooks(self, self._stepper, innermost)


def check_nonfinite(nonfinite: str) -> None:
    """Refuse to skip an update that the optimizer has made."""
    if nonfinite == "skip":
        raise ValueError(
            'nonfinite must be "zero", "raise" or "propagate" for updates, got "skip": '
            "the optimizer's moments and step count have advanced already; skip in a "
            "Clipper of the gradients, attached to the same optimizer"
        )
    check_choice("nonfinite", nonfinite, ("zero", "raise", "propagate"))


def check_model(model: Any, call: str) -> None:
    """Refuse a first argument that is not the model.

    Raises:
      TypeError: it is neither a module nor None; the message shows the call.
    """
    if not isinstance(model, nn.Module | None):
        raise TypeError(
            f"model must be a torch.nn.Module or None, got {type(model).__name__}; "
            f"write {call}"
        )
