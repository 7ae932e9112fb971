"""The suggested threshold, compared with the standard library."""

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


def test_the_statistics_agree_with_the_standard_library():
    norms = np.exp(np.random.default_rng(0).normal(size=997)).tolist()
    suggestion = suggest_threshold([*norms, NAN, INF])
    cuts = statistics.quantiles(norms, n=100, method="inclusive")
    assert (suggestion.steps, suggestion.nonfinite) == (999, 2)
    assert suggestion.mean == pytest.approx(statistics.fmean(norms))
    assert suggestion.std == pytest.approx(statistics.pstdev(norms))
    assert (suggestion.min, suggestion.max) == (min(norms), max(norms))
    assert suggestion.median == pytest.approx(statistics.median(norms))
    assert [suggestion.p90, suggestion.p95, suggestion.p99] == pytest.approx(
        [cuts[89], cuts[94], cuts[98]]
    )
    assert suggestion.max_norm == suggestion.p90
    assert suggestion.mean_range == pytest.approx(
        (0.5 * suggestion.mean, 10 * suggestion.mean)
    )
    assert suggestion.log_std == pytest.approx(statistics.pstdev(map(math.log, norms)))


def test_huge_norms_do_not_overflow():
    suggestion = suggest_threshold([1e308] * 200)
    assert (suggestion.mean, suggestion.std, suggestion.median) == (1e308, 0.0, 1e308)
    assert suggest_threshold([1e-300, 1e308] * 2).mean == 5e307


def test_a_suggestion_prints_these_lines():
    """The numbers 0 to 10 have mean 5, deviation sqrt(10) and p90 = 9."""
    lines = str(suggest_threshold([*np.arange(11.0), NAN])).splitlines()
    assert lines[:12] == [
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
    assert lines[12].startswith("Begin with TrustClip, which needs no number")
    assert lines[13].startswith("Too early to judge: 11 finite norms")


def steady_norms(seed=0, spread=0.1, size=900):
    return np.exp(np.random.default_rng(seed).normal(scale=spread, size=size))


@pytest.mark.parametrize(
    ("norms", "policy", "words"),
    [
        (steady_norms(), Quantile(0.9), "The level is steady"),
        (steady_norms(spread=1.5), Quantile(0.5), "heavy-tailed"),
        (
            steady_norms() * np.linspace(1, 9, 900),
            Quantile(0.9, history_length=128),
            "The level moves",
        ),
    ],
    ids=["steady", "heavy", "drifting"],
)
def test_the_policy_follows_from_the_series(norms, policy, words):
    suggestion = suggest_threshold(norms)
    assert suggestion.policy == policy
    assert words in " ".join(suggestion.advice)
    assert repr(policy) in str(suggestion)


def test_advice_reports_spikes_and_non_finite_steps():
    norms = steady_norms()
    norms[[100, 300]] = 40.0
    advice = " ".join(suggest_threshold([*norms, NAN]).advice)
    assert "2 spikes" in advice
    assert "1 of 901 steps (0.111 %)" in advice
    assert "Too early to judge: 3 finite" in str(suggest_threshold([1.0, 2.0, 3.0]))


@pytest.mark.parametrize("norms", [[NAN, INF], [], [-1.0]], ids=str)
def test_a_series_without_a_valid_norm_is_refused(norms):
    with pytest.raises(ValueError, match="norms must"):
        suggest_threshold(norms)


def test_a_series_of_zeros_has_statistics():
    suggestion = suggest_threshold([0.0] * 5)
    assert (
        suggestion.max_norm,
        suggestion.mean,
        suggestion.std,
        suggestion.log_std,
    ) == (0, 0, 0, 0)
    assert suggestion.policy == Quantile(0.9)


def test_a_hundred_norms_are_enough():
    assert "Too early to judge: 99 finite" in str(
        suggest_threshold(steady_norms(size=99))
    )
    assert "Too early" not in str(suggest_threshold(steady_norms(size=100)))


def noisy(level):
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
def test_a_moving_level_is_not_a_heavy_tail(level, policy, word):
    suggestion = suggest_threshold(noisy(level))
    assert suggestion.policy == policy
    assert word in " ".join(suggestion.advice)


def test_a_diverged_run_is_reported_first_and_only_its_healthy_part_is_used():
    rise = np.geomspace(1, 1e12, 150)
    norms = np.concatenate([steady_norms(size=1200), rise, [NAN] * 50])
    suggestion = suggest_threshold(norms)
    assert suggestion.diverged_at == 1200 + np.flatnonzero(rise > 10)[0]
    assert str(suggestion).startswith("The run diverged: from step 1213 on")
    healthy = suggest_threshold(norms[: suggestion.diverged_at])
    assert healthy.diverged_at is None
    assert suggestion.policy == healthy.policy
    assert healthy.max_norm < 1.3 < suggestion.max_norm
    assert suggest_threshold(norms[:99]).diverged_at is None
    assert suggest_threshold(norms[:1225]).diverged_at is None  # 90 times is not enough


def test_a_shift_of_level_is_reported_as_in_a_replay():
    norms = noisy(np.repeat([1.0, 8.0, 1.0], [1200, 200, 600]))
    suggestion, shift = suggest_threshold(norms), replay(norms, Quantile(0.9)).shift
    assert f"changes x{shift.ratio:.4g} at step {shift.step}" in str(suggestion)
    assert "changes" not in str(suggest_threshold(steady_norms()))


def test_a_constant_has_no_spikes_to_filter():
    advice = " ".join(suggest_threshold([2.0] * 500).advice)
    assert "would have clipped 0 % of these" in advice
    assert "as a spike filter 0 %" in advice


def test_the_clipping_rates_are_those_of_the_series():
    """Of the norms 1 to 200, 20 are above p90 = 180.1, and 2 above p99 = 198.01."""
    advice = " ".join(suggest_threshold(np.arange(1.0, 201)).advice)
    assert "max_norm = 180.1 (p90) would have clipped 10 %" in advice
    assert "p99 = 198 as a spike filter 1 %" in advice
    assert "half the mean" not in advice


def test_advice_compares_p90_with_half_the_mean():
    """The p90 of 21 norms is the third largest: 1. The mean is near 2."""
    norms = [0.0] * 9 + [1.0] * 10
    assert "half the mean" not in str(suggest_threshold([*norms, 16.0, 16.0]))
    assert "below half the mean (1.002)" in str(suggest_threshold([*norms, 16, 16.1]))


def test_the_largest_spike_is_reported():
    norms = np.ones(300)
    norms[[100, 200]] = 40.0, 7.0
    advice = " ".join(suggest_threshold(3 * norms).advice)
    assert "2 spikes stand out from their neighbours, the largest 40 times" in advice


# The numbers behind the choice of a policy.


def test_noise_is_measured_between_neighbours():
    norms = (steady_norms(spread=0.7) * np.geomspace(1, 100, 900)).tolist()
    norms[7:9] = 0.0, 0.0  # zeros are left out; the norms around them are neighbours
    logs = [math.log(norm) for norm in norms if norm > 0]
    squares = [(b - a) ** 2 for a, b in itertools.pairwise(logs)]
    expected = math.sqrt(statistics.fmean(squares) / 2)
    assert measure_noise(np.array(norms)) == pytest.approx(expected)
    assert measure_noise(np.array([1.0, math.e])) == pytest.approx(math.sqrt(0.5))
    for norms in ([], [3.0], [0.0, 3.0]):
        assert measure_noise(np.array(norms)) == 0


@pytest.mark.parametrize("size", [100, 101, 102, 200])
def test_drift_is_the_ratio_of_the_last_third_to_the_first(size):
    norms = (steady_norms(spread=0.5, size=size) * np.linspace(1, 5, size)).tolist()
    first, last = norms[: size // 3], norms[-(size // 3) :]
    expected = statistics.median(last) / statistics.median(first)
    for scale in (1e-9, 1.0, 1e9):
        assert measure_drift(scale * np.array(norms)) == pytest.approx(expected)
    assert measure_drift(np.array(norms[:99])) == 1


def test_the_drift_from_0_or_to_0_is_1():
    norms = np.repeat([0.0, 1.0], 60)
    assert (
        measure_drift(norms)
        == measure_drift(norms[::-1])
        == measure_drift(0 * norms)
        == 1
    )


@pytest.mark.parametrize("level", [2.0, 0.5])
def test_a_level_moves_if_it_changes_by_more_than_a_factor_of_2(level):
    norms = np.repeat([1.0, 1.0, level], 100)
    assert choose_policy(norms)[0] == Quantile(0.9)
    norms[200:] *= level**0.01
    assert choose_policy(norms)[0] == Quantile(0.9, history_length=128)


def test_a_tail_is_heavy_above_a_deviation_of_1(monkeypatch):
    """If the logarithms of neighbours differ by x, the noise is x / sqrt(2)."""
    for noise, policy in [(0.995, Quantile(0.9)), (1.005, Quantile(0.5))]:
        norms = np.exp(np.tile([0.0, noise * math.sqrt(2)], 100))
        assert choose_policy(norms)[0] == policy
    monkeypatch.setattr(suggest, "HEAVY_TAIL", measure_noise(norms))
    assert choose_policy(norms)[0] == Quantile(0.9)


def test_a_run_diverged_if_it_ends_above_a_thousand_times_its_usual_norm():
    norms = np.repeat([1.0, 10.0, 10.5, 1000.0], [110, 1, 1, 10])
    assert find_divergence(norms) is None
    norms[-10:] = 1001.0
    assert find_divergence(norms) == 111  # 10 is still usual
    norms[3:5] = NAN, INF  # the step counts them too
    assert find_divergence(norms) == 111
    # The median of the last ten is between the two levels, or at the more frequent one.
    assert find_divergence(np.repeat([1.0, 1e5], [115, 5])) == 115
    assert find_divergence(np.repeat([1.0, 1e5], [116, 4])) is None


def test_the_usual_norm_is_the_median_of_the_first_half():
    norms = np.repeat([1e-3, 1.0, 500.0], [25, 85, 10])
    assert find_divergence(norms) is None
    norms[:31] = 1e-3
    assert find_divergence(norms) == 31
    assert find_divergence(np.repeat([0.0, 1.0], 60)) is None


def test_a_divergence_needs_a_hundred_norms():
    norms = np.repeat([1.0, 1e6], [80, 20])
    for scale in (1e-9, 1.0, 1e9):
        assert find_divergence(scale * norms) == 80
        assert find_divergence(scale * norms[1:]) is None
