"""The suggested threshold, compared with the standard library."""

import itertools
import math
import re
import statistics

import numpy as np
import pytest

from autoclip_core import Quantile, replay, suggest_threshold
from autoclip_core.planning import reasons
from autoclip_core.planning.reasons import measure_drift, measure_noise
from autoclip_core.policy import as_code

NAN, INF = math.nan, math.inf
SHORT = Quantile(0.9, history_length=128)


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


def numbers_above_100(count):
    """Return the numbers from 101 on, in random order."""
    return np.random.default_rng(0).permutation(np.arange(101.0, 101 + count))


def test_a_suggestion_prints_these_lines():
    """The numbers 101 to 301 have mean 201, p90 = 281 and a variance of 3366.67."""
    lines = str(suggest_threshold(numbers_above_100(201))).splitlines()
    assert lines[:14] == [
        "Healthy: 201 norms show neither damage nor a spike. Norms do not show the "
        "loss:",
        "compare it.",
        "steps         201 (201 healthy, 0 non-finite)",
        "mean          201",
        "std           58.02",
        "min           101",
        "median        201",
        "p90           281",
        "p95           291",
        "p99           299",
        "max           301",
        "suggested     max_norm = 281",
        "mean range    100.5 to 2010 (0.5 to 10 times the mean; above 301 clips "
        "nothing)",
        f"or a policy   {as_code(Quantile(0.9))}",
    ]
    assert lines[14].startswith("Begin with TrustClip, which needs no number")


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
    assert as_code(policy) in str(suggestion)


def test_the_verdict_names_spikes_and_leaves_them_out():
    norms = steady_norms()
    norms[[100, 300]] = 40.0
    norms[500] = NAN
    suggestion = suggest_threshold(norms)
    assert suggestion.verdict == "spikes"
    assert str(suggestion).startswith("Spikes at steps 100, 300, up to 40.")
    loss = "no damage. Norms do not show the loss: compare it."
    assert suggestion.diagnosis.sentence.endswith(loss)
    assert suggestion.max < 2
    assert "1 of 900 steps (0.111 %)" in str(suggestion)


def test_without_a_norm_there_is_an_error():
    for norms in ([], [-1.0]):
        with pytest.raises(ValueError, match="norms must"):
            suggest_threshold(norms)


WITHHELD = {
    # What the norms are: the verdict, the reason, whether there is a policy.
    "too short": (steady_norms(size=49), "the healthy part has 49 norms", False),
    "zeros": (np.zeros(500), "the healthy part has 0 norms above 0", False),
    "all NaN": (np.full(90, NAN), "the healthy part has 0 norms", False),
    "early NaN": (np.repeat([1.0, NAN], [30, 90]), "the healthy part has 30", False),
    "wrecked at step 5": (
        np.concatenate([steady_norms(size=5), [3e3], 150 * steady_norms(size=300)]),
        "there is no healthy part",
        False,
    ),
    "clipped": (
        np.minimum(steady_norms(), 1.0),
        "log the norms before clipping",
        False,
    ),
    "shifted": (
        steady_norms(size=400) * np.repeat([1.0, 8.0], 200),
        "No constant fits all healthy steps: p90 is 1.",
        True,
    ),
}


@pytest.mark.parametrize("name", WITHHELD)
def test_a_threshold_is_withheld_with_the_reason(name):
    norms, reason, has_policy = WITHHELD[name]
    suggestion = suggest_threshold(norms)
    assert suggestion.max_norm is suggestion.mean_range is None
    assert (suggestion.policy is not None) == has_policy
    text = " ".join(str(suggestion).split())
    assert reason in text
    assert "suggested none, because of what follows" in text
    assert max(map(len, str(suggestion).splitlines())) <= 80


@pytest.mark.parametrize(
    ("before", "after", "later", "part"),
    [
        (150, 250, 0.1, "before"),
        (150, 250, 8.0, None),
        (476, 24, 8.0, "all"),  # p95 of the steps before
        (60, 740, 8.0, "all"),  # a tenth of the steps changes p90 little
        (100, 740, 8.0, None),
    ],
)
def test_the_constant_after_a_change_fits_all_steps_and_those_before(
    before, after, later, part
):
    sizes = [before, after]
    norms = steady_norms(size=sum(sizes)) * np.repeat([1.0, later], sizes)
    suggestion = suggest_threshold(norms)
    assert suggestion.verdict == "shifted"
    if part is None:
        assert suggestion.max_norm is None
        return
    is_chosen = suggestion.diagnosis.healthy.copy()
    if part == "before":
        is_chosen[suggestion.diagnosis.step :] = False
    chosen = norms[is_chosen]
    assert suggestion.max_norm == pytest.approx(np.quantile(chosen, 0.9))
    assert suggestion.mean_range == pytest.approx(chosen.mean() * np.array([0.5, 10]))
    assert 0.8 <= np.mean(norms <= suggestion.max_norm) <= 0.99
    text = " ".join(suggestion.advice)
    assert ("p90 of the 37.5 % of the healthy steps" in text) == (part == "before")


@pytest.mark.parametrize("level", [0.1, 1.0, 10.0])
def test_a_constant_after_a_spike_fits_the_steps_before_it(level):
    """Norms that slowly rise or fall may show a spike that damaged the weights."""
    norms = steady_norms(size=600)
    norms[200:] *= np.geomspace(1, level, 400)
    norms[200] = 60.0
    suggestion = suggest_threshold(norms)
    assert suggestion.verdict == "spikes"
    share = np.mean(norms[:200] <= np.quantile(np.delete(norms, 200), 0.9))
    assert (suggestion.max_norm is not None) == (0.8 <= share <= 0.99)


def test_fifty_norms_are_enough():
    assert suggest_threshold(steady_norms(size=50)).verdict == "healthy"
    assert suggest_threshold(steady_norms(size=49)).verdict == "too short"


def noisy(level):
    noise = np.exp(np.random.default_rng(0).normal(0, 0.1, 2000))
    return noise * level


@pytest.mark.parametrize(
    ("level", "policy", "word"),
    [
        (np.geomspace(100, 1, 2000), Quantile(0.9, history_length=128), "moves"),
        (np.geomspace(1, 50, 2000), Quantile(0.9, history_length=128), "moves"),
        (np.repeat([1.0, 20.0], 1000), Quantile(0.9, history_length=128), "moves"),
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
    assert 1200 < suggestion.diverged_at < 1230
    start = f"The run diverged at step {suggestion.diverged_at}: "
    assert str(suggestion).startswith(start)
    healthy = suggest_threshold(steady_norms(size=1200))
    assert suggestion.policy == healthy.policy
    assert suggestion.max_norm == pytest.approx(healthy.max_norm, rel=0.02)
    later = suggest_threshold(norms, steps=np.arange(len(norms)) * 50)
    assert later.diverged_at == 50 * suggestion.diverged_at


def test_a_shift_of_level_is_reported_as_in_a_replay():
    norms = noisy(np.repeat([1.0, 8.0, 1.0], [1200, 200, 600]))
    suggestion, shift = suggest_threshold(norms), replay(norms, Quantile(0.9)).shift
    assert f"changes x{shift.ratio:.4g} at step {shift.step}" in str(suggestion)
    assert "changes" not in str(suggest_threshold(steady_norms()))


@pytest.mark.parametrize("kind", ["level", "spike and level", "spike"])
def test_steps_that_begin_again_in_each_epoch_change_no_number(kind):
    norms = steady_norms(size=1000)
    norms[800:] *= 20.0 if "level" in kind else 1.0
    norms[700] *= 40.0 if "spike" in kind else 1.0
    plain = suggest_threshold(norms)
    named = suggest_threshold(norms, steps=np.arange(1000) % 100)
    assert (named.max_norm is None) == ("level" in kind)
    assert (named.max_norm, named.verdict) == (plain.max_norm, plain.verdict)
    assert named.diagnosis.sign == plain.diagnosis.sign


def test_the_advice_has_one_step_for_a_change_of_level():
    for size in (700, 790, 800, 810, 850):
        norms = steady_norms(size=1000)
        norms[size:] *= 20.0
        suggestion = suggest_threshold(norms)
        steps = set(re.findall(r"step (\d+)", " ".join(str(suggestion).split())))
        assert steps == {str(suggestion.diagnosis.step)}


def test_the_constant_of_norms_that_vanish_is_of_the_steps_before():
    norms = steady_norms(size=400)
    norms[60:] = 0.0
    suggestion = suggest_threshold(norms)
    assert "The norms are 0 from step 60 to the end" in str(suggestion)
    assert suggestion.max_norm == pytest.approx(np.quantile(norms[:60], 0.9))


def test_the_clipping_rates_are_those_of_the_series():
    """Of the norms 101 to 300, 20 are above p90 = 280.1, and 2 above 298.01."""
    advice = " ".join(suggest_threshold(numbers_above_100(200)).advice)
    assert "max_norm = 280.1 (p90) would have clipped 10 %" in advice
    assert "p99 = 298 as a spike filter 1 %" in advice
    assert "half the mean" not in advice


def test_advice_compares_p90_with_half_the_mean():
    """Between 0.5 and 2 times the mean there are rarely huge norms."""
    norms = steady_norms(spread=3.0)
    mean, p90 = norms.mean(), np.quantile(norms, 0.9)
    text = " ".join(suggest_threshold(norms).advice)
    assert ("below half the mean" in text) == (p90 < 0.5 * mean)
    assert "below half the mean" not in str(suggest_threshold(steady_norms()))


def test_the_first_overflows_are_those_of_a_loss_scaler():
    norms = np.concatenate([[INF] * 9, steady_norms()])
    suggestion = suggest_threshold(norms)
    assert suggestion.verdict == "healthy"
    text = " ".join(suggestion.advice)
    assert "9 of 909 steps (0.99 %) had a NaN or infinite norm, 9 of them at" in text
    assert "threshold repairs" not in text


@pytest.mark.parametrize(
    ("places", "count", "rest"),
    [
        (
            [10, 32, 40],
            "3 of 900 steps (0.333 %) had a NaN or infinite norm, which",
            "",
        ),
        ([0, 2, 40], "3 of 900 steps (0.333 %) had a NaN or infinite norm, 2 of", "1"),
    ],
)
def test_each_count_of_nonfinite_norms_is_of_the_whole_run(places, count, rest):
    norms = steady_norms()
    norms[places] = NAN
    suggestion = suggest_threshold(norms)
    text = " ".join(suggestion.advice)
    assert count in text
    assert ("scaler is in use" in text) == bool(rest)
    assert rest == "" or f"No threshold repairs the other {rest}: check" in text
    assert "897 healthy, 3 non-finite" in str(suggestion)


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


def policy_for(norms):
    return suggest_threshold(norms).policy


@pytest.mark.parametrize("level", [2.0, 0.5])
def test_a_level_moves_if_it_changes_by_more_than_a_factor_of_2(level):
    norms = steady_norms(size=300) * np.repeat([1.0, 1.0, level], 100)
    norms[200:] *= level / measure_drift(norms)
    assert measure_drift(norms) == pytest.approx(level)
    for factor, policy in [(0.99, Quantile(0.9)), (1.01, SHORT)]:
        changed = np.append(norms[:200], norms[200:] * level ** (factor - 1))
        assert policy_for(changed) == policy


def test_a_tail_is_heavy_above_a_deviation_of_1(monkeypatch):
    norms = steady_norms(spread=1.0)
    noise = measure_noise(norms)
    monkeypatch.setattr(reasons, "HEAVY_TAIL", noise)
    assert policy_for(norms) == Quantile(0.9)
    monkeypatch.setattr(reasons, "HEAVY_TAIL", 0.999 * noise)
    assert policy_for(norms) == Quantile(0.5)
