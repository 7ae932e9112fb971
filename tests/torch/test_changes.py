"""A model changes during a run: dtype, device, freezing, groups, a second clipper.

Each step compares thresholds and gradients with plain lists of norms, one list per
parameter. A change of the model does not interrupt the lists.
"""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from autoclip_core import Fixed
from autoclip_torch import Clipper

from ..support.account import POLICIES

POLICY, threshold_of = POLICIES["quantile"]
WAYS = ("by hand", "attached", "fused", "as optimizer")
EXACT = {torch.float64: 2e-6, torch.float32: 2e-6, torch.bfloat16: 1e-2}
every_way = pytest.mark.parametrize("way", WAYS)


class Run:
    """A model that is trained and clipped in one of the ways.

    Args:
      model: each of its parameters is one row.
      way: one of `WAYS`.
      most: if finite, a second clipper limits each norm to this after the first.
    """

    def __init__(self, model, way, most=math.inf):
        self.model, self.way, self.most, self.steps = model, way, most, 0
        self.parameters, self.past = list(model.parameters()), {}
        self.optimizer = torch.optim.SGD(
            model.parameters(), lr=0.01, fused=way == "fused"
        )
        second = [Fixed(most)] if math.isfinite(most) else []
        self.clippers = [self.clip(policy) for policy in (*second, POLICY)][::-1]
        if way in ("attached", "fused"):
            for clipper in self.clippers:
                clipper.attach(self.optimizer)

    def clip(self, policy):
        """Return a clipper that runs before the existing ones."""
        if self.way != "as optimizer":
            return Clipper(self.model, policy)
        self.optimizer = Clipper.as_optimizer(self.optimizer, policy)
        return self.optimizer.clipper

    def add(self, parameter):
        """Add a group with one more parameter."""
        self.parameters.append(parameter)
        self.optimizer.add_param_group({"params": [parameter]})
        if self.way != "as optimizer":
            for clipper in self.clippers:
                clipper.add_param_group({"params": [parameter]})

    def update(self):
        for clipper in self.clippers if self.way == "by hand" else []:
            clipper.step()
        self.optimizer.step()

    def take(self, steps):
        """Take steps and check each."""
        for _ in range(steps):
            self.steps += 1
            for place, parameter in enumerate(self.parameters):
                parameter.grad = gradient(self.steps, place, parameter)
            before = [
                p.grad if p.grad is None else p.grad.clone() for p in self.parameters
            ]
            self.update()
            clipper = self.clippers[0]
            metrics = clipper.metrics(per_row=True)
            assert metrics["clip/steps"] == self.steps
            rows = zip(clipper.names, self.parameters, before, strict=True)
            for place, (name, parameter, grad) in enumerate(rows):
                past = self.past.setdefault(place, [])
                limit = threshold_of(past)
                assert metrics[f"clip/threshold/{name}"] == pytest.approx(
                    limit, rel=2e-6
                )
                self.check(parameter, grad, min(limit, self.most))
                if grad is not None and grad.numel():
                    past.append(grad.double().norm().item())

    def check(self, parameter, grad, limit):
        """Check that a gradient is unchanged or has the norm of its limit."""
        assert parameter.isfinite().all()
        if grad is None:
            assert parameter.grad is None
            return
        norm = grad.double().norm().item()
        if norm < limit * (1 - 1e-6):
            assert torch.equal(parameter.grad, grad)
        elif norm > limit * (1 + 1e-6):
            wanted = (grad.double() * (limit / norm)).to(grad.dtype)
            exact = {"rtol": EXACT[grad.dtype], "atol": 0}
            torch.testing.assert_close(parameter.grad, wanted, **exact)


def gradient(step, place, parameter):
    """Return a gradient with heavy tails, or None for a frozen parameter."""
    if not parameter.requires_grad:
        return None
    rng = torch.Generator().manual_seed(100 * step + place)
    size = torch.randn((), generator=rng).exp()
    drawn = size * torch.randn(parameter.shape, generator=rng)
    return drawn.to(parameter.device, parameter.dtype)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))


@every_way
def test_a_model_that_does_not_change(way):
    Run(network(), way).take(30)


@every_way
def test_tied_parameters_are_one_row(way):
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    run = Run(model, way)
    assert len(run.clippers[0].names) == 1
    run.take(20)


@every_way
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_dtype_keeps_the_history(way, dtype):
    run = Run(network(), way)
    run.take(12)
    run.model.to(dtype)
    run.take(12)
    run.model.float()
    run.take(6)


@pytest.mark.gpu
@every_way
def test_another_device_keeps_the_history(way):
    run = Run(network(), way)
    run.take(12)
    run.model.to("cuda")
    run.take(12)
    run.model.cpu()
    run.take(6)


@every_way
def test_an_unfrozen_parameter_keeps_its_history(way):
    run = Run(network(), way)
    run.take(10)
    run.model[0].requires_grad_(False)
    run.take(10)
    run.model[0].requires_grad_(True)
    run.take(10)


@every_way
def test_a_later_group_starts_with_an_empty_history(way):
    run = Run(network(), way)
    run.take(10)
    run.add(nn.Parameter(torch.ones(5)))
    run.take(15)


@every_way
def test_two_clippers_on_one_model_clip_one_after_the_other(way):
    Run(network(), way, most=0.8).take(30)


@every_way
def test_an_empty_tensor_does_not_change_other_rows(way):
    model = network()
    model.empty = nn.Parameter(torch.ones(0, 3))
    Run(model, way).take(20)


def test_runs_in_parallel_threads_are_independent():
    """Eight runs in parallel, each checked as if it ran alone."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda way: Run(network(), way).take(30), WAYS * 2))
