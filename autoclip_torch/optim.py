"""Optimizers that clip, then step: `AGC(optimizer, 0.04, 0.003)`."""

from typing import Any

import torch
from torch.optim import Optimizer

from . import named
from .hooks.clipped_optimizer import ClippedOptimizer as ClippedOptimizer
from .rows.groups import read_optimizer_groups


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
        """Create the clipper of the optimizer's parameters."""
        groups = read_optimizer_groups(optimizer, model)
        clipper = named.AGC(groups, clipping=clipping, eps=eps, **keywords)
        super().__init__(optimizer, clipper)
