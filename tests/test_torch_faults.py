"""The fault battery in torch: by hand, attached, fused, as an optimizer."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoclip_torch import Clipper

from . import faults
from .faults import CASES, POLICIES, SHAPES, drawn


def by_hand(parameters, policy):
    return Clipper(parameters, policy), lambda clipper: clipper.step()


def attached(parameters, policy):
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    clipper = Clipper(parameters, policy)
    clipper.attach(optimizer)
    return clipper, lambda clipper: optimizer.step()


def fused(parameters, policy):
    optimizer = torch.optim.AdamW(parameters, lr=0.1, fused=True)
    clipper = Clipper(parameters, policy)
    clipper.attach(optimizer)
    return clipper, lambda clipper: optimizer.step()


def as_optimizer(parameters, policy):
    inner = torch.optim.SGD(parameters, lr=0.1)
    optimizer = Clipper.as_optimizer(inner, policy)
    return optimizer.clipper, lambda clipper: optimizer.step()


WAYS = {way.__name__: way for way in (by_hand, attached, fused, as_optimizer)}
QUIET = pytest.mark.filterwarnings(
    "ignore:the gradients of the last", "ignore:the clipper has not seen"
)


def run(case, policy, way):
    """Take a series through a clipper, and check it."""
    policy, threshold_of = POLICIES[policy]
    dtype = torch.from_numpy(np.zeros(1, case.dtype)).dtype
    parameters = [torch.nn.Parameter(torch.ones(s, dtype=dtype)) for s in SHAPES]
    clipper, step = WAYS[way](parameters, policy)
    thresholds, results = [], []
    for grads in case.series():
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = None if grad is None else torch.from_numpy(grad)
        step(clipper)
        thresholds.append(torch.as_tensor(clipper._learner.decision.threshold).numpy())
        results.append([None if p.grad is None else p.grad.numpy() for p in parameters])
    faults.check(case, threshold_of, thresholds, results)
    assert all(bool(p.isfinite().all()) for p in parameters)


@QUIET
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_torch(name, way, policy):
    run(CASES[name], policy, way)


@QUIET
@given(drawn(), st.sampled_from([*POLICIES]), st.sampled_from([*WAYS]))
def test_any_series(case, policy, way):
    run(case, policy, way)
