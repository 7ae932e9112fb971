"""`optim.LARC` bounds lr * |g| by a fraction of |w|, like apex's `LARC(clip=True)`."""

import copy
import math
import pickle
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from autoclip_torch import optim

from ...support.torch_device import give, nothing_read, unwatched, watched
from ...support.torch_optimizers import assert_same_weights, batches, network, train

TRUST, EPS = 0.02, 1e-8


def larc_scale(weight, gradient, rate):
    """Return the factor of a gradient after apex's formula, in float64."""
    w, g = (np.linalg.norm(np.float64(x.detach())) for x in (weight, gradient))
    if w == 0 or g == 0 or rate == 0:
        return 1.0
    return min(TRUST * w / (g + EPS) / rate, 1.0)


def train_as_apex(model, optimizer, steps, after):
    """Train with scaled gradients; return all scales."""
    scales = []
    for x, y in batches(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        for group in optimizer.param_groups:
            for p in group["params"]:
                scales.append(larc_scale(p, p.grad, group["lr"]))
                p.grad = (np.float64(scales[-1]) * p.grad.double()).float()
        optimizer.step()
        after()
    return scales


def sgd(model, momentum=0.0):
    """Return SGD with a second group whose learning rate is 100 times lower."""
    head, body = list(model[4].parameters()), list(model[:4].parameters())
    groups = [{"params": body}, {"params": head, "lr": 0.003}]
    return torch.optim.SGD(groups, lr=0.3, momentum=momentum)


def warm_up_from_0(optimizer):
    return lr_scheduler.LambdaLR(optimizer, lambda step: step / 4)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_it_agrees_with_apex_without_weight_decay(momentum):
    """The learning rate rises from 0, and differs between the groups."""
    reference, model = network(), network()
    for m in (reference, model):
        nn.init.zeros_(m[4].bias)
    optimizer = sgd(reference, momentum)
    scales = train_as_apex(reference, optimizer, 12, warm_up_from_0(optimizer).step)
    assert 0.2 < np.mean(np.array(scales) < 1) < 0.8
    clipped = optim.LARC(sgd(model, momentum), TRUST)
    train(model, clipped, 12, warm_up_from_0(clipped).step)
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_a_large_gradient_is_nearer_to_the_exact_rule_than_by_float32_norms_of_apex():
    """In one step: the rounding of the weights adds up, with and without LARC."""
    weight = nn.Parameter(torch.randn(10**6))
    gradient = 10 * torch.randn(10**6)
    weight.grad = gradient.clone()
    optim.LARC(torch.optim.SGD([weight], lr=0.3), TRUST).clipper.step()
    exact = larc_scale(weight, gradient, 0.3) * gradient.double()
    by_apex = TRUST * weight.detach().norm() / (gradient.norm() + EPS) / 0.3 * gradient
    error, error_of_apex = ((g / exact - 1).abs().max() for g in (weight.grad, by_apex))
    assert error < 3e-7 < error_of_apex


def test_what_no_ratio_can_bound_is_left_alone():
    """A learning rate of 0, weights of 0, and a gradient of 0."""
    weights = torch.ones(2), torch.zeros(2), torch.ones(2)
    parameters = [nn.Parameter(w) for w in weights]
    rates = 0.0, 0.5, 0.5
    groups = [{"params": p, "lr": r} for p, r in zip(parameters, rates, strict=True)]
    optimizer = optim.LARC(torch.optim.SGD(groups), TRUST)
    gradients = torch.tensor([[30.0, 40.0], [30.0, 40.0], [0.0, 0.0]])
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = gradient.clone()
    decision = optimizer.clipper.step()
    assert decision.norm.tolist() == [0.0, 25.0, 0.0]
    assert decision.threshold.tolist() == pytest.approx(
        [TRUST * math.sqrt(2), math.inf, TRUST * math.sqrt(2)]
    )
    assert not decision.clipped.any()
    for p, gradient in zip(parameters, gradients, strict=True):
        assert torch.equal(p.grad, gradient)


ROWS = {
    "parameter": ([[0, 1]], [[2]]),
    "unit": ([[0], [1]], [[2]]),
    "group": ([[0, 1]], [[2]]),
}
"""The lines of the first weight in each row, then those of the second weight."""


@pytest.mark.parametrize("kind", [torch.Tensor.clone, watched], ids=["cpu", "device"])
@pytest.mark.parametrize("scope", list(ROWS))
def test_the_bound_holds_in_each_row(scope, kind):
    """Each row has the learning rate of its group, a number or a tensor."""
    lines = np.array([[3.0, 4.0], [6.0, 8.0], [5.0, 12.0]])
    weights = [nn.Parameter(torch.tensor(w).float()) for w in (lines[:2], lines[2:])]
    groups = [{"params": weights[:1], "lr": torch.tensor(0.5)}, {"params": weights[1:]}]
    optimizer = optim.LARC(torch.optim.SGD(groups, lr=0.001), TRUST, scope=scope)
    give(weights, [torch.full_like(w, 30.0) for w in weights], kind)
    with nothing_read() if kind is watched else nullcontext():
        decision = optimizer.clipper.step()
    rows = [np.concatenate([lines[i] for i in r]) for part in ROWS[scope] for r in part]
    rates = [0.5] * len(ROWS[scope][0]) + [0.001]
    norms = [lr * 30 * math.sqrt(row.size) for lr, row in zip(rates, rows, strict=True)]
    bounds = [TRUST * np.linalg.norm(row) for row in rows]
    assert unwatched(decision.norm).tolist() == pytest.approx(norms)
    assert unwatched(decision.threshold).tolist() == pytest.approx(bounds)
    assert unwatched(decision.clipped).tolist() == [lr == 0.5 for lr in rates]
    gradients = np.concatenate([unwatched(w.grad).numpy() for w in weights])
    factor = 30 * bounds[0] / norms[0]
    np.testing.assert_allclose(gradients[0], factor, rtol=1e-6)
    assert (gradients[2] == 30).all()


def test_a_copy_follows_its_own_learning_rate():
    """A pickled optimizer keeps the clipper, which reads the rates of the copy."""
    model = network()
    optimizer = optim.LARC(torch.optim.SGD(model.parameters(), lr=0.3), TRUST)
    train(model, optimizer, 2)
    for copied in (
        copy.deepcopy((model, optimizer)),
        pickle.loads(pickle.dumps((model, optimizer))),
    ):
        other, its_optimizer = copied
        its_optimizer.param_groups[0]["lr"] = 0.0
        before = copy.deepcopy(other)
        train(other, its_optimizer, 2)
        assert_same_weights(other, before)
        assert its_optimizer.clipper.metrics()["clip/norm"] == 0


def test_an_added_group_has_its_own_learning_rate():
    first, second = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = optim.LARC(torch.optim.SGD([first], lr=1.0), TRUST)
    optimizer.add_param_group({"params": [second], "lr": 0.25})
    first.grad = second.grad = torch.full((1,), 8.0)
    assert optimizer.clipper.step().norm.tolist() == [8.0, 2.0]


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ({"trust_coefficient": 0.0}, "trust_coefficient must be > 0 and finite"),
        ({"scope": "global"}, "scope must be one of .* one learning rate"),
        ({"lr": None}, "optimizer must be with lr in each group"),
    ],
)
def test_errors(argument, words):
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    if "lr" in argument:
        optimizer.param_groups[0]["lr"] = argument.pop("lr")
    with pytest.raises(ValueError, match=words):
        optim.LARC(optimizer, **argument)


@pytest.mark.parametrize("rate", [math.inf, math.nan, torch.tensor(math.inf)])
def test_a_step_without_a_finite_learning_rate_is_refused(rate):
    """No factor of the gradient would keep the weights finite."""
    weight = nn.Parameter(torch.ones(2))
    optimizer = optim.LARC(torch.optim.SGD([weight], lr=0.1), TRUST)
    optimizer.param_groups[0]["lr"] = rate
    weight.grad = torch.ones(2)
    with pytest.raises(ValueError, match="lr must be finite"):
        optimizer.step()
    assert torch.equal(weight, torch.ones(2))
    assert optimizer.clipper.metrics()["clip/steps"] == 0
