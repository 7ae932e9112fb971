"""Weights that start at 0 learn at most 3 times as slowly as without a bound.

The bound is that of `TrustClip`: 1 % of max(rms(w), 0.2). The runs without it take at
least 50 steps, and the root mean square of the weights ends at about 0.3.
"""

import pytest
import torch
from torch import nn

from autoclip_core.clipper.trust import make_bound
from autoclip_torch import UpdateClipper


class Linear(nn.Module):
    """A linear model that starts at 0; its bias does, too."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 4)
        for p in self.parameters():
            nn.init.zeros_(p)

    def forward(self, x):
        return self.layer(x)


class Bias(nn.Module):
    """A frozen linear layer whose bias starts at 0."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(truth()[0].clone(), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return x @ self.weight.T + self.bias


class Residual(nn.Module):
    """The last layer of the branch starts at 0."""

    def __init__(self):
        super().__init__()
        self.skip = nn.Linear(8, 4)
        self.branch = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
        for p in self.branch[2].parameters():
            nn.init.zeros_(p)

    def forward(self, x):
        return self.skip(x) + self.branch(x)


class Lora(nn.Module):
    """A frozen layer, and an adapter B A whose B starts at 0."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Parameter(0.1 * torch.randn(4, 8), requires_grad=False)
        self.a = nn.Parameter(torch.randn(4, 8) / 8**0.5)
        self.b = nn.Parameter(torch.zeros(4, 4))
        self.bias = nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return x @ (self.frozen + self.b @ self.a).T + self.bias


def truth():
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(4, 8, generator=generator) / 8**0.5
    return weight, torch.randn(4, generator=generator)


def count_steps(make, optimizer_class, lr, bounded, most):
    """Return the steps until the loss is a hundredth of the first loss."""
    torch.manual_seed(0)
    model, (weight, bias) = make(), truth()
    x = torch.randn(256, 8)
    y = x @ weight.T + bias
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer_class(trained, lr=lr)
    if bounded:
        UpdateClipper(model, optimizer, make_bound(), norm="rms")
    first = None
    for step in range(most):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        first = first or loss.item()
        if loss.item() < 0.01 * first:
            return step
        loss.backward()
        optimizer.step()
    return most


@pytest.mark.parametrize("make", [Linear, Bias, Residual, Lora])
@pytest.mark.parametrize(
    ("optimizer", "lr"), [(torch.optim.AdamW, 0.01), (torch.optim.SGD, 0.05)]
)
def test_the_level_is_reached_within_three_times_the_steps(make, optimizer, lr):
    free = count_steps(make, optimizer, lr, bounded=False, most=2000)
    assert 50 <= free < 2000  # the growth from 0 takes longer than a faster run
    bounded = count_steps(make, optimizer, lr, bounded=True, most=3 * free + 1)
    assert bounded <= 3 * free


@pytest.mark.parametrize("lr", [0.1, 0.2, 0.5])
def test_at_any_high_rate_the_steps_are_as_many(lr):
    """A step changes a weight by about 0.002 up to 0.2, then by 1 %."""
    free = count_steps(Linear, torch.optim.SGD, lr, bounded=False, most=70)
    bounded = count_steps(Linear, torch.optim.SGD, lr, bounded=True, most=300)
    assert bounded == pytest.approx(210, rel=0.05)
    assert bounded > 3 * free
