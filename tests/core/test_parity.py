"""Every policy gives the same results in NumPy, torch, JAX and TensorFlow.

NumPy is the reference; `test_policies.py` and the golden traces test NumPy itself. JAX
and TensorFlow run compiled and uncompiled.
"""

from functools import cache

import numpy as np
import pytest

from autoclip_core import MeanStd, Quantile, ZScore
from autoclip_core.history import window

from ..support.cases import (
    FRAMEWORKS,
    STATIC,
    UNCOMPILED,
    Series,
    assert_same,
    cut,
    each,
    frameworks,
    in_jax,
    in_numpy,
    in_tf,
    in_torch,
    leaves,
    linear_quantile,
    log_normal,
    parity_series,
    run,
    run_all,
    series_of,
)

SERIES = parity_series()
COMPILED = {name: FRAMEWORKS[name] for name in ("jax-jit", "tf-xla")}


UNCOMPILED_POLICIES = {
    code: policy
    for code, policy in STATIC.items()
    if code.startswith(("Quantile(0.8", "MeanStd(0.5", "Warmup(Q", "Drop(E", "Drop(M"))
    or code.endswith("target='reciprocal', record='winsorized')")
}


@cache
def answers(framework, steps):
    """Return last state and decisions by policy; all policies share a compilation."""
    policies = STATIC if steps == len(SERIES.norms) else UNCOMPILED_POLICIES
    results = run_all(policies.values(), cut(SERIES, steps), framework)
    return dict(zip(policies.values(), results, strict=True))


def reference(policy):
    return answers(in_numpy, len(SERIES.norms))[policy]


def rtol(policy):
    """Return the relative tolerance of thresholds and scales against NumPy."""
    code = repr(policy)
    return 1e-5 if "MeanStd" in code or "log=True" in code else 1e-6


def compare(policy, framework, steps):
    """Compare the first steps of the series in a framework with NumPy."""
    expected_state, expected = answers(in_numpy, steps)[policy]
    state, actual = answers(framework, steps)[policy]
    np.testing.assert_array_equal(actual.norm, expected.norm)
    close = {"rtol": rtol(policy)}
    np.testing.assert_allclose(actual.threshold, expected.threshold, **close)
    np.testing.assert_allclose(actual.scale, expected.scale, **close)
    for field in ("clipped", "finite", "skipped", "dropped"):
        np.testing.assert_array_equal(getattr(actual, field), getattr(expected, field))
    assert type(state) is type(expected_state)
    for leaf, other in zip(leaves(state), leaves(expected_state), strict=True):
        assert np.asarray(leaf).dtype == other.dtype
        assert tuple(leaf.shape) == other.shape
        np.testing.assert_allclose(leaf, other, rtol=1e-5)


@frameworks(FRAMEWORKS)
@each(STATIC)
def test_a_framework_answers_as_numpy(framework, policy):
    compare(policy, framework, steps=len(SERIES.norms))


@frameworks(UNCOMPILED)
@each(UNCOMPILED_POLICIES)
def test_so_it_does_where_nothing_is_compiled(framework, policy):
    compare(policy, framework, steps=15)


@each(STATIC)
def test_the_series_leaves_nothing_to_rounding(policy):
    """Frameworks could clip a norm differently if it almost equals its threshold."""
    _, decision = reference(policy)
    known = np.isfinite(decision.norm) & np.isfinite(decision.threshold)
    norm, threshold = decision.norm[known], decision.threshold[known]
    near = np.abs(norm - threshold) < 2 * rtol(policy) * threshold
    assert not (near & (norm != threshold)).any(), "choose another seed"
    clipped = decision.clipped.any(axis=0).sum()
    assert clipped > 3, "too little is clipped"


@each(STATIC)
def test_state_keeps_its_types_and_shapes(policy):
    """Nothing is promoted to float64, whatever the type of the norms."""
    series = SERIES._replace(
        norms=SERIES.norms.astype(np.float64),
        param_norms=SERIES.param_norms.astype(np.float64),
    )
    start = policy.init(SERIES.norms.shape[1])
    state, decision = run(policy, series)
    assert type(state) is type(start)
    for leaf, first in zip(leaves(state), leaves(start), strict=True):
        assert leaf.dtype == first.dtype
        assert leaf.dtype in (np.float32, np.int32)
        assert leaf.shape == first.shape
    for field in (decision.norm, decision.threshold, decision.scale):
        assert field.dtype == np.float32
    assert_same((state, decision), reference(policy))


# Exact quantiles. A compiler may fuse a product and a sum: one unit of float32.


def streams(steps):
    """Rows of all kinds; `tied` norms equal their thresholds exactly."""
    rng = np.random.default_rng(3)
    steady = log_normal(rng, steps)
    rows = {
        "steady": steady,
        "heavy": log_normal(rng, steps, 1.0),
        "rising": np.sort(steady),
        "falling": np.sort(steady)[::-1],
        "tied": rng.choice([0.5, 0.75, 1.0, 1.5, 2.0], steps),
        "constant": np.full(steps, 3.0),
        "huge": steady * 1e36,
        "small": steady * 1e-28,
    }
    return rows, series_of(np.stack(list(rows.values()), axis=1))


@pytest.mark.parametrize(
    ("framework", "units"),
    [
        pytest.param(in_numpy, 0, id="numpy"),
        pytest.param(in_torch, 0, id="torch", marks=pytest.mark.needs("torch")),
        pytest.param(in_jax, 1, id="jax-jit", marks=pytest.mark.needs("jax")),
        pytest.param(in_tf, 1, id="tf-xla", marks=pytest.mark.needs("tf")),
    ],
)
def test_quantiles_are_those_of_numpy_bit_for_bit(framework, units):
    rows, series = streams(steps=80)
    policies = [Quantile(0.9, history_length=25), Quantile(0.35, history_length=6)]
    results = run_all(policies, series, framework)
    for policy, (_, decision) in zip(policies, results, strict=True):
        assert np.isposinf(decision.threshold[0]).all()
        for row, name in enumerate(rows):
            allowed = 0 if name in ("tied", "constant") else units
            for step in range(1, 80):
                first = max(step - policy.history_length, 0)
                last = series.norms[first:step, row]
                expected = linear_quantile(last, policy.quantile)
                error = abs(decision.threshold[step, row] - expected)
                assert error <= allowed * np.spacing(expected), (policy, name, step)


# Subnormal numbers: XLA and TensorFlow flush them to 0, also in a comparison.


@frameworks(COMPILED)
def test_a_subnormal_norm_would_corrupt_the_ordered_row(framework):
    """The positive control: the test pushes the norm without `decide`."""
    xp, array, compiled = framework()
    norms = np.float32([[1e-39], [1.0], [2e-39], [3e-39], [2.0]])
    state, expected = window.empty(1, 3, xp), window.empty(1, 3)
    push = compiled(lambda state, norms: window.push(state, norms, xp))
    for new in norms:
        state = push(state, array(new))
        expected = window.push(expected, new)
    assert expected.ordered[0, 1:-1].tolist() == sorted(norms[-3:, 0])
    assert np.asarray(state.ordered)[0, 1:-1].tolist() != sorted(norms[-3:, 0])


@frameworks(FRAMEWORKS)
def test_a_subnormal_norm_counts_as_zero(framework):
    norms = np.float32([1.0, 1e-39, 2.0, 1e-45, 3.0, 1.1e-38, 4.0, 5.0, 1e-40, 6.0])
    policy = Quantile(0.5, history_length=3)
    state, decision = run(policy, series_of(norms), framework)
    as_zero = np.where(norms < 1e-37, np.float32(0), norms)
    expected_state, expected = run(policy, series_of(as_zero))
    assert_same(decision, expected)
    assert_same(state, expected_state)
    assert expected_state.ordered[0, 1:-1].tolist() == [4.0, 5.0, 6.0]


@frameworks(COMPILED)
def test_differences_that_xla_flushes_do_no_harm(framework):
    """Norms just above the smallest normal number: XLA flushes all differences to 0."""
    targets = ("reciprocal", "mean", "threshold")
    policies = [ZScore(2.0, warmup_steps=5, target=target) for target in targets]
    norms = np.float32([1.2e-38] * 6 + [1.3e-38, 2.0e-38, 1.2e-38, 1.5e-38] * 3)
    for _, decision in run_all(policies, series_of(norms), framework):
        assert not np.isnan(decision.threshold).any()
        assert (decision.scale > 0.5).all()
        assert (decision.scale <= 1).all()


# No policy receives a norm that is not finite, however a compiler handles `where`.


@frameworks(FRAMEWORKS)
@pytest.mark.parametrize("nonfinite", ["zero", "skip"])
def test_a_norm_that_is_not_finite_changes_no_state(framework, nonfinite):
    policy = Quantile(0.9, history_length=4)
    norms = np.float32([[1, 2], [np.nan, 3], [np.inf, 4], [2, np.inf], [3, 5]])
    series = Series(norms, np.ones((5, 2), bool), norms)
    state, decision = run(policy, series, framework, nonfinite=nonfinite)
    expected_state, expected = run(policy, series, nonfinite=nonfinite)
    assert_same(state, expected_state)
    np.testing.assert_array_equal(decision.scale, expected.scale)
    np.testing.assert_allclose(decision.threshold, expected.threshold, rtol=2e-7)
    kept = [[1, 2, 3], [2, 3, 4, 5]] if nonfinite != "skip" else [[1, 3], [2, 5]]
    for row in range(2):
        ordered = np.asarray(state.ordered)[row, 1:-1]
        assert ordered[np.isfinite(ordered)].tolist() == kept[row]


@frameworks({"numpy": (in_numpy, "core"), **FRAMEWORKS})
def test_equal_norms_are_not_clipped_by_their_own_mean(framework):
    """A mean that is one rounding too low would clip every step of a constant run."""
    norms = np.float32([[3.0, 0.1, 10.392304, 3.4641016]] * 12)
    policies = [MeanStd(2.0, history_length=7, log=log) for log in (False, True)]
    for _, decision in run_all(policies, series_of(norms), framework):
        assert not decision.clipped.any()
        np.testing.assert_array_equal(decision.threshold[2:], norms[2:])
