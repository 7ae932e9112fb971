"""A replay decides as training does, and reports what plain lists give."""

import math
import statistics

import numpy as np
import pytest

from autoclip_core import (
    Cap,
    Drop,
    EmaRatio,
    Fixed,
    MeanStd,
    ParamRatio,
    Quantile,
    StreamingQuantile,
    Warmup,
    ZScore,
    decide,
    replay,
    suggest_threshold,
)

NAN, INF = math.nan, math.inf

POLICIES = {
    "fixed": Fixed(1.2),
    "quantile": Quantile(0.9, history_length=20),
    "all": Quantile(0.3, history_length=None, include_current=True),
    "streaming": StreamingQuantile(0.9),
    "mean_std": MeanStd(2.0, history_length=20),
    "zscore": ZScore(2.5),
    "ema": EmaRatio(1.5, warmup_steps=10),
    "capped": Cap(Warmup(Quantile(0.9, history_length=7), steps=3), max_norm=2.0),
    "drop": Drop(Quantile(0.9, history_length=7), action="skip"),
}


def example_norms(steps=300, seed=0):
    rng = np.random.default_rng(seed)
    norms = np.exp(rng.normal(scale=0.4, size=steps)).astype(np.float32)
    norms[[50, 120]] *= 20
    norms[[70, 71, 200]] = NAN, INF, 0.0
    return norms


@pytest.mark.parametrize("name", POLICIES)
def test_a_replay_agrees_with_decide_on_two_equal_rows(name):
    # Two rows take the general path of the window, one row the short one.
    policy, norms = POLICIES[name], example_norms()
    report = replay(norms, policy)
    state = policy.init(rows=2)
    for step, norm in enumerate(norms):
        state, decision = decide(policy, state, [norm, norm])
        assert report.thresholds[step] == decision.threshold[0]
        assert report.scales[step] == decision.scale[1]
        assert report.clipped[step] == decision.clipped[1]
        assert report.finite[step] == decision.finite[0]
        assert report.skipped[step] == decision.skipped[0]


def test_a_replay_reports_these_numbers():
    report = replay([1.0, 4.0, NAN, 8.0, 2.0], Fixed(2.0))
    assert report.thresholds.tolist() == [2.0] * 5
    assert report.scales.tolist() == [1.0, 0.5, 0.0, 0.25, 1.0]
    assert report.clip_rate == 2 / 4
    assert report.mean_scale == (1 + 0.5 + 0.25 + 1) / 4
    assert (report.median_threshold, report.nonfinite) == (2.0, 1)
    assert replay([NAN], Fixed(2.0)).nonfinite == 1
    assert math.isnan(replay([NAN], Fixed(2.0)).clip_rate)


def test_rates_are_clip_rates_over_time():
    report = replay([1.0] * 50 + [4.0] * 50, Fixed(2.0))
    assert report.rates(4).tolist() == [0.0, 0.0, 1.0, 1.0]
    assert np.isnan(replay([NAN, 1.0], Fixed(2.0)).rates(2)[0])
    assert replay([NAN, 4.0], Fixed(2.0)).rates(1).tolist() == [1.0]
    assert len(report.rates()) == 50


@pytest.mark.parametrize("intervals", [1, 3, 12, 60])
def test_the_clip_rate_of_each_interval(intervals):
    """Intervals with one finite norm, or with none, are included."""
    rng = np.random.default_rng(0)
    norms = rng.choice([1.0, 4.0, NAN, INF], size=60, p=[0.3, 0.2, 0.3, 0.2])
    norms[[0, -1]] = 4.0
    size = 60 // intervals
    expected = []
    for start in range(0, 60, size):
        known = [n for n in norms[start : start + size].tolist() if n < INF]
        rate = sum(n > 2 for n in known) / len(known) if known else NAN
        expected.append(rate)
    np.testing.assert_array_equal(replay(norms, Fixed(2.0)).rates(intervals), expected)


def test_a_replay_lists_spikes_and_those_that_were_caught():
    norms = np.ones(300)
    norms[[100, 200]] = 50.0, 6.0
    report = replay(norms, Fixed(10.0))
    assert report.spikes.tolist() == [100, 200]
    assert report.spikes_caught.tolist() == [100]
    assert "spikes caught     1 of 2" in str(report)
    assert "spikes caught     none" in str(replay(np.ones(300), Fixed(10.0)))


def test_a_replay_and_a_suggestion_count_the_same_spikes():
    rng = np.random.default_rng(0)
    norms = np.exp(rng.normal(0, 0.2, 600)) * np.geomspace(1, 9, 600)
    norms[rng.choice(500, 40, replace=False)] *= rng.uniform(2, 12, 40)
    norms[[70, 80]] = NAN, 0.0
    norms[560:] *= 1e6  # damage, not spikes
    spikes = replay(norms, Fixed(3.0)).spikes.tolist()
    assert 10 < len(spikes) < 40
    assert tuple(spikes) == suggest_threshold(norms).diagnosis.spikes


def test_a_replay_reports_a_level_shift_and_the_steps_to_recover():
    rng = np.random.default_rng(0)
    norms = np.exp(rng.normal(scale=0.1, size=4000))
    norms[2000:] *= 10
    quick = replay(norms, StreamingQuantile(0.9))
    never = replay(norms, Fixed(1.2))
    assert abs(quick.shift.step - 2000) <= 2
    assert quick.shift.ratio == pytest.approx(10, rel=0.1)
    # C rises by exp(0.045) a step: 51 steps for a factor of 10.
    assert 20 <= quick.recovery <= 60
    assert never.recovery == INF
    assert "not followed" in str(never)
    assert math.isnan(replay(norms[:1900], Fixed(1.2)).recovery)
    fallen = replay(norms[::-1], Quantile(0.9))
    assert fallen.shift.ratio == pytest.approx(0.1, rel=0.1)
    assert math.isnan(fallen.recovery)
    assert "followed" not in str(fallen)


def recovery_by_hand(report):
    """Return the steps until 50 scales have over 90 % of the mean before the shift."""
    scales = [
        scale if math.isfinite(norm) else 1.0
        for norm, scale in zip(report.norms, report.scales.tolist(), strict=True)
    ]
    at = report.shift.step
    before = statistics.fmean(scales[at - 50 : at])
    for after in range(len(scales) - at):
        if statistics.fmean(scales[at + after : at + after + 50]) > 0.9 * before:
            return after
    return INF


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("ratio", [4.0, 9.0])
@pytest.mark.parametrize("policy", ["streaming", "mean_std", "fixed"])
def test_the_recovery_agrees_with_a_calculation_by_hand(policy, ratio, seed):
    rng = np.random.default_rng(seed)
    norms = np.exp(rng.normal(scale=0.3, size=400))
    norms[rng.integers(60, 340) :] *= ratio
    norms[rng.random(400) < 0.05] = NAN
    report = replay(norms, POLICIES[policy])
    assert report.recovery == recovery_by_hand(report)


def test_a_mean_scale_of_exactly_90_percent_is_not_a_recovery():
    """5 of the 50 norms after the shift are dropped, and 0 or 1 of those before."""
    norms = np.repeat([1.0, 10.0], [50, 51])
    norms[50:75:5] = 30.0
    norms[51] = NAN  # no policy scales it
    report = replay(norms, Drop(Fixed(20.0)))
    assert "of the steps dropped to 0" in str(report)
    assert (report.scales[report.dropped] == 0).all()
    assert report.shift.step == 50
    assert report.recovery == recovery_by_hand(report) == 1  # 4 of the last 50
    norms[0] = 30.0
    assert replay(norms, Drop(Fixed(20.0))).recovery == 0


def test_a_replay_prints_these_lines():
    norms = np.ones(300)
    norms[[100, 200, 250]] = 40.0, 6.0, NAN
    assert str(replay(norms, Fixed(10.0))) == (
        "policy            Fixed(max_norm=10.0)\n"
        "steps             300 (1 non-finite)\n"
        "clip rate         0.334 %\n"  # 1 of 299
        "mean scale        0.9975\n"  # 298.25 of 299
        "median threshold  10\n"
        "spikes caught     1 of 2\n"
        "level shift       none"
    )


def test_progress_receives_the_loop_and_its_length():
    lengths = []

    def wrap(items):
        lengths.append(len(items))
        yield from items

    for steps, blocks in [(1, 1), (500, 1), (501, 2), (1000, 2), (1001, 3)]:
        report = replay(np.ones(steps), Fixed(2.0), progress=wrap)
        assert lengths.pop() == blocks
        assert report.thresholds.tolist() == [2.0] * steps


@pytest.mark.parametrize(
    ("norms", "policy", "error", "words"),
    [
        ([], Fixed(1.0), ValueError, r"norms must be of shape \(steps,\)"),
        ([[1.0]], Fixed(1.0), ValueError, r"got \(1, 1\)"),
        ([1.0, -2.0], Fixed(1.0), ValueError, "norms must be >= 0, got -2.*step 1"),
        (["1"], Fixed(1.0), TypeError, "norms must be real numbers"),
        ([1.0], Fixed, TypeError, "write a policy"),
        ([1.0], ParamRatio(), ValueError, "a policy of the gradient's norm alone"),
    ],
    ids=["empty", "two-d", "negative", "text", "class", "parameters"],
)
def test_the_error_names_bad_input(norms, policy, error, words):
    with pytest.raises(error, match=words):
        replay(norms, policy)


def test_a_norm_beyond_float32_is_not_finite():
    assert replay([1.0, 1e300], Fixed(2.0)).finite.tolist() == [True, False]
