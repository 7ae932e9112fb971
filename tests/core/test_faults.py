"""The fault battery in NumPy, and tests of the battery and its account."""

import pathlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoclip_core import decide
from autoclip_core.clipper.metrics import count_step, empty_tally

from ..support.account import (
    HISTORY,
    NORMS,
    POLICIES,
    SCOPES,
    StepResult,
    account,
    check,
    norm_of,
)
from ..support.faults import CASES, drawn, layouts, rounded


def test_the_battery_is_as_large_as_promised():
    assert len(CASES) >= 30
    steps = [grads for case in CASES.values() for grads in case.series()]
    flat = [g for grads in steps for g in grads if g is not None and g.size]
    for kind in (np.isnan, np.isposinf, np.isneginf):
        assert any(kind(g).any() and not kind(g).all() for g in flat)
        assert any(kind(g).all() for g in flat)
    assert any(all(g is None for g in grads) for grads in steps)
    page = pathlib.Path(__file__).parents[1] / "promises.md"
    assert f"holds {len(CASES)} series" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", CASES)
def test_numpy(name, policy, scope):
    run(CASES[name], policy, scope)


@given(drawn(layouts()), st.sampled_from([*POLICIES]), st.sampled_from([*SCOPES]))
def test_any_series(case, policy, scope):
    run(case, policy, scope)


def run(case, policy, scope):
    """Run `decide` on a series and check the results."""
    check(case, policy, clip_series(case, policy, scope), scope)


def clip_series(case, policy, scope="parameter"):
    """Return the result of `decide` for each step."""
    rows, kind = SCOPES[scope](len(case.layout)), NORMS[policy, scope]
    policy, _ = POLICIES[policy]
    row_of = {place: row for row, places in enumerate(rows) for place in places}
    state, tally, steps = policy.init(len(rows)), empty_tally(len(rows)), []
    for grads in case.series():
        norms = [norm_of([grads[place] for place in places], kind) for places in rows]
        present = ~np.isnan(norms)
        state, decision = decide(policy, state, norms, observed=present)
        tally = count_step(tally, decision)
        scales = [decision.scale[row_of[place]] for place in row_of]
        gradients = map(
            scale_gradient, grads, scales, [dtype for _, dtype in case.layout]
        )
        steps.append(StepResult(decision, tally, list(gradients)))
    return steps


def scale_gradient(gradient, scale, dtype):
    """Return the gradient as an adapter scales it."""
    if gradient is None or scale == 1:
        return gradient
    finite = np.zeros_like(gradient) if scale == 0 else gradient
    return rounded(np.float64(finite) * scale, dtype)


LEVELS = {"a level ten times as high": 10.0, "a level of a tenth": 0.1}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", LEVELS)
def test_the_threshold_reaches_a_new_level_within_the_window(name, policy):
    """After `HISTORY` steps the old level has no influence."""
    case = CASES[name]
    norms = np.array([step.norms[0] for step in account(case, policy, "parameter")])
    thresholds = [step.decision.threshold[0] for step in clip_series(case, policy)]
    for step in range(16 + HISTORY, case.steps):
        last = norms[step - HISTORY : step]
        assert last.min() <= thresholds[step] <= 2 * last.max()
    assert thresholds[15] / thresholds[-1] == pytest.approx(1 / LEVELS[name], rel=1)


@pytest.mark.parametrize("name", ["constant norms", "ties"])
def test_norms_of_exact_cases_equal_their_thresholds(name):
    """`check` asserts that a norm equal to its threshold is unchanged bit for bit."""
    steps = account(CASES[name], "quantile", "global")
    assert sum(step.norms == step.limits for step in steps) > 5


WRONG = {
    "threshold": lambda right: right * np.float32(1.00001),
    "norm": lambda right: np.where(np.isnan(right), np.float32(0), right),
    "scale": lambda right: np.where(right < 1, right * np.float32(1.00001), right),
    "clipped": np.zeros_like,
    "finite": np.ones_like,
    "skipped": np.ones_like,
    "observed": lambda right: right + 1,
    "nonfinite": lambda right: right + 1,
    "steps": lambda right: right + 1,
}


@pytest.mark.parametrize("field", WRONG)
def test_the_check_fails_for_a_wrong_number_in_any_field(field):
    case = CASES["nan, then absent, then back"]

    def with_wrong_field(part):
        if field not in part._fields:
            return part
        return part._replace(**{field: WRONG[field](getattr(part, field))})

    steps = [
        step._replace(
            decision=with_wrong_field(step.decision), tally=with_wrong_field(step.tally)
        )
        for step in clip_series(case, "quantile")
    ]
    with pytest.raises(AssertionError):
        check(case, "quantile", steps)


def test_the_check_fails_for_a_gradient_that_is_scaled_differently():
    case = CASES["nothing"]
    steps = clip_series(case, "quantile")
    steps[-1].gradients[1] = steps[-1].gradients[1] * np.float32(0.5)
    with pytest.raises(AssertionError):
        check(case, "quantile", steps)
