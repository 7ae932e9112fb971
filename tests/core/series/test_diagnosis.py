"""The diagnosis of a run from its norms."""

import math

import numpy as np
import pytest

from autoclip_core.series.diagnosis import diagnose

NAN = math.nan


def test_the_steps_are_those_of_the_log():
    norms = np.repeat([1.0, 1e6], [90, 20])
    diagnosis = diagnose(norms, steps=50 * np.arange(110))
    assert (diagnosis.verdict, diagnosis.step) == ("diverged", 4500)
    assert diagnosis.healthy.tolist() == [True] * 90 + [False] * 20


def steady(size=400, seed=0, spread=0.1):
    return np.exp(np.random.default_rng(seed).normal(scale=spread, size=size))


# Norms that are not finite.


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("start", [0, 50, 200])
def test_a_further_non_finite_norm_makes_no_run_healthy(seed, start):
    rng = np.random.default_rng(seed)
    norms, verdicts = steady(), []
    for part in np.array_split(start + rng.permutation(400 - start), 40):
        norms[part] = rng.choice([NAN, math.inf], len(part))
        verdicts.append(diagnose(norms).verdict)
    first = verdicts.index("non-finite")
    assert set(verdicts[:first]) <= {"healthy"}
    assert set(verdicts[first:]) == {"non-finite"}


@pytest.mark.parametrize(
    ("every", "verdict"), [(2, "non-finite"), (8, "non-finite"), (12, "healthy")]
)
@pytest.mark.parametrize("before", [60, 300, 5000])
def test_a_run_is_non_finite_from_where_a_tenth_of_the_norms_is(every, verdict, before):
    norms = steady(before + 600)
    norms[before::every] = NAN
    diagnosis = diagnose(norms)
    assert diagnosis.verdict == verdict
    if verdict == "non-finite":
        assert diagnosis.step == before
        share = np.mean(~np.isfinite(norms[before:]))
        text = f"From step {before} to the end, {100 * share:.3g} % of the norms are"
        assert str(diagnosis).startswith(text)


@pytest.mark.parametrize(
    ("places", "step"),
    [
        ([398, 399], 398),
        ([399], None),
        ([200, 399], None),
        ([100, 200, 300], None),
        ([390, 395, 399], 390),
        (range(49), None),
        (range(49, 400), 49),
    ],
)
def test_two_non_finite_norms_at_the_end_are_enough(places, step):
    norms = steady()
    norms[places] = NAN
    diagnosis = diagnose(norms)
    assert diagnosis.step == step
    assert diagnosis.verdict == ("healthy" if step is None else "non-finite")


# Another level.


@pytest.mark.parametrize("ratio", [60.0, 90.0, 95.0, 100.0, 105.0, 110.0, 300.0])
@pytest.mark.parametrize("place", [60, 200, 300])
def test_a_jump_is_damage_above_100_times_the_level(ratio, place):
    """Noise moves the measured ratio; verdict and sentence agree on it."""
    norms = steady(spread=0.3)
    norms[place:] *= ratio
    diagnosis = diagnose(norms)
    assert abs(diagnosis.step - place) <= 5
    level = np.median(norms[diagnosis.step :]) / np.median(norms[: diagnosis.step])
    end = np.median(norms[-10:]) / np.median(norms[:200])
    is_damage = max(level, end) > 100
    assert diagnosis.verdict == ("diverged" if is_damage else "shifted")
    if not is_damage:
        assert f"the level is {level:.3g} times" in str(diagnosis)
