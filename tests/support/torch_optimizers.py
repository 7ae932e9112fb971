"""Optimizers, clippers around them, a network, and its usual training script."""

import pytest
import torch
from torch import nn

from autoclip_core import Cap, Quantile
from autoclip_torch import (
    Clipper,
    QuantileClip,
    StandardClip,
    ValueClip,
    optim,
)

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "SGD foreach": lambda p: torch.optim.SGD(p, lr=0.1, foreach=True),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "Adam foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "Adam fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}
CLIPPERS = {
    "quantile": lambda o, m: QuantileClip.as_optimizer(
        o, quantile=0.5, history_length=4
    ),
    "standard": lambda o, m: StandardClip.as_optimizer(
        o, deviations=0.5, global_clipping=True, model=m
    ),
    "agc": lambda o, m: optim.AGC(o, 0.04, 0.003, model=m),
    "value": lambda o, m: ValueClip.as_optimizer(o, clip_value=0.05),
    "any policy": lambda o, m: Clipper.as_optimizer(
        o, Cap(Quantile(0.9), max_norm=0.1), scope="group"
    ),
}

every_clipper = pytest.mark.parametrize("wrap", CLIPPERS.values(), ids=list(CLIPPERS))


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.Tanh(), nn.ConvTranspose1d(4, 2, 3), nn.Flatten(),
        nn.Linear(12, 3),
    )  # fmt: skip


def batches(steps, seed=1):
    """Yield inputs and targets; every third batch has ten times larger inputs."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        x = torch.randn(8, 2, 6, generator=generator)
        y = torch.randint(3, (8,), generator=generator)
        yield x * (10 if step % 3 == 2 else 1), y


def backward(model, optimizer, batch):
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    return loss


def train(model, optimizer, steps, after=lambda: None):
    """Run the usual training script."""
    for batch in batches(steps):
        backward(model, optimizer, batch)
        optimizer.step()
        after()


def train_by_hand(model, clipper, optimizer, steps, after=lambda: None):
    clipped = 0
    for batch in batches(steps):
        backward(model, optimizer, batch)
        clipped += clipper.step().clipped.sum().item()
        optimizer.step()
        after()
    assert clipped > 0, "nothing was clipped"


def assert_same_weights(one, other):
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    for p, q in pairs:
        torch.testing.assert_close(p, q, rtol=0, atol=0)


def assert_same_state(one, other):
    """Check that two nested state dicts are equal bit for bit."""
    if isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same_state(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for x, y in zip(one, other, strict=True):
            assert_same_state(x, y)
    elif isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    else:
        assert one == other


def assert_same_clipper(one, other):
    """Check that two clippers have the same history, class and settings."""
    assert_same_state(one.state_dict(), other.state_dict())


def trained(wrap=CLIPPERS["quantile"], name="Adam", steps=4):
    model = network()
    optimizer = wrap(OPTIMIZERS[name](model.parameters()), model)
    train(model, optimizer, steps)
    return model, optimizer
