"""A small torch model, its training loop, and the clippers that tests try on it."""

import math
from typing import NamedTuple

import pytest
import torch
from torch import nn

from autoclip_torch import (
    AGC,
    AdaGC,
    Clipper,
    NormClip,
    QuantileClip,
    StandardClip,
    ZClip,
)

from .cases import policy_of

SCOPES = ("parameter", "group", "global", "unit")
every_scope = pytest.mark.parametrize("scope", SCOPES)


class Case(NamedTuple):
    """A clipper class, its keywords, and its policy in the words of the oracle."""

    make: type
    keywords: dict
    code: str
    default_scope: str = "parameter"

    def __call__(self, parameters, **more):
        return self.make(parameters, **self.keywords, **more)


def generic(code):
    """Return the case of the generic `Clipper` with a policy."""
    return Case(Clipper, {"policy": policy_of(code)}, code)


# Histories and warm-ups are short: a short run fills the first and ends the second.
CLIPPERS = {
    "QuantileClip": Case(
        QuantileClip,
        {"quantile": 0.8, "history_length": 20},
        "Quantile(0.8, history_length=20)",
    ),
    "QuantileClip, the paper's": Case(
        QuantileClip,
        {"quantile": 0.3, "history_length": None, "include_current": True},
        "Quantile(0.3, history_length=None, include_current=True)",
    ),
    "QuantileClip, limited": Case(
        QuantileClip,
        {
            "quantile": 0.7,
            "history_length": 25,
            "warmup_steps": 6,
            "warmup_threshold": 0.4,
            "min_threshold": 0.05,
            "max_threshold": 1.5,
        },
        "Cap(Floor(Warmup(Quantile(0.7, history_length=25), steps=6, threshold=0.4),"
        " min_norm=0.05), max_norm=1.5)",
    ),
    "StandardClip": Case(
        StandardClip,
        {"deviations": 1.0, "history_length": 16},
        "MeanStd(1.0, history_length=16)",
    ),
    "StandardClip, of logarithms": Case(
        StandardClip,
        {"deviations": 1.5, "history_length": 24, "log": True, "ddof": 0},
        "MeanStd(1.5, history_length=24, log=True, ddof=0)",
    ),
    "AGC": Case(
        AGC, {"clipping": 0.5, "eps": 0.01}, "ParamRatio(0.5, eps=0.01)", "unit"
    ),
    "ZClip": Case(
        ZClip,
        {"z": 1.5, "alpha": 0.9, "warmup_steps": 10},
        "ZScore(1.5, alpha=0.9, warmup_steps=10)",
        "global",
    ),
    "ZClip, to the mean": Case(
        ZClip,
        {"z": 2.0, "warmup_steps": 5, "target": "mean", "record": "applied"},
        "ZScore(2.0, warmup_steps=5, target='mean', record='applied')",
        "global",
    ),
    "AdaGC": Case(
        AdaGC,
        {"ratio": 1.2, "beta": 0.9, "warmup_steps": 8, "warmup_threshold": 0.5},
        "EmaRatio(1.2, beta=0.9, warmup_steps=8, warmup_threshold=0.5)",
    ),
    "NormClip": Case(NormClip, {"max_norm": 0.5}, "Fixed(0.5)", "global"),
    "StreamingQuantile": generic("StreamingQuantile(0.7, rate=0.2)"),
    "Drop": generic("Drop(Quantile(0.8, history_length=20))"),
    "Drop, and clip": generic(
        "Drop(Quantile(0.9, history_length=20), clip=Fixed(0.5))"
    ),
    "Drop, to skip": generic("Drop(Quantile(0.9, history_length=30), action='skip')"),
    "Scheduled": generic("Scheduled([(0, 2.0), (6, 0.5), (200, 1.0)])"),
}
every_clipper = pytest.mark.parametrize("case", CLIPPERS.values(), ids=list(CLIPPERS))


def clippers_and_scopes(names=CLIPPERS, scopes=SCOPES):
    """Parametrize a test by clippers and scopes, without all their pairs.

    A policy receives rows and does not know the scope, so the clippers take turns at
    the scopes. Three run at every scope: `QuantileClip`; `AGC`, which also measures the
    parameters of a row; "Drop, to skip", in which one row cancels the update of all.
    """
    everywhere = {"QuantileClip", "AGC", "Drop, to skip"}
    pairs = [
        pytest.param(CLIPPERS[name], scope, id=f"{name}-{scope}")
        for number, name in enumerate(names)
        for place, scope in enumerate(scopes)
        if name in everywhere or place == number % len(scopes)
    ]
    return pytest.mark.parametrize(("case", "scope"), pairs)


# A model to train.


def small_model(seed=0):
    """Return a network of 6 parameters that has rows at every scope."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.LayerNorm(3), nn.Linear(3, 2))


def batches(steps, seed=1, spread=1.0):
    """Yield batches with a factor for the loss: the gradients have heavy tails."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(8, 4, generator=generator)
        factor = torch.exp(spread * torch.randn((), generator=generator))
        yield x, torch.stack([x.sum(1), x[:, 0] * x[:, 1]], 1), factor


def backward(model, batch):
    """Compute the gradients of one batch; return the loss."""
    x, y, factor = batch
    model.zero_grad()
    output = model(x.to(next(model.parameters()).dtype))
    loss = factor * (output - y[:, : output.shape[1]]).square().mean()
    loss.backward()
    return loss


def spoil(parameters, rng):
    """Make some gradients non-finite, zero or missing, at random."""
    for parameter in parameters:
        draw = rng.random()
        if draw < 0.02:
            parameter.grad.view(-1)[-1] = math.nan
        elif draw < 0.04:
            parameter.grad.view(-1)[0] = -math.inf
        elif draw < 0.1:
            parameter.grad.zero_()
        elif draw < 0.2:
            parameter.grad = None


def train(model, clipper, steps, optimizer=None, seed=1):
    """Train; yield each step's number, gradients before clipping, and decision."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.05)
    for step, batch in enumerate(batches(steps, seed)):
        backward(model, batch)
        before = [p.grad.clone() for p in model.parameters()]
        decision = clipper.step()
        yield step, before, decision
        optimizer.step()


def bits(tensor):
    """Return the bits of a float32 tensor: -0.0 differs from 0.0, NaN equals NaN."""
    return tensor.detach().contiguous().view(torch.int32)


def check_same(first, second, path="state"):
    """Check that two states, decisions or lists are equal, tensors bit for bit."""
    assert type(first) is type(second), path
    if isinstance(first, torch.Tensor):
        assert (first.dtype, first.shape) == (second.dtype, second.shape), path
        pair = (t.detach().reshape(-1).view(torch.uint8) for t in (first, second))
        assert torch.equal(*pair), path
    elif isinstance(first, dict):
        assert list(first) == list(second), path
        for key, value in first.items():
            check_same(value, second[key], f"{path}.{key}")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), path
        for index, pair in enumerate(zip(first, second, strict=True)):
            check_same(*pair, f"{path}[{index}]")
    else:
        assert first == second, path


def gradients_of(parameters):
    return [parameter.grad for parameter in parameters]
