"""The fault battery in NumPy, and what the table itself must be like."""

import pathlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoclip_core import decide

from . import faults
from .faults import CASES, POLICIES, SHAPES, drawn


def test_the_battery_is_as_large_as_promised():
    assert len(CASES) >= 30
    shown = [grads for case in CASES.values() for grads in case.series()]
    flat = [g for grads in shown for g in grads if g is not None and g.size]
    for kind in (np.isnan, np.isposinf, np.isneginf):
        assert any(kind(g).any() and not kind(g).all() for g in flat)
        assert any(kind(g).all() for g in flat)
    assert any(all(g is None for g in grads) for grads in shown)
    page = pathlib.Path(__file__).parents[1] / "docs" / "reliability.md"
    assert f"holds {len(CASES)} series" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", CASES)
def test_numpy(name, policy):
    run(CASES[name], policy)


@given(drawn(), st.sampled_from([*POLICIES]))
def test_any_series(case, policy):
    run(case, policy)


def run(case, policy):
    """Take a series through `decide`, and check it."""
    policy, threshold_of = POLICIES[policy]
    state, thresholds, results = policy.init(len(SHAPES)), [], []
    for grads in case.series():
        norms = [0 if g is None else np.linalg.norm(np.float64(g)) for g in grads]
        seen = np.array([g is not None for g in grads])
        state, decision = decide(policy, state, np.array(norms), observed=seen)
        thresholds.append(decision.threshold)
        results.append(list(map(scaled, grads, decision.scale)))
    faults.check(case, threshold_of, thresholds, results)


def scaled(gradient, scale):
    """What an adapter makes of a gradient."""
    if gradient is None or scale == 1:
        return gradient
    product = np.zeros_like(gradient) if scale == 0 else np.float64(gradient) * scale
    return product.astype(gradient.dtype)


def test_the_account_notices_a_poisoned_history():
    """The check can fail: one infinity in the past is enough."""
    case, (_, threshold_of) = CASES["inf in all, in the middle"], POLICIES["quantile"]
    thresholds, results, past = [], [], [[] for _ in SHAPES]
    for grads in case.series():
        thresholds.append([threshold_of(norms) for norms in past])
        results.append([np.zeros_like(g) if np.isinf(g).any() else g for g in grads])
        for norms, grad in zip(past, grads, strict=True):
            norms.append(float(np.linalg.norm(grad)))
    with pytest.raises(AssertionError):
        faults.check(case, threshold_of, thresholds, results)
