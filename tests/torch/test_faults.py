"""The fault battery in torch: by hand, attached, fused, as an optimizer.

The scope is "parameter" or "global". At scope "global" there is one row, and the kernel
of a fused optimizer scales the gradients.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoclip_torch import Clipper

from ..support.account import NORMS, POLICIES, SCOPES, StepResult, check
from ..support.faults import CASES, drawn, layouts


def by_hand(parameters, clip):
    clipper = Clipper(parameters, **clip)
    return clipper, clipper.step


def attached(parameters, clip):
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    clipper = Clipper(parameters, **clip)
    clipper.attach(optimizer)
    return clipper, optimizer.step


def fused(parameters, clip):
    optimizer = torch.optim.AdamW(parameters, lr=0.1, fused=True)
    clipper = Clipper(parameters, **clip)
    clipper.attach(optimizer)
    return clipper, optimizer.step


def as_optimizer(parameters, clip):
    inner = torch.optim.SGD(parameters, lr=0.1)
    optimizer = Clipper.as_optimizer(inner, **clip)
    return optimizer.clipper, optimizer.step


WAYS = {way.__name__: way for way in (by_hand, attached, fused, as_optimizer)}
# All ways call the same step with the same rows; only a fused optimizer does not, and
# its kernel scales only one row.
RUNS = [(way, "quantile", scope) for way in ("by_hand", "fused") for scope in SCOPES]
RUNS += [("by_hand", "mean_std", "parameter"), ("fused", "mean_std", "global")]
SAME = [("attached", "quantile", "parameter"), ("as_optimizer", "quantile", "global")]
"""Runs that differ from `by_hand` only in who calls the step: for drawn series."""
QUIET = pytest.mark.filterwarnings(
    "ignore:the gradients of ", "ignore:the clipper has not received"
)


def run(case, way, policy, scope):
    """Clip a series, and check each step."""
    parameters = [
        torch.nn.Parameter(torch.ones(shape, dtype=getattr(torch, dtype)))
        for shape, dtype in case.layout
    ]
    norm = NORMS[policy, scope]
    clip = {"policy": POLICIES[policy][0], "scope": scope, "norm": norm}
    clipper, step = WAYS[way](parameters, clip)
    kernel_scales, steps = (way, scope) == ("fused", "global"), []
    for grads in case.series():
        for parameter, grad in zip(parameters, grads, strict=True):
            if grad is not None:
                grad = torch.tensor(grad, dtype=parameter.dtype)
            parameter.grad = grad
        before = [parameter.detach().clone() for parameter in parameters]
        step()
        decision, tally, _ = clipper._policy_states.read()
        steps.append(StepResult(decision, tally, list(map(gradient_of, parameters))))
        if kernel_scales and not decision.finite.all():
            assert all(map(torch.equal, parameters, before))
    check(case, policy, steps, scope, kernel_scales=kernel_scales)
    assert all(bool(parameter.isfinite().all()) for parameter in parameters)


def gradient_of(parameter):
    """Return the gradient after the step; NumPy has no bfloat16, so it is widened."""
    if parameter.grad is None:
        return None
    wide = parameter.dtype == torch.bfloat16
    return (parameter.grad.float() if wide else parameter.grad).numpy()


@QUIET
@pytest.mark.parametrize(("way", "policy", "scope"), RUNS)
@pytest.mark.parametrize("name", CASES)
def test_torch(name, way, policy, scope):
    run(CASES[name], way, policy, scope)


@QUIET
@given(drawn(layouts()), st.sampled_from(RUNS + SAME))
def test_any_series(case, how):
    run(case, *how)
