"""LAMB: Adam whose update of each parameter is as long as a share of its weights.

You, Li, Reddi and others, "Large batch optimization for deep learning: training BERT in
76 minutes" (2020), Algorithm 2, with the identity for the function of the norm.
"""

from typing import Any

import torch


class LAMB(torch.optim.Optimizer):
    """w ← w − lr · (‖w‖ / ‖u‖) · u with u = m̂ / (√v̂ + eps) + weight_decay · w.

    A ratio with a zero in it is 1.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ) -> None:
        rest = {"betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {"lr": lr, **rest})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group)

    def _update(self, weight: Any, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[weight], group["betas"]
        if not state:
            zeros = torch.zeros_like(weight)
            state.update(step=0, mean=zeros, square=zeros.clone())
        state["step"] += 1
        state["mean"].lerp_(weight.grad, 1 - beta1)
        state["square"].lerp_(weight.grad.square(), 1 - beta2)
        mean = state["mean"] / (1 - beta1 ** state["step"])
        square = state["square"] / (1 - beta2 ** state["step"])
        update = mean / (square.sqrt() + group["eps"]) + group["weight_decay"] * weight
        ratio = weight.norm() / update.norm()
        trust = torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, 1.0)
        weight.sub_(group["lr"] * trust * update)
