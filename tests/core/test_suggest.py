"""The suggested threshold, against the standard library."""

import itertools
import math
import statistics

import numpy as np
import pytest

from autoclip_core import Quantile, replay, suggest_threshold
from autoclip_core.planning import suggest
from autoclip_core.planning.suggest import (
    choose_policy,
    find_divergence,
    measure_drift,
    measure_noise,
)

NAN, INF = math.nan, math.inf


def test_the_statistics_are_those_of_the_standard_library():
    norms = np.exp(np.random.default_rng(0).normal(size=997)).tolist()
    found = suggest_threshold([*norms, NAN, INF])
    cuts = statistics.quantiles(norms, n=100, method="inclusive")
    assert (found.steps, found.nonfinite) == (999, 2)
    assert found.mean == pytest.approx(statistics.fmean(norms))
    assert found.std == pytest.approx(statistics.pstdev(norms))
    assert (found.min, found.max) == (min(norms), max(norms))
    assert found.median == pytest.approx(statistics.median(norms))
    assert [found.p90, found.p95, found.p99] == pytest.approx(
        [cuts[89], cuts[94], cuts[98]]
    )
    assert found.max_norm == found.p90
    assert found.mean_range == pytest.approx((0.5 * found.mean, 10 * found.mean))
    assert found.log_std == pytest.approx(statistics.pstdev(map(math.log, norms)))


def test_huge_norms_do_not_overflow():
    found = suggest_threshold([1e308] * 200)
    assert (found.mean, found.std, found.median) == (1e308, 0.0, 1e308)
    assert suggest_threshold([1e-300, 1e308] * 2).mean == 5e307


def test_a_suggestion_is_told_line_by_line():
    """Of 0 to 10: the mean is 5, the deviation sqrt(10), p90 the last but one."""
    told = str(suggest_threshold([*np.arange(11.0), NAN])).splitlines()
    assert told[:12] == [
        "steps         12 (1 non-finite)",
        "mean          5",
        "std           3.162",
        "min           0",
        "median        5",
        "p90           9",
        "p95           9.5",
        "p99           9.9",
        "max           10",
        "suggested     max_norm = 9",
        "mean range    2.5 to 50 (0.5 to 10 times the mean)",
        f"or a policy   {Quantile(0.9)!r}",
    ]
    assert told[12].startswith("Too early to judge: 11 finite norms")


def calm(seed=0, spread=0.1, size=900):
    return np.exp(np.random.default_rng(seed).normal(scale=spread, size=size))


@pytest.mark.parametrize(
    ("norms", "policy", "words"),
    [
        (calm(), Quantile(0.9), "The level is steady"),
        (calm(spread=1.5), Quantile(0.5), "heavy-tailed"),
        (
            calm() * np.linspace(1, 9, 900),
            Quantile(0.9, history_length=128),
            "The level moves",
        ),
    ],
    ids=["steady", "heavy", "drifting"],
)
def test_the_policy_follows_from_the_series(norms, policy, words):
    found = suggest_threshold(norms)
    assert found.policy == policy
    assert words in " ".join(found.advice)
    assert repr(policy) in str(found)


def test_advice_names_its_numbers():
    norms = calm()
    norms[[100, 300]] = 40.0
    said = " ".join(suggest_threshold([*norms, NAN]).advice)
    assert "2 spikes" in said
    assert "1 of 901 steps (0.111 %)" in said
    assert "Too early to judge: 3 finite" in str(suggest_threshold([1.0, 2.0, 3.0]))


@pytest.mark.parametrize("norms", [[NAN, INF], [], [-1.0]], ids=str)
def test_a_series_that_says_nothing_is_refused(norms):
    with pytest.raises(ValueError, match="norms must"):
        suggest_threshold(norms)


def test_zeros_alone_have_statistics():
    found = suggest_threshold([0.0] * 5)
    assert (found.max_norm, found.mean, found.std, found.log_std) == (0, 0, 0, 0)
    assert found.policy == Quantile(0.9)


def test_a_hundred_norms_are_enough():
    assert "Too early to judge: 99 finite" in str(suggest_threshold(calm(size=99)))
    assert "Too early" not in str(suggest_threshold(calm(size=100)))


def around(level):
    noise = np.exp(np.random.default_rng(0).normal(0, 0.1, 2000))
    return noise * level


@pytest.mark.parametrize(
    ("level", "policy", "word"),
    [
        (np.geomspace(100, 1, 2000), Quantile(0.9, history_length=128), "moves"),
        (np.geomspace(1, 100, 2000), Quantile(0.9, history_length=128), "moves"),
        (np.repeat([1.0, 100.0], 1000), Quantile(0.9, history_length=128), "moves"),
        (np.repeat([1000.0, 1.0], [60, 1940]), Quantile(0.9), "steady"),
        (np.exp(np.random.default_rng(1).normal(0, 1.5, 2000)), Quantile(0.5), "tail"),
    ],
    ids=["decay", "rise", "shift", "warm-up", "heavy"],
)
def test_a_level_that_moves_is_no_heavy_tail(level, policy, word):
    found = suggest_threshold(around(level))
    assert found.policy == policy
    assert word in " ".join(found.advice)


def test_a_run_that_diverged_is_named_first_and_its_healthy_part_judged():
    rise = np.geomspace(1, 1e12, 150)
    norms = np.concatenate([calm(size=1200), rise, [NAN] * 50])
    found = suggest_threshold(norms)
    assert found.diverged_at == 1200 + np.flatnonzero(rise > 10)[0]
    assert str(found).startswith("The run diverged: from step 1213 on")
    healthy = suggest_threshold(norms[: found.diverged_at])
    assert healthy.diverged_at is None
    assert found.policy == healthy.policy
    assert healthy.max_norm < 1.3 < found.max_norm
    assert suggest_threshold(norms[:99]).diverged_at is None
    assert suggest_threshold(norms[:1225]).diverged_at is None  # 90 is not sure


def test_a_level_that_changes_is_told_as_a_replay_tells_it():
    norms = around(np.repeat([1.0, 8.0, 1.0], [1200, 200, 600]))
    found, shift = suggest_threshold(norms), replay(norms, Quantile(0.9)).shift
    assert f"changes x{shift.ratio:.4g} at step {shift.step}" in str(found)
    assert "changes" not in str(suggest_threshold(calm()))


def test_a_constant_has_no_spikes_to_filter():
    advice = " ".join(suggest_threshold([2.0] * 500).advice)
    assert "would have clipped 0 % of these" in advice
    assert "as a spike filter 0 %" in advice


def test_the_rates_are_those_of_the_series():
    """Of 1 to 200, 20 norms are above p90 = 180.1, and 2 above p99 = 198.01."""
    advice = " ".join(suggest_threshold(np.arange(1.0, 201)).advice)
    assert "max_norm = 180.1 (p90) would have clipped 10 %" in advice
    assert "p99 = 198 as a spike filter 1 %" in advice
    assert "half the mean" not in advice


def test_a_mean_that_a_few_norms_make():
    """Of 21 norms p90 is the third largest; here it is 1, and the mean v / 8."""
    norms = [0.0] * 9 + [1.0] * 10
    assert "half the mean" not in str(suggest_threshold([*norms, 16.0, 16.0]))
    assert "below half the mean (1.002)" in str(suggest_threshold([*norms, 16, 16.1]))


def test_the_largest_spike_is_told():
    norms = np.ones(300)
    norms[[100, 200]] = 40.0, 7.0
    advice = " ".join(suggest_threshold(3 * norms).advice)
    assert "2 spikes stand out from their neighbours, the largest 40 times" in advice


# What the policy rests on.


def test_noise_is_told_from_step_to_step():
    norms = (calm(spread=0.7) * np.geomspace(1, 100, 900)).tolist()
    norms[7:9] = 0.0, 0.0  # left out, and their neighbours are neighbours
    logs = [math.log(norm) for norm in norms if norm > 0]
    squares = [(b - a) ** 2 for a, b in itertools.pairwise(logs)]
    expected = math.sqrt(statistics.fmean(squares) / 2)
    assert measure_noise(np.array(norms)) == pytest.approx(expected)
    assert measure_noise(np.array([1.0, math.e])) == pytest.approx(math.sqrt(0.5))
    for norms in ([], [3.0], [0.0, 3.0]):
        assert measure_noise(np.array(norms)) == 0


@pytest.mark.parametrize("size", [100, 101, 102, 200])
def test_drift_is_from_the_first_third_to_the_last(size):
    norms = (calm(spread=0.5, size=size) * np.linspace(1, 5, size)).tolist()
    first, last = norms[: size // 3], norms[-(size // 3) :]
    expected = statistics.median(last) / statistics.median(first)
    for scale in (1e-9, 1.0, 1e9):
        assert measure_drift(scale * np.array(norms)) == pytest.approx(expected)
    assert measure_drift(np.array(norms[:99])) == 1


def test_there_is_no_drift_from_0_or_to_0():
    norms = np.repeat([0.0, 1.0], 60)
    assert (
        measure_drift(norms)
        == measure_drift(norms[::-1])
        == measure_drift(0 * norms)
        == 1
    )


@pytest.mark.parametrize("level", [2.0, 0.5])
def test_a_level_moves_if_it_more_than_doubles_or_halves(level):
    norms = np.repeat([1.0, 1.0, level], 100)
    assert choose_policy(norms)[0] == Quantile(0.9)
    norms[200:] *= level**0.01
    assert choose_policy(norms)[0] == Quantile(0.9, history_length=128)


def test_a_tail_is_heavy_above_a_deviation_of_1(monkeypatch):
    """Neighbours that differ by x in the logarithm have the noise x / sqrt(2)."""
    for noise, policy in [(0.995, Quantile(0.9)), (1.005, Quantile(0.5))]:
        norms = np.exp(np.tile([0.0, noise * math.sqrt(2)], 100))
        assert choose_policy(norms)[0] == policy
    monkeypatch.setattr(suggest, "HEAVY_TAIL", measure_noise(norms))
    assert choose_policy(norms)[0] == Quantile(0.9)


def test_a_run_diverged_if_its_end_is_a_thousand_times_the_usual():
    norms = np.repeat([1.0, 10.0, 10.5, 1000.0], [110, 1, 1, 10])
    assert find_divergence(norms) is None
    norms[-10:] = 1001.0
    assert find_divergence(norms) == 111  # 10 is still as usual
    norms[3:5] = NAN, INF  # the step is one of the whole series
    assert find_divergence(norms) == 111
    # The median of the last ten lies between two halves, or in the larger one.
    assert find_divergence(np.repeat([1.0, 1e5], [115, 5])) == 115
    assert find_divergence(np.repeat([1.0, 1e5], [116, 4])) is None


def test_the_usual_is_the_median_of_the_first_half():
    norms = np.repeat([1e-3, 1.0, 500.0], [25, 85, 10])
    assert find_divergence(norms) is None
    norms[:31] = 1e-3
    assert find_divergence(norms) == 31
    assert find_divergence(np.repeat([0.0, 1.0], 60)) is None


def test_a_hundred_norms_are_enough_to_diverge():
    norms = np.repeat([1.0, 1e6], [80, 20])
    for scale in (1e-9, 1.0, 1e9):
        assert find_divergence(scale * norms) == 80
        assert find_divergence(scale * norms[1:]) is None
