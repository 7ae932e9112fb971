"""`UpdateClipper` clips the change of the weights inside `optimizer.step()`."""

from collections.abc import Iterable
from typing import Any, NoReturn

from torch import nn
from torch.optim import Optimizer

from autoclip_core import Policy
from autoclip_core.checks import check_choice, check_flag
from autoclip_core.clipper.metrics import name_update_metrics
from autoclip_core.clipper.norms import check_norm
from autoclip_core.clipper.patterns import Pattern
from autoclip_core.clipper.settings import SCOPES, PolicyBounds

from .hooks.new_parameters import add_new_parameters, make_clipper
from .observer.observer import Observer
from .update_step.hooks import UpdateHooks, find_innermost
from .update_step.stepper import UpdateStepper


class UpdateClipper(Observer):
    """Clip the change of the weights in each step, by any policy, at any scope.

    It registers itself on the optimizer, which keeps it alive; the training loop needs
    no other line. The norm of a row is that of its update `w_new - w_old`, and the norm
    of its parameters is that of `w_old`. A row whose norm n exceeds its threshold T
    becomes `w_old + T / n * (w_new - w_old)`. Other rows are unchanged bit for bit.
    """

    _stepper_class = UpdateStepper
    _stepper: UpdateStepper
    _hooks: UpdateHooks | None = None

    def __init__(
        self,
        model: nn.Module,
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
        exclude: Pattern | Iterable[Pattern] | None = (),
        scale_only: Pattern | Iterable[Pattern] | None = None,
        dry_run: bool = False,
    ) -> None:
        """Check the arguments, create the rows and register the hooks."""
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model must be a torch.nn.Module, got {type(model).__name__}; write "
                "UpdateClipper(model, optimizer, policy)"
            )
        innermost = find_innermost(optimizer)
        check_choice("scope", scope, SCOPES)
        check_nonfinite(nonfinite)

        def create(groups: Any, **patterns: Any) -> "UpdateClipper":
            Observer.__init__(
                self,
                groups,
                policy,
                scope=scope,
                norm=check_norm(norm),
                nonfinite=nonfinite,
                bounds=PolicyBounds(
                    warmup_steps, warmup_threshold, min_threshold, max_threshold
                ),
                dry_run=check_flag("dry_run", dry_run),
                **patterns,
            )
            return self

        patterns = {"exclude": exclude, "scale_only": scale_only}
        make_clipper(create, patterns, innermost, model)
        self._model = model
        self._register(innermost)

    @property
    def dry_run(self) -> bool:
        """Whether weights stay unchanged; it may be set between steps."""
        return self._stepper.dry_run

    @dry_run.setter
    def dry_run(self, value: bool) -> None:
        self._stepper.dry_run = check_flag("dry_run", value)

    def step(self) -> NoReturn:
        """Raise a RuntimeError: `optimizer.step()` clips.

        Raises:
          RuntimeError: always.
        """
        raise RuntimeError(
            "an update clipper clips inside optimizer.step(); leave clipper.step() out"
        )

    def detach(self) -> None:
        """Remove the clipper from its optimizer."""
        if self._hooks is not None:
            self._hooks.remove()
            self._hooks = None

    def metrics(self, *, per_row: bool = False) -> dict[str, float]:
        """Return the metrics of the last step and of the run, in one transfer.

        Args:
          per_row: whether to add norm, threshold, scale and clip rate of every row, as
            `clip/update_norm/<name>` and so on.

        Returns:
          The names of `autoclip_core.clipper.metrics.compute_metrics`, with
          `clip/update_` in place of `clip/`.
        """
        return name_update_metrics(super().metrics(per_row=per_row))

    def _register(self, innermost: Optimizer) -> None:
        """Register the hooks on an optimizer."""
        self._hooks = UpdateHooks(self._stepper, innermost, self._add_new_parameters)

    def _add_new_parameters(self, optimizer: Any) -> None:
        """Add the parameters that the optimizer got since the last step."""
        add_new_parameters(self, optimizer, self._model)


def check_nonfinite(nonfinite: str) -> None:
    """Refuse to skip an update that the optimizer has made."""
    if nonfinite == "skip":
        raise ValueError(
            'nonfinite must be "zero", "raise" or "propagate" for updates, got "skip": '
            "the optimizer's moments and step count have advanced already; skip in a "
            "Clipper of the gradients, attached to the same optimizer"
        )
    check_choice("nonfinite", nonfinite, ("zero", "raise", "propagate"))
