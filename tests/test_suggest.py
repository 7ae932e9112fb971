"""The suggested threshold, against the standard library."""

import math
import statistics

import numpy as np
import pytest

from autoclip_core import Quantile, replay, suggest_threshold

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
    assert suggest_threshold([0.0] * 5).max_norm == 0.0


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
    advice = suggest_threshold([2.0] * 500).advice
    assert "as a spike filter 0 %" in " ".join(advice)
