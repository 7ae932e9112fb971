"""Loss policies: the decision on a loss, and what it does to the rows of the step.

A table of policies and a series of signed losses drive every framework with a loss
policy. The expected thresholds come from NumPy's own mean, deviation and quantile.
"""

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoclip_core import (
    Drop,
    EmaRatio,
    Fixed,
    MeanStd,
    Policy,
    Quantile,
    ZScore,
    decide,
)
from autoclip_core.clipper.by_value import decide_by_value
from autoclip_core.history.validation import find_problems
from autoclip_core.loss import (
    LossDecision,
    check_loss_policy,
    compute_loss_metrics,
    decide_loss,
    empty_loss_decision,
    init_loss,
)
from autoclip_core.scale import SMALLEST_NORMAL

from ..support.cases import (
    FRAMEWORKS,
    POLICIES,
    assert_same,
    fewer_examples,
    frameworks,
    in_numpy,
    leaves,
    policy_of,
    run,
    series_of,
    table_of,
)

NAN, INF = float("nan"), float("inf")
LARGE = float(np.float32(9e37))


def make_losses():
    """Return 80 losses: negative, 0, spikes, a change of level, NaN and infinity."""
    losses = np.random.default_rng(6).standard_normal(80)
    losses[[9, 33, 34]] = 9.0
    losses[40:] -= 30.0
    losses[[0, 20]] = 0.0
    losses[[5, 21, 60]] = NAN, INF, -INF
    return np.float32(losses)


LOSSES = make_losses()


def mean_std(past, k, ddof=1, needed=2):
    return past.mean() + k * past.std(ddof=ddof) if len(past) >= needed else INF


def quantile(past, q):
    return np.quantile(past, q) if len(past) else INF


def average(past, z, alpha, warmup):
    """ZScore with record="raw": moments of the warm-up, then moving ones."""
    if len(past) < warmup:
        return INF
    mean, variance = past[:warmup].mean(), past[:warmup].var()
    for loss in past[warmup:]:
        mean = alpha * mean + (1 - alpha) * loss
        variance = alpha * variance + (1 - alpha) * (loss - mean) ** 2
    return mean + z * np.sqrt(variance)


# A policy, and its threshold as a function of the past finite losses.
TABLE = {
    "MeanStd(2.0, history_length=16)": lambda past: mean_std(past[-16:], 2),
    "MeanStd(3.0, history_length=7, ddof=0)": lambda past: mean_std(past[-7:], 3, 0),
    "MeanStd(2.0, history_length=None)": lambda past: mean_std(past, 2),
    "Quantile(0.9, history_length=12)": lambda past: quantile(past[-12:], 0.9),
    "ZScore(2.0, alpha=0.9, warmup_steps=5, record='raw')": lambda past: average(
        past, 2, 0.9, 5
    ),
    "Fixed(2.5)": lambda past: 2.5,
    "Warmup(MeanStd(2.0, history_length=16), steps=10)": lambda past: (
        mean_std(past[-16:], 2) if len(past) >= 10 else INF
    ),
    "Cap(Quantile(0.9, history_length=12), max_norm=1.0)": lambda past: min(
        quantile(past[-12:], 0.9), 1.0
    ),
    "Floor(MeanStd(2.0, history_length=16), min_norm=0.5)": lambda past: max(
        mean_std(past[-16:], 2), 0.5
    ),
    "Drop(MeanStd(2.0, history_length=16), clip=Fixed(3.0))": lambda past: min(
        mean_std(past[-16:], 2), 3.0
    ),
}
SIGNED = table_of(*TABLE)


def expected_thresholds(code):
    past, thresholds = np.zeros(0), []
    for loss in np.float64(LOSSES):
        thresholds.append(TABLE[code](past))
        if np.isfinite(loss):
            past = np.append(past, loss)
    return np.array(thresholds)


def decide_all(policies, framework=in_numpy, losses=LOSSES):
    """Return the last states, and decisions of arrays of shape (steps,), by policy."""
    xp, array, compiled = framework()
    step = compiled(
        lambda states, loss: [
            decide_loss(policy, state, loss, xp)
            for policy, state in zip(policies, states, strict=True)
        ]
    )
    states = [init_loss(policy, xp) for policy in policies]
    decisions = []
    for loss in losses:
        states, taken = zip(*step(states, array(loss)), strict=True)
        states = list(states)
        decisions.append([[np.asarray(f)[0] for f in one] for one in taken])
    columns = [
        map(np.stack, zip(*one, strict=True)) for one in zip(*decisions, strict=True)
    ]
    return states, [LossDecision(*fields) for fields in columns]


@pytest.mark.parametrize("code", TABLE)
def test_thresholds_of_losses_are_those_of_numpy(code):
    [state], [decision] = decide_all([SIGNED[code]])
    expected = expected_thresholds(code)
    np.testing.assert_allclose(decision.threshold, expected, rtol=1e-5, atol=1e-5)
    finite = np.isfinite(LOSSES)
    np.testing.assert_array_equal(decision.loss, LOSSES)
    np.testing.assert_array_equal(decision.finite, finite)
    is_near = np.abs(LOSSES - expected) < 1e-4
    assert not (is_near & (LOSSES != np.float32(expected))).any(), "choose another seed"
    np.testing.assert_array_equal(decision.skipped, ~finite | (LOSSES > expected))
    assert finite[decision.skipped].any()
    assert not decision.skipped.all()
    assert int(state.loss_skipped) == decision.skipped.sum()
    assert list(find_problems(state, "loss", is_signed=True)) == []


STATIC = {code: policy for code, policy in SIGNED.items() if "None" not in code}


@frameworks({name: FRAMEWORKS[name] for name in ("torch", "jax-jit")})
def test_a_framework_decides_on_losses_as_numpy(framework):
    states, decisions = decide_all(STATIC.values(), framework)
    expected_states, expected = decide_all(STATIC.values())
    for actual, other in zip(decisions, expected, strict=True):
        np.testing.assert_array_equal(actual.skipped, other.skipped)
        np.testing.assert_array_equal(actual.finite, other.finite)
        np.testing.assert_allclose(
            actual.threshold, other.threshold, rtol=1e-5, atol=1e-5
        )
    for leaf, other in zip(
        leaves(tuple(states)), leaves(tuple(expected_states)), strict=True
    ):
        assert np.asarray(leaf).dtype == other.dtype
        np.testing.assert_allclose(leaf, other, rtol=1e-5, atol=1e-5)


def test_a_loss_of_any_form_is_one_number():
    policy = Fixed(2.0)
    for loss in (3.0, np.float64(3.0), np.array([3.0]), np.float16(3.0)):
        _, decision = decide_loss(policy, init_loss(policy), loss)
        assert {part.shape for part in decision} == {(1,)}
        assert decision.loss.tolist() == [3.0]
        assert decision.skipped.tolist() == [True]
    for loss in (np.ones(2), np.ones((1, 1)), np.ones(0)):
        with pytest.raises(ValueError, match="loss must be of shape"):
            decide_loss(policy, init_loss(policy), loss)


@pytest.mark.parametrize("loss", [1e38, -1e38, 3e38, 1e39, NAN, INF, -INF])
def test_a_loss_without_a_finite_difference_is_not_finite(loss):
    policy = MeanStd(2.0, history_length=4)
    state = init_loss(policy)
    for usual in (1.0, 2.0):
        state, _ = decide_loss(policy, state, usual)
    after, decision = decide_loss(policy, state, loss)
    assert decision.finite.tolist() == [False]
    assert decision.skipped.tolist() == [True]
    assert_same(after.loss_policy, state.loss_policy)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_subnormal_loss_counts_as_0(sign):
    """XLA and TensorFlow flush such numbers, also in a comparison."""
    smallest = np.float32(sign * SMALLEST_NORMAL)
    for loss, counted in ((sign * 1e-39, 0.0), (smallest, smallest)):
        _, decision = decide_loss(Fixed(1.0), init_loss(Fixed(1.0)), loss)
        assert decision.loss.tolist() == [counted]


def test_before_the_first_loss_nothing_is_skipped():
    loss, threshold, finite, skipped = empty_loss_decision()
    assert np.isnan(loss).tolist() == [True]
    assert threshold.tolist() == [INF]
    assert (finite.tolist(), skipped.tolist()) == ([True], [False])


@pytest.mark.parametrize("policy", SIGNED.values(), ids=list(SIGNED))
@fewer_examples
@given(
    losses=st.lists(
        st.floats(-LARGE, LARGE, width=32)
        | st.sampled_from([0.0, -0.0, 1e-40, -1e-40, 1.0, -1.0, LARGE, -LARGE]),
        min_size=1,
        max_size=20,
    )
)
def test_any_finite_losses_leave_a_sound_state(policy, losses):
    state = init_loss(policy)
    for loss in losses:
        state, decision = decide_loss(policy, state, loss)
        assert not np.isnan(decision.threshold[0])
        assert list(find_problems(state, "loss", is_signed=True)) == []


@pytest.mark.parametrize("level", [-3.0, 0.0, 3.0])
@pytest.mark.parametrize(
    "policy",
    [MeanStd(2.0, history_length=9), Quantile(0.9), ZScore(3.0, warmup_steps=5)],
    ids=repr,
)
def test_a_new_level_is_not_skipped_for_ever(policy, level):
    """Also after constant losses, whose deviation is 0."""
    state, skipped = init_loss(policy), []
    for loss in [level] * 12 + [level + 5.0] * 400:
        state, decision = decide_loss(policy, state, loss)
        skipped.append(bool(decision.skipped[0]))
    assert not any(skipped[:12])
    assert skipped[12]
    assert not any(skipped[-100:])


# What a loss does to the rows.

UP = Fixed(2.0)


def decision_on(loss):
    return decide_loss(UP, init_loss(UP), loss)[1]


class Case(NamedTuple):
    """A loss, the rule for norms, and what follows in rows 1, NaN and absent."""

    loss: float
    nonfinite: str
    scale: list
    skipped: bool
    is_recorded: bool


CASES = [
    Case(1.0, "zero", [1, 0, 1], False, True),
    Case(1.0, "skip", [0, 0, 1], True, False),
    Case(3.0, "zero", [0, 0, 1], True, True),
    Case(3.0, "propagate", [0, 0, 1], True, True),
    Case(3.0, "skip", [0, 0, 1], True, False),
    Case(NAN, "zero", [0, 0, 1], True, False),
    Case(INF, "propagate", [0, 0, 1], True, False),
    Case(-INF, "skip", [0, 0, 1], True, False),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_loss_skips_and_lets_rows_record(case):
    policy = Quantile(0.5, history_length=3)
    state = policy.init(3)
    settings = {
        "observed": np.array([True, True, False]),
        "nonfinite": case.nonfinite,
        "loss": decision_on(case.loss),
    }
    after, decision = decide(policy, state, [1.0, NAN, 9.0], **settings)
    assert decision.scale.tolist() == case.scale
    assert decision.skipped.tolist() == [case.skipped] * 3
    assert after.count.tolist() == [int(case.is_recorded), 0, 0]
    assert decision.finite.tolist() == [True, False, True]


def test_without_a_spike_a_loss_changes_nothing():
    """A decision with a usual loss equals one without, also if a row is dropped."""
    policy = Drop(Quantile(0.5, history_length=3), action="skip")
    series = series_of([1.0, 3.0, NAN, 8.0, 2.0])
    expected = run(policy, series)
    assert_same(run(policy, series, loss=decision_on(1.0)), expected)
    assert expected[1].skipped.any()


@pytest.mark.parametrize("loss", [1.0, 3.0, NAN])
def test_clipping_by_value_follows_the_loss(loss):
    norms, yes = np.float32([5.0, 5.0]), np.array([True, True])
    arguments = {"thresholds": norms, "observed": np.array([True, False])}
    decision = decide_by_value(
        norms, norms / 2, yes, **arguments, loss=decision_on(loss)
    )
    is_usual = loss == 1.0
    assert decision.skipped.tolist() == [not is_usual] * 2
    assert decision.scale.tolist() == [0.5 if is_usual else 0.0, 1.0]


# Policies that need positive values, and states that no run produces.

REFUSED = [
    code
    for code in POLICIES
    if any(
        part in code
        for part in ("log=True", "include_current", "Ema", "Stream", "Param", "None")
    )
    and not code.startswith("MeanStd(2.0, history_length=None")
]


@pytest.mark.parametrize("code", REFUSED)
def test_a_policy_of_positive_numbers_is_refused(code):
    with pytest.raises(ValueError, match=r"any sign, got .*; use MeanStd") as error:
        check_loss_policy(POLICIES[code])
    assert code.partition("(")[0] in str(error.value)


class Undeclared(Fixed):
    """A policy that does not say whether it works on values of any sign."""

    can_limit_losses = Policy.can_limit_losses


def test_a_policy_has_to_declare_that_it_works_on_losses():
    pair = Drop(MeanStd(2.0, history_length=7), clip=EmaRatio(2.0))
    for policy in (Undeclared(1.0), pair):
        with pytest.raises(ValueError, match="any sign"):
            check_loss_policy(policy)


def test_all_other_policies_are_accepted():
    for code, policy in (POLICIES | SIGNED).items():
        if code not in REFUSED:
            check_loss_policy(policy)
    with pytest.raises(TypeError, match="loss_policy must be a policy"):
        check_loss_policy(3.0)


BROKEN = [
    ("MeanStd(2.0, history_length=7)", "ring", [NAN, INF, -INF, 1e9]),
    ("MeanStd(2.0, history_length=7)", "ordered", [NAN, 1e9]),
    ("MeanStd(2.0, history_length=None)", "mean", [NAN, INF]),
    ("ZScore(warmup_steps=2)", "mean", [NAN, INF, -INF]),
    ("ZScore(warmup_steps=2)", "deviation", [NAN, -1.0]),
]


@pytest.mark.parametrize(("code", "name", "values"), BROKEN)
def test_a_broken_state_of_losses_is_found(code, name, values):
    [state], _ = decide_all([policy_of(code)], losses=LOSSES[40:45])
    assert list(find_problems(state, "loss", is_signed=True)) == []
    assert list(find_problems(state, "loss")), "negative losses are no norms"
    for value in values:
        array = getattr(state.loss_policy, name).copy()
        array.reshape(-1)[1 if name == "ordered" else 0] = value
        policy = state.loss_policy._replace(**{name: array})
        broken = state._replace(loss_policy=policy)
        [problem] = find_problems(broken, "loss", is_signed=True)
        assert problem.startswith("loss.loss_policy: ")
    broken = state._replace(loss_skipped=np.int32(-1))
    [problem] = find_problems(broken, "loss", is_signed=True)
    assert problem == "loss: loss_skipped must be >= 0, got -1"


def test_metrics_of_a_loss():
    policy = MeanStd(2.0, history_length=8)
    state = init_loss(policy)
    first = compute_loss_metrics(*empty_loss_decision()[:2], state)
    assert np.isnan(first["clip/loss"])
    assert first["clip/loss_threshold"] == INF
    assert first["clip/loss_skipped_total"] == 0
    for loss in (-1.0, 0.0, 1.0, 4.0):
        state, decision = decide_loss(policy, state, loss)
    assert compute_loss_metrics(*decision[:2], state) == {
        "clip/loss": 4.0,
        "clip/loss_threshold": 2.0,
        "clip/loss_skipped_total": 2,
    }
