"""Laws that hold for every policy, on any series of norms."""

import math
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoclip_core import (
    Cap,
    Decision,
    Drop,
    EmaRatio,
    Fixed,
    Floor,
    Limit,
    MeanStd,
    ParamRatio,
    Quantile,
    StreamingQuantile,
    Warmup,
    ZScore,
    decide,
)
from autoclip_core.scale import complete_limit, find_level

from ..support.cases import (
    POLICIES,
    STATIC,
    any_series,
    assert_same,
    each,
    every_kind,
    every_policy,
    fewer_examples,
    leaves,
    log_normal,
    policy_of,
    positive,
    run,
    series_of,
)

UNIT = 2.0**-23  # the distance of float32 numbers around 1


# What holds at each single step.


class Step(NamedTuple):
    """One step: the state before it, its results, and the state after it."""

    policy: object
    before: tuple
    limit: Limit
    decision: Decision
    after: tuple
    untouched: tuple
    """A copy of the arrays of `before`, made before the step."""


def steps(policy, series):
    """Take the steps of a series one by one."""
    state = policy.init(series.norms.shape[1])
    for norms, observed, param_norms in zip(*series, strict=True):
        known = np.where(observed & np.isfinite(norms), norms, np.float32(0))
        known = np.where(known < np.finfo(np.float32).tiny, np.float32(0), known)
        untouched = [np.copy(leaf) for leaf in leaves(state)]
        with np.errstate(over="ignore"):
            limit = policy.limit(state, known, param_norms=param_norms)
        after, decision = decide(
            policy, state, norms, observed=observed, param_norms=param_norms
        )
        yield Step(policy, state, limit, decision, after, untouched)
        state = after


def identity(step):
    """Up to the threshold the scale is exactly 1, and the row is not clipped."""
    _, threshold, scale, clipped, finite, skipped, _ = step.decision
    below = ~(step.decision.norm > threshold) & finite & ~skipped
    assert (scale[below] == 1).all()
    assert not clipped[below].any()


def boundedness(step):
    """A clipped norm is scaled to its target; a dropped one to 0."""
    norm, threshold, scale, clipped, finite, skipped, dropped = step.decision
    norm = np.where(finite, norm, 0)
    left = np.float64(scale) * norm
    rounding = UNIT * left + 1e-45 * norm  # the second where a scale is subnormal
    assert (left <= threshold + rounding)[clipped].all()
    exact = clipped & ~skipped
    target = np.where(dropped, 0, complete_limit(step.limit).target)
    assert (abs(left - np.where(exact, target, 0)) <= rounding)[exact].all()


def the_first_that_holds_decides(step):
    """n > D: dropped; n > T: clipped, or dropped if R / n is 0; otherwise neither."""
    limit = complete_limit(step.limit)
    norm = np.where(step.decision.finite, step.decision.norm, 0)
    quotient = limit.target / np.where(norm > limit.threshold, norm, 1)
    is_lost = (norm > limit.threshold) & (np.float32(quotient) == 0)
    assert (step.decision.dropped == (norm > limit.drop) | is_lost).all()
    is_above = norm > np.minimum(limit.threshold, limit.drop)
    assert (step.decision.clipped == is_above).all()
    if limit.cancels:
        assert (step.decision.skipped == step.decision.dropped.any()).all()


def no_amplification(step):
    """A scale is in [0, 1], and a target is at most the threshold."""
    assert ((step.decision.scale >= 0) & (step.decision.scale <= 1)).all()
    assert (step.limit.target <= step.limit.threshold).all()
    assert (step.limit.target >= 0).all()


def threshold_is_a_number(step):
    """A threshold is never NaN or 0, so a finite gradient cannot become NaN."""
    assert (step.decision.threshold > 0).all()
    assert (step.decision.threshold == find_level(step.limit)).all()
    assert (complete_limit(step.limit).drop > 0).all()


def purity(step):
    """A step does not change the state that it received."""
    for leaf, copy in zip(leaves(step.before), step.untouched, strict=True):
        assert leaf.tobytes() == copy.tobytes()


def only_observed_finite_and_positive_norms_are_learned(step):
    """All other rows keep their state bit for bit, but a buffer may grow."""
    kept = ~(step.decision.norm > 0) | ~step.decision.finite
    for new, old in zip(leaves(step.after), leaves(step.before), strict=True):
        assert new.dtype == old.dtype
        width = old.shape[-1]
        if old.ndim == 2:
            assert np.isposinf(new[kept, width:]).all()
            new = new[:, :width]
        assert (new[kept] == old[kept]).all()


STEP_LAWS = [
    identity,
    boundedness,
    the_first_that_holds_decides,
    no_amplification,
    threshold_is_a_number,
    purity,
    only_observed_finite_and_positive_norms_are_learned,
]


@every_policy
@fewer_examples
@given(series=any_series())
def test_each_step_obeys(policy, series):
    for step in steps(policy, series):
        for law in STEP_LAWS:
            law(step)


@every_policy
def test_each_step_obeys_in_a_long_run(policy):
    """The laws hold after the windows are full and the counts have wrapped."""
    rng = np.random.default_rng(0)
    norms = log_normal(rng, (150, 3), 1.0)
    norms[rng.random(norms.shape) < 0.05] = np.nan
    norms[:, 1] *= 1e30
    norms[:, 2] = np.round(norms[:, 2] * 2) / 2
    taken = list(steps(policy, series_of(norms)))
    for step in taken:
        for law in STEP_LAWS:
            law(step)
    assert any(step.decision.clipped.any() for step in taken)


# Causality.


def threshold_first(policy):
    """Return whether a policy has a threshold before the norm is known."""
    words = repr(policy)
    return "include_current=True" not in words and (
        "Drop" not in words or "clip=" in words
    )


@every_policy
@fewer_examples
@given(series=any_series(rows=1, most=20), other=positive(), data=st.data())
def test_a_threshold_does_not_depend_on_its_norm(policy, series, other, data):
    """It does not depend on later norms either."""
    at = data.draw(st.integers(0, len(series.norms) - 1))
    changed = series.norms.copy()
    changed[at:] = other
    _, first = run(policy, series)
    _, second = run(policy, series._replace(norms=changed))
    until = at if "include_current=True" in repr(policy) else at + 1
    np.testing.assert_array_equal(first.threshold[:until], second.threshold[:until])


CURRENT = {c: p for c, p in POLICIES.items() if "include_current=True" in c}


@each(CURRENT)
def test_with_include_current_it_does(policy):
    """The positive control of the test above."""
    assert len(CURRENT) >= 3
    norms = np.arange(1.0, 17.0).reshape(8, 2)
    norms[-1] = 0.1, 100
    _, decision = run(policy, series_of(norms))
    assert decision.threshold[-1, 0] < decision.threshold[-1, 1]


@every_policy
@fewer_examples
@given(series=any_series(most=15))
def test_the_threshold_may_be_taken_before_the_norm_is_known(policy, series):
    state, _ = run(policy, series)
    norms, param_norms = np.float32([1, 100]), series.param_norms[-1]
    if not threshold_first(policy):
        with pytest.raises(ValueError, match="before the norm is known"):
            policy.limit(state, param_norms=param_norms)
        return
    with np.errstate(over="ignore"):
        limit = policy.limit(state, param_norms=param_norms)
    assert limit.target is limit.threshold or (limit.target == limit.threshold).all()
    _, decision = decide(policy, state, norms, param_norms=param_norms)
    expected = np.broadcast_to(limit.threshold, decision.threshold.shape)
    if "Drop" in repr(policy):  # the drop level is known only with the norm
        known = policy.limit(state, norms, param_norms=param_norms)
        expected = np.minimum(expected, known.drop)
    np.testing.assert_array_equal(decision.threshold, expected)


# Scale equivariance.

EQUIVARIANT = {
    code: policy
    for code, policy in POLICIES.items()
    if code.startswith(("Quantile", "ZScore", "Streaming", "Drop(S", "Drop(M"))
    or (code.startswith(("MeanStd", "Warmup(M")) and "log" not in code)
    or code == "EmaRatio(2.0, beta=0.9, warmup_steps=0)"
}
NOT_EQUIVARIANT = {
    code: POLICIES[code] for code in POLICIES.keys() - EQUIVARIANT.keys()
}


@each(EQUIVARIANT)
@fewer_examples
@given(series=any_series(norms=positive() | st.just(0.0)), k=st.integers(-60, 60))
def test_powers_of_two_change_no_scale(policy, series, k):
    """Bit for bit: the unit of the loss does not matter."""
    factor = np.float32(2.0**k)
    _, before = run(policy, series)
    _, after = run(policy, series._replace(norms=series.norms * factor))
    np.testing.assert_array_equal(after.scale, before.scale)
    np.testing.assert_array_equal(after.threshold, before.threshold * factor)


@pytest.mark.parametrize("code", sorted(NOT_EQUIVARIANT))
def test_absolute_constants_do_change_it(code):
    """The positive control. With `log=True` the difference is rounding only."""
    policy = NOT_EQUIVARIANT[code]
    norms = log_normal(np.random.default_rng(0), (60, 4))
    _, before = run(policy, series_of(norms))
    _, after = run(policy, series_of(norms * 2.0**10))
    if "log=True" in code:
        np.testing.assert_allclose(after.scale, before.scale, rtol=1e-5)
    else:
        depends_on_unit = not np.array_equal(after.scale, before.scale)
        assert depends_on_unit, f"{code} belongs into EQUIVARIANT"


@fewer_examples
@given(series=any_series(norms=positive()), k=st.integers(-9, 60))
def test_agc_follows_gradients_and_parameters_together(series, k):
    factor = np.float32(2.0**k)
    series = series._replace(param_norms=np.float32(1 + series.param_norms))
    policy = ParamRatio(0.1, eps=1e-3)
    _, before = run(policy, series)
    norms, param_norms = series.norms * factor, series.param_norms * factor
    _, after = run(policy, series._replace(norms=norms, param_norms=param_norms))
    np.testing.assert_array_equal(after.scale, before.scale)


# The scope lattice: k rows are k times one row.


@every_policy
@fewer_examples
@given(series=any_series(rows=3, most=12))
def test_rows_do_not_know_of_each_other(policy, series):
    state, together = run(policy, series)
    for row in range(3):
        one = type(series)(*(field[:, row : row + 1] for field in series))
        alone_state, alone = run(policy, one)
        for name, field in together._asdict().items():
            if "skip" not in repr(policy) or name not in ("scale", "skipped"):
                np.testing.assert_array_equal(
                    field[:, row], getattr(alone, name)[:, 0], err_msg=name
                )
        for leaf, other in zip(leaves(state), leaves(alone_state), strict=True):
            width = other.shape[1:]  # the buffer of a row alone may have grown less
            leaf = leaf[row : row + 1, : width[0]] if width else leaf[row : row + 1]
            np.testing.assert_array_equal(leaf, other)


# A combinator changes what is applied, never what is recorded.


COMBINATORS = [
    lambda policy: Cap(policy, max_norm=0.7),
    lambda policy: Floor(policy, min_norm=3.0),
    lambda policy: Drop(policy, action="zero"),
    lambda policy: Drop(policy, action="skip"),
    lambda policy: Warmup(policy, steps=4, threshold=0.3),
    lambda policy: Cap(Drop(Floor(Warmup(policy, steps=3), min_norm=0.5)), max_norm=1),
    lambda policy: Floor(Cap(Drop(policy, action="skip"), max_norm=0.7), min_norm=0.5),
    lambda policy: Warmup(Drop(policy), steps=4, threshold=0.3),
]


@every_kind
@fewer_examples
@given(series=any_series(most=10))
def test_the_inner_policy_records_as_if_it_were_alone(policy, series):
    inner, _ = run(policy, series)
    for combinator in COMBINATORS:
        state, _ = run(combinator(policy), series)
        counts = len(leaves(state)) > len(leaves(inner))  # those of a Warmup
        assert_same(state.inner if counts else state, inner)


@every_kind
@fewer_examples
@given(series=any_series(most=10))
def test_both_policies_of_a_drop_learn_as_if_alone(policy, series):
    """Each records against its own limit, in either place and within a combinator."""
    alone, _ = run(policy, series)
    other, _ = run(LEVEL, series)
    for combinator in (Cap, Floor, None):
        for drop, states in [
            (Drop(policy, clip=LEVEL), (alone, other)),
            (Drop(LEVEL, clip=policy), (other, alone)),
        ]:
            bound = {Cap: {"max_norm": 0.7}, Floor: {"min_norm": 3.0}}.get(combinator)
            state, _ = run(combinator(drop, **bound) if bound else drop, series)
            assert_same(tuple(state), states)


# The drop level. `LEVEL` follows the norms, so that levels of both kinds occur.

LEVEL = StreamingQuantile(0.8)


@every_kind
@fewer_examples
@given(series=any_series(most=12), norm=positive())
def test_a_cap_around_drop_clips_by_the_constant(policy, series, norm):
    """`Cap(Drop(P), c)` and `Drop(P, clip=Fixed(c))` say the same."""
    for action in ("zero", "skip"):
        capped = Cap(Drop(policy, action=action), max_norm=norm)
        clipping = Drop(policy, action=action, clip=Fixed(norm))
        state, decision = run(capped, series)
        states, expected = run(clipping, series)
        assert_same(decision, expected)
        assert_same(state, states.policy)


@every_kind
@fewer_examples
@given(series=any_series(most=12), norm=positive())
def test_drop_removes_what_its_policy_clips(policy, series, norm):
    """No combinator that lowers T drops more; a floor and a warm-up drop less."""
    _, inner = run(policy, series)
    _, alone = run(Drop(policy), series)
    np.testing.assert_array_equal(alone.dropped, inner.clipped)
    np.testing.assert_array_equal(alone.clipped, alone.dropped)
    for around in (Cap(Drop(policy), max_norm=norm), Drop(policy, clip=Fixed(norm))):
        _, decision = run(around, series)
        assert decision.dropped[alone.dropped].all()
        more = decision.dropped & ~alone.dropped  # a target too small for a scale
        assert (decision.threshold[more] / np.float32(series.norms[more]) == 0).all()
    _, floored = run(Floor(Drop(policy), min_norm=norm), series)
    above = np.where(alone.finite, series.norms, 0) > np.float32(norm)
    np.testing.assert_array_equal(floored.dropped, alone.dropped & above)
    _, warming = run(Warmup(Drop(policy), steps=len(series.norms)), series)
    assert not warming.dropped.any()
    _, twice = run(Drop(Drop(policy)), series)
    assert_same(twice, alone)


# The streaming quantile.


def drift(policy, series):
    """Return the actual and the expected ln(C_t / C_0), and the number t of norms."""
    state, decision = run(policy, series)
    first = int(np.argmax(decision.norm[:, 0] > 0))
    above = int(decision.clipped[first + 1 :, 0].sum())
    count = int((decision.norm[first + 1 :, 0] > 0).sum())
    ratio = math.log(float(state.level[0]) / float(decision.norm[first, 0]))
    return ratio, policy.rate * (above - (1 - policy.quantile) * count), count


@given(
    norms=st.lists(positive(1e-6, 1e6) | st.just(0.0), min_size=1, max_size=60).filter(
        any
    ),
    q=st.floats(0, 1),
    rate=st.floats(1e-3, 0.5),
)
def test_the_streaming_quantile_keeps_its_account(norms, q, rate):
    """clip rate = (1 - q) + ln(C_t / C_0) / (rate * t), for any series."""
    actual, expected, count = drift(StreamingQuantile(q, rate=rate), series_of(norms))
    assert actual == pytest.approx(expected, abs=(count + 1) * 1.5 * UNIT)


@pytest.mark.parametrize("rate", [0.02, 0.05])
@pytest.mark.parametrize("norm", [1e-30, 1e30])
def test_its_rounding_does_not_add_up_in_one_direction(rate, norm):
    """The worst case for a bias: every step falls (or rises) by the same factor."""
    steps = 3000 if norm < 1 else int(60 / rate)
    policy = StreamingQuantile(0.9, rate=rate)
    norms = np.full(steps, norm)
    norms[0] = 1.0
    actual, expected, count = drift(policy, series_of(norms))
    assert count == steps - 1
    assert abs(expected) > 5
    assert actual == pytest.approx(expected, abs=40 * UNIT)


def test_one_norm_moves_it_by_a_bounded_factor():
    policy = StreamingQuantile(0.9, rate=0.05)
    _, decision = run(policy, series_of([1.0, 1e30, 1e-30, 1e-30]))
    factors = decision.threshold[2:, 0] / decision.threshold[1:-1, 0]
    assert factors == pytest.approx([math.exp(0.045), math.exp(-0.005)], rel=1e-6)


# Clip rates: what is expected, and what algorithms have been found to do.


@pytest.mark.parametrize(
    "policy",
    [
        Quantile(0.9, history_length=200),
        Quantile(0.5, history_length=100),
        Quantile(0.1, history_length=None, include_current=True),
        StreamingQuantile(0.9),
        StreamingQuantile(0.5, rate=0.02),
        Warmup(Quantile(0.75, history_length=200), steps=50),
        Drop(Quantile(0.9, history_length=200)),
    ],
    ids=repr,
)
def test_the_expected_clip_rate_is_the_clip_rate(policy):
    """This holds for every spread of the norms."""
    log_std = np.repeat([0.1, 0.5, 1.0], 40)
    norms = log_normal(np.random.default_rng(1), (600, 120), log_std)
    _, decision = run(policy, series_of(norms))
    rates = decision.clipped[300:].reshape(300, 3, 40).mean(axis=(0, 2))
    assert rates == pytest.approx([policy.expected_clip_rate] * 3, abs=0.012)


@pytest.mark.parametrize(
    ("policy", "expected", "mean_scale"),
    [
        (ZScore(record="applied"), 0.036, 0.99),
        (ZScore(2.0, record="applied"), 0.087, 0.98),
        (ZScore(target="mean", record="applied"), 0.067, 0.97),
        (EmaRatio(warmup_steps=0), 0.71, 0.82),
        (EmaRatio(1.04, beta=0.99, warmup_steps=0), 0.76, 0.80),
        (EmaRatio(2.0, warmup_steps=0), 0.007, 1.0),
        (MeanStd(2.0, history_length=500), 0.041, 1.0),
    ],
    ids=lambda value: repr(value),
)
def test_clip_rates_are_those_of_an_independent_simulation(
    policy, expected, mean_scale
):
    """The log-deviation is 0.3; another program computed the expected numbers."""
    norms = log_normal(np.random.default_rng(2), (1500, 30))
    _, decision = run(policy, series_of(norms))
    assert decision.clipped[500:].mean() == pytest.approx(expected, rel=0.12)
    assert decision.scale[500:].mean() == pytest.approx(mean_scale, abs=0.02)


# Level shifts. A policy must follow a lasting change of the norms by ten.

BEFORE, ROWS = 1050, 24
SHIFTS = {
    "Quantile()": (190, 1000),
    "MeanStd()": (165, 1010),
    "MeanStd(log=True)": (195, 1000),
    "ZScore()": (40, 300),
    "ZScore(log=True)": (20, 200),
    "EmaRatio(warmup_steps=0)": (2400, 200),
    "EmaRatio(2.0, warmup_steps=0)": (90, 160),
    "StreamingQuantile()": (45, 420),
    "Warmup(Quantile(history_length=100), steps=100)": (20, 100),
    "Drop(ZScore())": (50, 300),
}
"""Policy -> the allowed number of steps after norms x 10, and after norms / 10."""


def steps_to_follow(policy, most):
    """Return the steps until the policy follows a shift by ten, up and down.

    Up: the mean scale is above 0.9 of its earlier value again. Down: the threshold is
    at most 1.5 times the threshold for the new norms.
    """
    norms = log_normal(np.random.default_rng(5), (BEFORE + most + 30, 2 * ROWS))
    norms[BEFORE:, :ROWS] *= 10
    norms[BEFORE:, ROWS:] /= 10
    _, decision = run(policy, series_of(norms))
    scale = decision.scale[:, :ROWS].mean(axis=1)
    scale = np.convolve(scale, np.ones(10) / 10, mode="valid")
    threshold = np.median(decision.threshold[:, ROWS:], axis=1)
    followed = (
        scale[BEFORE:] > 0.9 * scale[BEFORE - 200 : BEFORE - 10].mean(),
        threshold[BEFORE:] < 0.15 * threshold[BEFORE - 200 : BEFORE].mean(),
    )
    for good in followed:
        assert not good[0], "there was nothing to recover from"
    return [np.argmax(good) if good.any() else math.inf for good in followed]


@pytest.mark.parametrize("code", SHIFTS)
def test_every_policy_follows_a_level_shift(code):
    taken = steps_to_follow(policy_of(code), max(SHIFTS[code]))
    for steps, most in zip(taken, SHIFTS[code], strict=True):
        assert most / 2 < steps <= most


@pytest.mark.parametrize(
    "policy",
    [
        ZScore(record="applied"),
        ZScore(target="mean", record="applied"),
        EmaRatio(1.0001, warmup_steps=0),
    ],
    ids=repr,
)
def test_known_exceptions_do_not(policy):
    """The paper's ZClip: a clipped spike lies less than one sigma from the mean."""
    up, _ = steps_to_follow(policy, 3000)
    assert up == math.inf


def test_a_clipped_step_widens_the_z_score_by_seven_percent():
    """The step records T: sigma^2 <- alpha sigma^2 + (1 - alpha) (alpha z sigma)^2."""
    norms = log_normal(np.random.default_rng(0), 200)
    state, _ = run(ZScore(), series_of(norms))
    before = float(state.deviation[0])
    state, decision = decide(ZScore(), state, [100.0])
    assert decision.clipped[0]
    grown = math.sqrt(0.97 + 0.03 * (0.97 * 2.5) ** 2)
    assert state.deviation[0] / before == pytest.approx(grown, rel=1e-5)
    assert grown == pytest.approx(1.07, abs=0.005)


CONSTANT = {
    "Quantile()": 1000,
    "MeanStd()": 160,
    "MeanStd(log=True)": 200,
    "ZScore()": 45,
    "ZScore(log=True)": 45,
    "EmaRatio(2.0, warmup_steps=0)": 90,
    "StreamingQuantile()": 55,
}
"""Policy -> the allowed number of steps after constant norms x 10 or x 3."""


@pytest.mark.parametrize("code", CONSTANT)
def test_a_history_without_any_spread_is_no_trap(code):
    """With constant norms sigma is 0, and every quantile is the same number."""
    norms = np.ones((BEFORE + CONSTANT[code], 2))
    norms[BEFORE:] = 10, 3
    _, decision = run(policy_of(code), series_of(norms))
    most_clipped = 0.99 if "Streaming" in code else 1 - 1e-6
    assert (decision.scale[:BEFORE] > most_clipped).all()
    assert (decision.scale[BEFORE] < 1).all()
    assert (decision.scale[-1] > 0.9).all()


@pytest.mark.parametrize(
    "policy", [Fixed(1.0), Cap(Fixed(3.0), max_norm=1.0)], ids=repr
)
def test_a_constant_threshold_follows_nothing(policy):
    _, decision = run(policy, series_of([0.5] * 50 + [5.0] * 50))
    assert (decision.scale[50:] == np.float32(0.2)).all()


def test_a_floor_leaves_small_norms_alone():
    _, decision = run(Floor(Fixed(1.0), min_norm=2.0), series_of([1.5, 2.0, 2.5]))
    assert decision.scale[:, 0] == pytest.approx([1.0, 1.0, 0.8])


def test_the_table_is_complete():
    """Every policy and combinator is in the tables of these tests."""
    import autoclip_core

    kinds = [
        name
        for name, kind in vars(autoclip_core).items()
        if autoclip_core.Policy in getattr(kind, "__mro__", ())[1:]
    ]
    missing = [n for n in kinds if not any(f"{n}(" in code for code in STATIC)]
    assert {"Quantile", "Cap"} <= {*kinds}
    assert missing == [], "add each to the table STATIC in tests/support/cases.py"
