"""The signs of damage, each with a series that shows it and one that does not."""

import math

import numpy as np
import pytest

from autoclip_core.series.ceiling import find_ceiling, find_ceiling_of_thresholds
from autoclip_core.series.damage import (
    find_damage,
    find_early_damage,
    find_explosion,
    find_high_end,
    is_start_erratic,
)
from autoclip_core.series.diagnosis import diagnose
from autoclip_core.series.levels import measure_levels

NAN, INF = math.nan, math.inf


def steady(size=400, seed=0, spread=0.1):
    return np.exp(np.random.default_rng(seed).normal(scale=spread, size=size))


def changed(places, factors, norms=None):
    """Return norms, multiplied at some places."""
    norms = steady() if norms is None else norms.copy()
    norms[places] *= factors
    return norms


def wave(factor, size=400):
    """Return norms that are multiplied in every second step."""
    return steady(size) * np.where(np.arange(size) % 2, factor, 1.0)


BURST = [200, 201, 202]
"""Three steps in the middle."""

VERDICTS = {
    "steady": (steady(), "healthy", None),
    "warm-up transient": (steady() * np.linspace(30, 1, 400) ** 1.0, "healthy", None),
    "batch ramp": (steady() / np.repeat([1, 1.4, 2, 2.8], 100), "healthy", None),
    "fall": (steady() * np.geomspace(20, 1, 400), "healthy", None),
    "bad batch": (changed([200], 5000.0), "spikes", None),
    "bad batches in a row": (changed(BURST, 500.0), "spikes", None),
    "explosion that died": (changed(BURST, [200.0, 9e3, 300.0]), "diverged", 200),
    "explosion": (np.append(steady(), 1.155e5 * wave(30)[:99]), "diverged", 400),
    "new loss": (steady() * np.repeat([1.0, 9.0], 200), "shifted", None),
    "new loss, x150": (
        steady() * np.append(np.ones(200), np.geomspace(3000, 40, 200)),
        "shifted",
        None,
    ),
    "units that died": (steady() / np.repeat([1.0, 9.0], 200), "shifted", None),
    "changed by a spike": (
        changed(slice(201, None), 0.4, changed([200], 300.0)),
        "shifted",
        200,
    ),
    "wrecked at step 5": (
        changed(slice(5, None), 170.0, changed([5], 20.0)),
        "never healthy",
        5,
    ),
    "x20 from step 1": (changed(slice(1, None), 20.0), "healthy", None),
    "x300 in 20 steps": (
        steady() * np.geomspace(1, 300, 20)[np.minimum(np.arange(400), 19)],
        "healthy",
        None,
    ),
    "x900 from step 1, calm": (changed(slice(1, None), 900.0), "healthy", None),
    "x900 from step 1, erratic": (
        changed(slice(1, None), 900.0, steady(spread=0.5)),
        "never healthy",
        1,
    ),
    "e^0.5 per step in the last 12": (
        changed(slice(108, 120), np.exp(0.5 * np.arange(12)), steady(120)),
        "diverged",
        111,
    ),
    "x1e7 in 40 steps": (
        steady() * np.geomspace(1, 1e7, 40)[np.minimum(np.arange(400), 39)],
        "never healthy",
        1,
    ),
    "erratic start": (changed(slice(0, 30, 2), 30.0), "never healthy", 0),
    "NaN from step 330": (changed(slice(330, None), NAN), "non-finite", 330),
    "NaN at times": (changed([100, 200, 300], NAN), "healthy", None),
    "mostly NaN from 300": (
        changed([*range(300, 350), *range(352, 400)], INF),
        "non-finite",
        300,
    ),
    "calibration": (changed(range(9), INF), "healthy", None),
    "0 from step 60": (changed(slice(60, None), 0.0), "vanished", 60),
    "0 in the last 50": (changed(slice(350, None), 0.0), "vanished", 350),
    "0 in the last 49": (changed(slice(351, None), 0.0), "healthy", None),
    "0 in two of three": (changed(np.arange(400) % 3 > 0, 0.0), "healthy", None),
    "0 in two of three, then always": (
        changed((np.arange(400) % 3 > 0) | (np.arange(400) > 340), 0.0),
        "healthy",
        None,
    ),
    "an explosion, then 0": (
        changed(slice(203, None), 0.0, changed(BURST, [200.0, 9e3, 300.0])),
        "diverged",
        200,
    ),
    "0": (np.zeros(99), "vanished", 0),
    "clipped at 1": (np.minimum(steady(), 1.0), "clipped", None),
    "clipped rarely": (np.minimum(steady(), 1.2), "healthy", None),
    "two digits": (np.round(steady(spread=0.4), 2), "healthy", None),
    "short": (steady(49), "too short", None),
    "nothing": (np.array([]), "too short", None),
}
"""Norms, the verdict, and the step of the damage."""


@pytest.mark.parametrize("name", VERDICTS)
def test_each_kind_of_run_has_its_verdict_at_every_scale(name):
    norms, verdict, step = VERDICTS[name]
    for scale in (1.0, 1e-12, 1e12):
        diagnosis = diagnose(scale * norms)
        assert diagnosis.verdict == verdict, diagnosis.sentence
        assert step is None or diagnosis.step == step
        assert np.isfinite(norms[diagnosis.healthy]).all()


def test_a_run_whose_norms_are_all_0_names_the_cause():
    assert "gradients are set to 0 before" in str(diagnose(np.zeros(50)))
    assert "gradients are set to 0 before" not in str(diagnose(np.repeat([1, 0], 60)))


def test_overflows_before_the_damage_are_the_calibration():
    assert diagnose(VERDICTS["calibration"][0]).calibration == 9
    assert diagnose(np.full(90, NAN)).calibration == 0
    norms = changed([1, 3, *range(40, 400)], NAN)
    assert (diagnose(norms).calibration, diagnose(norms).step) == (2, 40)


@pytest.mark.parametrize(
    ("places", "count"),
    [
        ([10, 32, 40], 0),  # NaN in a float32 run
        ([5], 1),
        ([6], 0),
        ([0, 6, 12, 100], 3),  # five finite norms between them
        ([0, 7, 8], 1),
        (range(60), 50),
    ],
)
def test_a_calibration_begins_at_the_start_and_has_short_gaps(places, count):
    assert diagnose(changed(places, NAN)).calibration == count


def test_damage_and_spikes_are_no_part_of_the_healthy_part():
    norms = changed([100], 50.0)
    assert np.flatnonzero(~diagnose(norms).healthy).tolist() == [100]
    assert diagnose(norms).spikes == (100,)
    for name in ("explosion", "NaN from step 330"):
        norms, _, step = VERDICTS[name]
        assert np.flatnonzero(~diagnose(norms).healthy)[0] == step
    for name in ("wrecked at step 5", "erratic start"):
        assert not diagnose(VERDICTS[name][0]).healthy.any()


def test_the_sentence_has_the_steps_of_the_log():
    norms = np.append(changed([7], 90.0), 1e9 * wave(30)[:99])
    diagnosis = diagnose(norms, steps=50 * np.arange(len(norms)))
    assert (diagnosis.step, diagnosis.spikes) == (20000, (350,))
    assert str(diagnosis).startswith("The run diverged at step 20000: ")
    spikes = diagnose(changed([10, 20, 60, 90, 120, 150], 60.0), steps=range(5, 405))
    assert "Spikes at steps 15, 25, 65, 95, 125 and more, up to 6" in str(spikes)


# Each sign at its limit.


def test_an_explosion_is_1000_times_the_level_next_to_100_times():
    for first, then, start in [(1010, 101, 200), (101, 1010, 200), (1010, 99, None)]:
        norms = changed([200, 201], [first, then], np.ones(400))
        assert find_explosion(measure_levels(norms)) == start
    norms = changed([200, 201], [990, 990], np.ones(400))
    assert find_explosion(measure_levels(norms)) is None


@pytest.mark.parametrize(
    ("alone", "level", "start"), [(51, 1.9, None), (49, 1.9, 200), (51, 2.1, 200)]
)
def test_bad_batches_in_a_row_are_none_if_the_run_had_one_alone(alone, level, start):
    norms = changed([100, 200, 201], [alone, 1010, 500], np.ones(400))
    for factor in (level, 1 / level):
        later = changed(slice(202, None), factor, norms)
        assert find_explosion(measure_levels(later)) == start


def test_an_explosion_begins_where_norms_leave_ten_times_the_level():
    norms = changed(range(200, 206), [9, 11, 50, 500, 5e3, 5e3], np.ones(400))
    assert find_explosion(measure_levels(norms)) == 201


def test_a_run_diverged_if_its_end_is_100_times_the_usual():
    logs = np.log(np.repeat([1.0, 101.0], [90, 10]))
    assert find_high_end(logs) == 90
    assert find_high_end(np.log(np.repeat([1.0, 99.0], [90, 10]))) is None
    assert find_high_end(np.log(np.repeat([1.0, 101.0], [95, 5]))) is None
    assert find_high_end(logs[-59:]) is None


def test_an_end_whose_last_norms_are_low_begins_where_most_are_high():
    assert find_high_end(np.log(np.repeat([1.0, 101.0, 1.0], [90, 6, 4]))) == 90


@pytest.mark.parametrize("place", [2, 5, 19])
def test_early_damage_is_30_times_the_first_norms(place):
    for factor, start in [(31.0, place), (29.0, None)]:
        logs = np.log(np.repeat([1.0, factor, 10.0], [place, 40, 200]))
        assert find_early_damage(logs) == start


def test_a_rise_without_a_jump_is_damage_above_a_million_times_the_first_norm():
    rise = np.geomspace(1, 1.01e6, 30)
    for end, start in [(1.0, 1), (0.98, None)]:
        norms = np.append(rise, np.full(99, 1.01e6 * end))
        assert find_early_damage(np.log(norms)) == start


def test_an_explosion_that_begins_late_ends_with_two_norms_100_times_the_usual():
    for last, six, start in [(101, 3.1, 92), (99, 3.1, None), (101, 2.9, None)]:
        logs = np.log(np.repeat([1.0, six, last], [92, 6, 2]))
        assert find_high_end(logs) == start


def test_a_jump_after_the_first_norm_is_damage_if_later_norms_jump():
    for change, start in [(0.31, 1), (0.29, None)]:
        logs = np.append(0.0, 5 + change * (np.arange(99) % 2))
        assert find_early_damage(logs) == start


def test_early_damage_is_a_jump():
    for before, start in [(2.9, 4), (3.1, None)]:
        norms = np.repeat([1.0, before, 31.0], [3, 1, 99])
        assert find_early_damage(np.log(norms)) == start


def test_the_start_is_erratic_if_only_the_first_norms_jump():
    for factor, is_erratic in [(4.6, True), (4.4, False)]:  # e^1.5 = 4.48
        logs = np.log(changed(slice(0, 32, 2), factor, np.ones(400)))
        assert is_start_erratic(logs, 1.5, 4.0) == is_erratic
    assert not is_start_erratic(np.log(wave(9.0)), 1.5, 4.0)
    assert not is_start_erratic(np.log(wave(9.0, 80)), 1.5, 4.0)


def test_the_level_of_a_norm_is_the_median_of_the_block_before():
    norms = np.exp(np.random.default_rng(0).normal(size=230))
    norms[[3, 50]] = 0.0, NAN
    levels = measure_levels(norms)
    positive = [n for n in norms if n > 0]
    assert levels.places.tolist() == [i for i, n in enumerate(norms) if n > 0]
    expected = [np.median(positive[11 * b - 11 : 11 * b]) for b in range(1, 21)]
    assert np.exp(levels.level[11::11]) == pytest.approx(expected)
    first = np.quantile(np.log(positive[:10]), 0.25)
    assert levels.level[:11] == pytest.approx(np.full(11, first))
    assert find_damage(levels) is None


# Norms after clipping.


def test_a_tenth_of_equal_norms_is_a_ceiling_unless_a_tenth_is_larger():
    logs = np.log(np.linspace(0.1, 0.9, 100))
    for equal, larger, is_found in [(12, 0, 1), (10, 0, 0), (13, 12, 1), (13, 15, 0)]:
        top = np.log(np.linspace(2, 3, larger))
        ceiling = find_ceiling(np.concatenate([logs, np.zeros(equal), top]))
        assert ceiling == (1.0 if is_found else None)


def test_norms_that_stop_at_moving_thresholds_are_clipped():
    thresholds = np.geomspace(3, 1, 400)
    clipped = np.minimum(steady() * 1.5, thresholds)
    assert diagnose(clipped).verdict == "healthy"
    assert diagnose(clipped, thresholds=thresholds).verdict == "clipped"
    assert find_ceiling_of_thresholds(clipped, thresholds) == pytest.approx(1.0)
    clipped[7] = 1.1 * thresholds[7]
    assert find_ceiling_of_thresholds(clipped, thresholds) is None
    assert find_ceiling_of_thresholds(clipped, np.full(400, INF)) is None


def test_a_norm_above_its_threshold_shows_norms_before_clipping():
    norms = np.minimum(steady(), 1.0)
    assert diagnose(norms, thresholds=np.full(400, 1.0)).verdict == "clipped"
    for threshold, verdict in [(0.9985, "healthy"), (0.9995, "clipped")]:
        thresholds = np.full(400, INF)
        thresholds[np.argmax(norms)] = threshold
        assert diagnose(norms, thresholds=thresholds).verdict == verdict
