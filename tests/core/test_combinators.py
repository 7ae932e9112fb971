"""Combinators change what is applied; the inner policy records as if it were alone.

test_laws.py tests the second half for all policies.
"""

import numpy as np
import pytest

from autoclip_core import (
    Cap,
    Drop,
    EmaRatio,
    Fixed,
    Floor,
    MeanStd,
    Quantile,
    Warmup,
    ZScore,
    decide,
)

from ..support.cases import log_normal, policy_of, run, series_of

INF = float("inf")
MEDIAN = Quantile(0.5, history_length=100)


def thresholds_and_scales(policy, norms):
    _, decision = run(policy, series_of(norms))
    return decision.threshold[:, 0].tolist(), decision.scale[:, 0].tolist()


# By hand: the median of 4 is 4, that of 4 and 6 is 5, that of 4, 6 and 10 is 6.

NORMS = [4.0, 6.0, 10.0, 3.0]
ALONE = [INF, 4.0, 5.0, 6.0]


@pytest.mark.parametrize(
    ("policy", "thresholds", "left"),
    [
        (MEDIAN, ALONE, [4, 4, 5, 3]),
        (Cap(MEDIAN, max_norm=4.5), [4.5, 4, 4.5, 4.5], [4, 4, 4.5, 3]),
        (Cap(MEDIAN, max_norm=2.0), [2, 2, 2, 2], [2, 2, 2, 2]),
        (Floor(MEDIAN, min_norm=5.5), [INF, 5.5, 5.5, 6], [4, 5.5, 5.5, 3]),
        (Floor(MEDIAN, min_norm=20.0), [INF, 20, 20, 20], [4, 6, 10, 3]),
        (Drop(MEDIAN), ALONE, [4, 0, 0, 3]),
        (Drop(MEDIAN, action="skip"), ALONE, [4, 0, 0, 3]),
        (Warmup(MEDIAN, steps=2, threshold=3.0), [3, 3, 5, 6], [3, 3, 5, 3]),
        (Warmup(MEDIAN, steps=3), [INF, INF, INF, 6], [4, 6, 10, 3]),
        (Warmup(MEDIAN, steps=0, threshold=1.0), ALONE, [4, 4, 5, 3]),
        (Cap(Drop(MEDIAN), max_norm=4.5), [4.5, 4, 4.5, 4.5], [4, 0, 0, 3]),
        (Floor(Drop(MEDIAN), min_norm=5.5), [INF, 5.5, 5.5, 6], [4, 0, 0, 3]),
        (Drop(Cap(MEDIAN, max_norm=3.5)), [3.5, 3.5, 3.5, 3.5], [0, 0, 0, 3]),
        (Cap(Drop(MEDIAN), max_norm=2.0), [2, 2, 2, 2], [2, 0, 0, 2]),
        (Drop(MEDIAN, clip=Fixed(2.0)), [2, 2, 2, 2], [2, 0, 0, 2]),
        (Drop(MEDIAN, clip=Fixed(4.5)), [4.5, 4, 4.5, 4.5], [4, 0, 0, 3]),
        (Drop(Fixed(9.0), clip=MEDIAN), [9, 4, 5, 6], [4, 4, 0, 3]),
        (Drop(Fixed(9.0), clip=Drop(MEDIAN)), [9, 4, 5, 6], [4, 0, 0, 3]),
        (Drop(Drop(MEDIAN), clip=Fixed(2.0)), [2, 2, 2, 2], [2, 0, 0, 2]),
        (
            Floor(Drop(MEDIAN, clip=Fixed(2.0)), min_norm=5.5),
            [5.5, 5.5, 5.5, 5.5],
            [4, 0, 0, 3],
        ),
        (
            Cap(Drop(MEDIAN, clip=Fixed(9.0)), max_norm=3.5),
            [3.5, 3.5, 3.5, 3.5],
            [3.5, 0, 0, 3],
        ),
        (
            Warmup(Drop(MEDIAN, clip=Fixed(2.0)), steps=2, threshold=5.0),
            [5, 5, 2, 2],
            [4, 5, 0, 2],
        ),
        (
            Cap(Warmup(MEDIAN, steps=1, threshold=9.0), max_norm=4.5),
            [4.5, 4, 4.5, 4.5],
            [4, 4, 4.5, 3],
        ),
        (
            Warmup(Cap(MEDIAN, max_norm=4.5), steps=2, threshold=9.0),
            [9, 9, 4.5, 4.5],
            [4, 6, 4.5, 3],
        ),
        (
            Warmup(Drop(MEDIAN), steps=2, threshold=3.0),
            [3, 3, 5, 6],
            [3, 3, 0, 3],
        ),
        (Floor(Cap(MEDIAN, max_norm=1.0), min_norm=2.0), [2] * 4, [2, 2, 2, 2]),
        (Cap(Floor(MEDIAN, min_norm=2.0), max_norm=1.0), [1] * 4, [1, 1, 1, 1]),
    ],
    ids=repr,
)
def test_by_hand(policy, thresholds, left):
    actual, scales = thresholds_and_scales(policy, NORMS)
    assert actual == thresholds
    assert np.multiply(scales, NORMS) == pytest.approx(left)


# Targets below the threshold.


def test_a_floor_lifts_a_target_below_it_but_not_that_of_drop():
    """`ZScore` may scale to the mean, but never below the floor."""
    inner = ZScore(2.0, warmup_steps=4, target="mean")
    norms = [1.0, 3.0, 1.0, 3.0, 50.0]  # mean 2, deviation 1, threshold 4
    for policy, left in [
        (inner, 2.0),
        (Floor(inner, min_norm=1.5), 2.0),
        (Floor(inner, min_norm=3.5), 3.5),
        (Floor(inner, min_norm=10.0), 10.0),
        (Cap(inner, max_norm=3.0), 2.0),
        (Cap(inner, max_norm=1.5), 1.5),
        (Floor(Drop(inner), min_norm=10.0), 0.0),
        (Drop(Floor(inner, min_norm=10.0)), 0.0),
    ]:
        _, scales = thresholds_and_scales(policy, norms)
        assert scales[-1] * 50 == pytest.approx(left), policy


# Drop.


def test_drop_zero_removes_the_row_and_drop_skip_the_whole_update():
    norms = np.float32([0.5, 4.0, 1.0])
    zero, skip = Drop(Fixed(1.0)), Drop(Fixed(1.0), action="skip")
    _, decision = decide(zero, zero.init(3), norms)
    assert decision.scale.tolist() == [1.0, 0.0, 1.0]
    assert decision.clipped.tolist() == [False, True, False]
    assert not decision.skipped.any()
    _, decision = decide(skip, skip.init(3), norms, observed=[True, True, False])
    assert decision.scale.tolist() == [0.0, 0.0, 1.0]
    assert decision.clipped.tolist() == [False, True, False]
    assert decision.skipped.all()
    _, decision = decide(skip, skip.init(3), norms / 4)
    assert decision.scale.tolist() == [1.0, 1.0, 1.0]
    assert not decision.skipped.any()


def test_a_bad_norm_is_not_above_a_threshold():
    """`nonfinite` decides about the row; it does not cancel the update."""
    policy = Drop(Fixed(1.0), action="skip")
    norms = np.float32([0.5, np.inf, np.nan])
    _, decision = decide(policy, policy.init(3), norms)
    assert decision.scale.tolist() == [1.0, 0.0, 0.0]
    assert not decision.skipped.any()


def test_the_recommended_recipe_cancels_spikes_and_almost_no_healthy_update():
    """The norms lie above the cap, as they often do: every update is clipped."""
    norms = 3 * log_normal(np.random.default_rng(0), 501)
    norms[-1] = 60.0
    policy = Cap(Drop(ZScore(4.0), action="skip"), max_norm=1.0)
    _, decision = run(policy, series_of(norms))
    assert decision.skipped[:-1].sum() <= 2
    assert decision.clipped.sum() > 490
    kept = ~decision.skipped[:-1, 0]
    left = (decision.scale[:-1, 0] * norms[:-1])[kept]
    assert left == pytest.approx(np.minimum(norms[:-1][kept], 1.0))
    assert decision.skipped[-1]
    assert decision.dropped[-1]
    assert decision.scale[-1] == 0


def test_the_threshold_of_drop_is_that_of_its_clip_policy_before_the_norm_is_known():
    policy = Drop(MEDIAN, clip=Fixed(2.0))
    state, _ = run(policy, series_of(NORMS))
    for outer, expected in [(policy, 2.0), (Cap(policy, max_norm=1.0), 1.0)]:
        limit = outer.limit(state)
        assert limit.threshold.tolist() == [expected]
    with pytest.raises(ValueError, match=r"clip=\.\.\.\), whose threshold is that of"):
        Drop(MEDIAN).limit(state.policy)
    with pytest.raises(ValueError, match="before the norm is known"):
        Drop(MEDIAN, clip=Drop(MEDIAN)).limit(Drop(MEDIAN, clip=MEDIAN).init(1))


def test_the_state_of_drop_with_a_clip_policy_names_both():
    policy = Drop(EmaRatio(2.0, beta=0.5, warmup_steps=0), clip=MEDIAN, action="skip")
    state, _ = run(policy, series_of([1.0, 3.0, 99.0]))
    assert state._fields == ("policy", "clip")
    assert "clip=" not in repr(Drop(MEDIAN))
    assert policy_of(repr(policy)) == policy


@pytest.mark.parametrize("wrong", [1.0, Fixed, "Fixed"])
def test_the_clip_policy_of_drop_must_be_a_policy(wrong):
    with pytest.raises(TypeError, match="clip must be a policy, got"):
        Drop(MEDIAN, clip=wrong)


@pytest.mark.parametrize("wrapped", ["Cap({}, max_norm=9)", "Floor({}, min_norm=0.1)"])
def test_an_outer_combinator_still_cancels(wrapped):
    policy = policy_of(wrapped.format("Drop(Fixed(1.0), action='skip')"))
    _, decision = decide(policy, policy.init(2), [0.5, 4.0])
    assert decision.scale.tolist() == [0.0, 0.0]
    assert decision.skipped.all()


@pytest.mark.parametrize("unit", [1.0, 0.125])
def test_a_warm_up_around_drop_clips_and_does_not_cancel(unit):
    """During the warm-up the inner policy has no effect, for any target."""
    policy = Warmup(Drop(MEDIAN, action="skip"), steps=1, threshold=2 * unit)
    state, decision = decide(policy, policy.init(2), [1 * unit, 4 * unit])
    assert decision.scale.tolist() == [1.0, 0.5]
    assert not decision.skipped.any()
    state, decision = decide(policy, state, [1 * unit, 5 * unit])
    assert decision.scale.tolist() == [0.0, 0.0]
    assert decision.skipped.all()


@pytest.mark.parametrize("action", ["zero", "skip"])
@pytest.mark.parametrize("inner", [ZScore(), MeanStd(history_length=30)], ids=repr)
def test_a_lasting_change_of_level_is_not_dropped_for_ever(inner, action):
    norms = log_normal(np.random.default_rng(0), 200)
    norms[100:] *= 10
    _, decision = run(Drop(inner, action=action), series_of(norms))
    assert decision.scale[100] == 0
    assert (decision.scale[-50:] > 0).mean() > 0.7


# Warmup.


def test_warm_up_counts_the_recorded_norms_of_each_row():
    """A zero, a NaN and a missing gradient do not count."""
    policy = Warmup(Fixed(9.0), steps=2, threshold=1.0)
    bad, zero = np.nan, 0.0
    norms = [[4, bad, 4], [4, 4, zero], [4, zero, 4], [4, 4, 4], [4, 4, 4]]
    observed = np.ones((5, 3), bool)
    observed[3, 2] = False
    state, decision = run(policy, series_of(norms, observed))
    np.testing.assert_array_equal(
        decision.threshold, [[1, 1, 1], [1, 1, 1], [9, 1, 1], [9, 1, 9], [9, 9, 9]]
    )
    assert state.recorded.tolist() == [2, 2, 2]


def test_the_count_of_a_warm_up_stays_where_it_ends():
    policy = Warmup(Fixed(1.0), steps=3)
    state, _ = run(policy, series_of(np.ones(50)))
    assert state.recorded.tolist() == [3]
    assert state.recorded.dtype == np.int32


def test_warm_ups_nest():
    """The inner warm-up has 3 steps; the outer one covers the first 2."""
    policy = Warmup(Warmup(Fixed(3.0), steps=3, threshold=2.0), steps=2, threshold=1.0)
    thresholds, _ = thresholds_and_scales(policy, [9.0] * 5)
    assert thresholds == [1, 1, 2, 3, 3]


def test_the_norms_recorded_under_a_cap_are_not_capped():
    """A policy that recorded the cap would keep a threshold of 2 without it."""
    inner = EmaRatio(2.0, beta=0.5, warmup_steps=0)
    capped = Cap(inner, max_norm=2.0)
    state, decision = run(capped, series_of([8.0] * 10))
    assert (decision.scale[:, 0] == 0.25).all()
    _, decision = decide(inner, state, [8.0])
    assert decision.threshold.tolist() == [16.0]
    assert decision.scale.tolist() == [1.0]


@pytest.mark.parametrize(
    "code",
    ["Cap({}, max_norm=1)", "Floor({}, min_norm=1)", "Drop({})", "Warmup({}, steps=2)"],
)
def test_a_combinator_needs_what_the_inner_policy_needs(code):
    assert policy_of(code.format("ParamRatio(0.1)")).needs_param_norms
    assert not policy_of(code.format("Fixed(1.0)")).needs_param_norms
