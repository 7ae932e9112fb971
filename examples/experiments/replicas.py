"""Many small recurrent networks trained side by side: each is a row of one clipper.

The networks share nothing but the batched matrix products: weights, learning rate,
data, threshold and history are each its own. One process so does the work of many.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from autoclip_core import Decision
from autoclip_torch import Clipper


class Weights(NamedTuple):
    """What a network learns; matrices have the shape (from, to)."""

    inputs: Any
    recurrent: Any
    bias: Any
    outputs: Any
    output_bias: Any


class Replicas:
    """Recurrent networks of one shape, with plain SGD and a clipper's row for each.

    Args:
      starts: the first weights of each network.
      rates: the learning rate of each network.
      activation: `torch.tanh` or `torch.relu`.
    """

    def __init__(self, starts: list[Weights], rates: list[float], activation: Any):
        self.networks = [
            Weights(
                *(nn.Parameter(torch.tensor(w, dtype=torch.float32)) for w in start)
            )
            for start in starts
        ]
        self.rates, self.activation = rates, activation

    def groups(self) -> list[dict[str, Any]]:
        """Return one parameter group per network, for scope="group"."""
        return [{"params": list(network)} for network in self.networks]

    def logits(self, x: Tensor) -> Tensor:
        """Read x, shape (steps, networks, batch, inputs); weigh the classes."""
        w = Weights(*map(torch.stack, zip(*self.networks, strict=True)))
        driven = x @ w.inputs + w.bias.unsqueeze(1)
        state = torch.zeros_like(driven[0])
        for step in driven.unbind():
            state = self.activation(torch.baddbmm(step, state, w.recurrent))
        return torch.baddbmm(w.output_bias.unsqueeze(1), state, w.outputs)

    def step(
        self, x: Tensor, y: Tensor, clipper: Clipper, loss_scale: float = 1.0
    ) -> Decision:
        """Train every network on its batch: labels y of shape (networks, batch).

        `loss_scale` multiplies the loss.
        """
        for network in self.networks:
            for weight in network:
                weight.grad = None
        logits = self.logits(x).flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, y.flatten(), reduction="sum")
        (loss_scale / y.shape[1] * loss).backward()  # the networks share nothing
        decision = clipper.step()
        with torch.no_grad():
            for network, rate in zip(self.networks, self.rates, strict=True):
                for weight in network:
                    weight -= rate * weight.grad
        return decision

    @torch.no_grad()
    def accuracy(self, x: Tensor, y: Tensor) -> Tensor:
        """Return each network's share of right answers."""
        return (self.logits(x).argmax(dim=-1) == y).float().mean(dim=-1)
