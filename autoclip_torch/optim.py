"""Optimizers that clip, then step: `AGC(optimizer, 0.04)`, `LARC(optimizer, 0.02)`."""

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from autoclip_core.checks import check_choice, format_error
from autoclip_core.clipper.trust import make_larc

from . import named
from .clipper import Clipper
from .gradients.layout import Gradients
from .hooks.clipped_optimizer import ClippedOptimizer as ClippedOptimizer
from .rows.read import read_optimizer_groups
from .step.amp import LossScale
from .step.stepper import Stepper


class AGC(ClippedOptimizer):
    """Adaptive gradient clipping around an optimizer: `AGC(optimizer, 0.04, 0.003)`.

    Args:
      optimizer: any torch optimizer.
      clipping: see `autoclip_core.ParamRatio`.
      eps: see `autoclip_core.ParamRatio`.
      model: the module of the parameters. With it, `exclude` may name parameters, and
        the units of transposed convolutions are correct.
      **keywords: those of `autoclip_torch.AGC`.

    Raises:
      TypeError, ValueError: an argument breaks its rule; the message says which.

    >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
    >>> optimizer = AGC(torch.optim.SGD([weight], lr=0.1), 0.04, 0.003)
    >>> scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=10)
    >>> weight.grad = torch.tensor([[6.0, 8.0]])
    >>> optimizer.step()
    >>> scheduler.step()
    >>> weight.grad
    tensor([[0.1200, 0.1600]])
    """

    def __init__(
        self,
        optimizer: Optimizer,
        clipping: float = 0.01,
        eps: float = 1e-3,
        *,
        model: torch.nn.Module | None = None,
        **keywords: Any,
    ) -> None:
        groups = read_optimizer_groups(optimizer, model)
        clipper = named.AGC(groups, clipping=clipping, eps=eps, **keywords)
        super().__init__(optimizer, clipper)


class LARC(ClippedOptimizer):
    """Bound the step of plain SGD by the weights: LARC, `LARC(optimizer, 0.02)`.

    The gradient g of a parameter w is scaled so that the length of the step,
    n = lr * |g|, is at most T = trust_coefficient * |w|. lr is the learning rate of its
    group in this step. A learning rate of 0 and weights of 0 leave the gradient
    unchanged. This is apex's `LARC(clip=True)` without its epsilon: a gradient is
    within 1e-6 of that formula in exact arithmetic. The norms of apex are in float32,
    and off by more for a parameter of a million elements. A step whose learning rate is
    NaN or infinite raises a ValueError before it changes a weight. A rate that is a
    tensor is not checked for weights on an accelerator.

    For SGD without momentum and weight decay, lr * |g| is the length of the update, so
    this bounds the update without a copy of the weights. Otherwise it bounds only the
    gradient's part of the update:

    - Weight decay is not part of lr * |g|: the optimizer adds up to
      lr * weight_decay * |w|. apex includes it.
    - Momentum adds up past gradients: the update may be 1 / (1 - momentum) times as
      long.
    - Adam and similar optimizers divide by the size of past gradients. Their update
      hardly depends on the scale of the gradient, so this does not bound it.

    `UpdateClipper` bounds the whole update of any optimizer.

    Args:
      optimizer: any torch optimizer whose groups have a learning rate `lr`.
      trust_coefficient: the largest ratio of update to weights, > 0.
      scope: the gradients that share one norm: those of each "parameter", of each
        output "unit" of each parameter, or of each "group" of the optimizer.
      model: the module of the parameters. With it, `exclude` may name parameters.
      **keywords: those of `autoclip_torch.Clipper`.

    Raises:
      TypeError, ValueError: an argument breaks its rule; the message says which.

    >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> optimizer = LARC(torch.optim.SGD([weight], lr=0.5), 0.02)
    >>> weight.grad = torch.tensor([6.0, 8.0])
    >>> optimizer.step()
    >>> weight.data
    tensor([2.9400, 3.9200])

    Reference:
      You, Gitman, Ginsburg, "Large batch training of convolutional networks", 2017,
      https://arxiv.org/abs/1708.03888
    """

    def __init__(
        self,
        optimizer: Optimizer,
        trust_coefficient: float = 0.02,
        *,
        scope: str = "parameter",
        model: torch.nn.Module | None = None,
        **keywords: Any,
    ) -> None:
        policy = make_larc(trust_coefficient)
        way_out = "the gradients of a row need one learning rate"
        check_choice("scope", scope, ("parameter", "unit", "group"), way_out)
        groups = read_optimizer_groups(optimizer, model)
        clipper = _LARCClip(groups, policy, scope=scope, **keywords)
        clipper.follow(optimizer)
        super().__init__(optimizer, clipper)


class _RateStepper(Stepper):
    """The steps of LARC: the norm of a row is multiplied by its learning rate."""

    optimizer: Optimizer

    def measure(
        self,
        gradients: Sequence[Tensor | None],
        loss_scale: LossScale,
        *others: Gradients,
    ) -> list[Any]:
        """Return the learning rate times the norm of each row; the rest as before."""
        norms, *rest = super().measure(gradients, loss_scale, *others)
        return [self._multiply_by_rates(norms), *rest]

    def _multiply_by_rates(self, norms: Any) -> Any:
        """Return the norm of each row times the present learning rate of its group.

        Raises:
          ValueError: a learning rate is NaN or infinite.
        """
        groups = self.optimizer.param_groups
        number_of = {id(p): i for i, g in enumerate(groups) for p in g["params"]}
        entries, parts = self.rows.by_parameter, []
        for number, same in groupby(entries, lambda e: number_of[id(e.parameter)]):
            members = list(same)
            rate = groups[number]["lr"]
            rate = rate if self.policy_states.device else float(rate)
            if not isinstance(rate, Tensor) and not math.isfinite(rate):
                way_out = "the step would make the weights NaN; correct the schedule"
                raise ValueError(format_error("lr", "finite", rate, way_out))
            parts.append(norms[members[0].start : members[-1].stop] * rate)
        return self.policy_states.xp.concatenate(parts)


class _LARCClip(Clipper):
    """The clipper inside `LARC`."""

    _stepper_class = _RateStepper

    def follow(self, optimizer: Optimizer) -> None:
        """Use the learning rates of an optimizer.

        Raises:
          ValueError: a group has no learning rate.
        """
        for group in optimizer.param_groups:
            if not isinstance(rate := group.get("lr"), float | int | Tensor):
                way_out = "LARC compares lr * |g| with the weights"
                error = format_error(
                    "optimizer", "with lr in each group", rate, way_out
                )
                raise ValueError(error)
        self._stepper.optimizer = optimizer  # type: ignore[attr-defined]

    def _describe(self) -> dict[str, Any]:
        return {**super()._describe(), "class": "LARC"}
