"""Spikes and shifts of level, compared with the standard library on plain lists."""

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoclip_core.series import shifts, spikes
from autoclip_core.series.levels import measure_levels
from autoclip_core.series.shifts import find_shift
from autoclip_core.series.spikes import measure_local_level

from ...support.cases import fewer_examples, positive

NAN, INF = math.nan, math.inf


def find_spikes(norms):
    return spikes.find_spikes(measure_levels(norms))


def levels_by_hand(logs):
    """Yield median and robust deviation of the 101 logarithms around each step.

    The series is mirrored at its ends.
    """
    last = len(logs) - 1
    half = min(50, last // 2)
    for place in range(len(logs)):
        around = [abs(i) for i in range(place - half, place + half + 1)]
        part = [logs[i if i <= last else 2 * last - i] for i in around]
        middle = statistics.median(part)
        yield middle, 1.4826 * statistics.median(abs(x - middle) for x in part)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 100, 101, 102, 103, 104, 200])
@fewer_examples
@given(seed=st.integers(0, 1000))
def test_the_local_level_agrees_with_a_calculation_by_hand(size, seed):
    logs = np.random.default_rng(seed).normal(size=size)
    expected = list(zip(*levels_by_hand(logs.tolist()), strict=True))
    np.testing.assert_allclose(
        measure_local_level(logs), expected, rtol=1e-12, atol=1e-15
    )


def test_a_long_series_is_processed_in_pieces(monkeypatch):
    """The size of the pieces changes no number."""
    logs = np.random.default_rng(0).normal(size=300)
    logs[150:] += 2
    level, shift = measure_local_level(logs), find_shift(np.exp(logs))
    for module in (spikes, shifts):
        monkeypatch.setattr(module, "MAX_STEPS", 70)
    np.testing.assert_array_equal(measure_local_level(logs), level)
    assert find_shift(np.exp(logs)) == shift


def norms_with_one(logs, log, at=60):
    """Return norms of these logarithms, after one logarithm is replaced."""
    logs = np.array(logs)
    logs[at] = log
    return np.exp(logs)


def test_a_spike_is_six_deviations_above_the_level():
    """The logarithms -0.2, 0 and 0.2 have the median 0 and the median deviation 0.2."""
    logs = np.tile([-0.2, 0.0, 0.2], 50)
    edge = 6 * 1.4826 * 0.2
    assert find_spikes(norms_with_one(logs, 0.999 * edge)).tolist() == []
    assert find_spikes(norms_with_one(logs, 1.001 * edge)).tolist() == [60]
    assert find_spikes(norms_with_one(logs, -2 * edge)).tolist() == []


def test_a_spike_is_five_times_the_level():
    norms = np.ones(150)
    norms[[30, 60, 90]] = 4.99, 5.0, 5.01
    assert find_spikes(norms).tolist() == [60, 90]
    norms[[40, 50]] = 0.0, NAN  # places count them too
    assert find_spikes(norms).tolist() == [60, 90]


def test_equal_norms_have_no_spike(monkeypatch):
    monkeypatch.setattr(spikes, "SPIKE", 1.0)
    assert find_spikes(np.ones(200)).tolist() == []


@pytest.mark.parametrize(("size", "places"), [(49, []), (50, [30])])
def test_fifty_norms_are_enough_for_a_spike(size, places):
    norms = np.ones(size)
    norms[30] = 9.0
    assert find_spikes(norms).tolist() == places


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_noise_is_not_a_spike_at_any_scale(scale):
    norms = scale * np.exp(np.random.default_rng(0).normal(scale=0.3, size=5000))
    assert len(find_spikes(norms)) <= 2
    norms[2500] *= 30
    assert 2500 in find_spikes(norms)


def test_short_series_have_no_spike_and_no_shift():
    assert find_spikes(np.array([1.0, 9.0])).size == 0
    assert find_spikes(np.array([NAN, 0.0, INF])).size == 0
    assert find_shift(np.array([1.0, 9.0])) is None


def shift_by_hand(norms):
    """Return the step where the medians of 50 norms on each side differ most.

    The second result is the ratio of these medians.
    """
    places = [i for i, n in enumerate(norms) if 0 < n < INF]
    logs = [math.log(norms[i]) for i in places]
    change = {
        at: statistics.median(logs[at : at + 50])
        - statistics.median(logs[at - 50 : at])
        for at in range(50, len(logs) - 49)
    }
    largest = max(map(abs, change.values()), default=0)
    if largest < math.log(3) - 1e-6:
        return None
    most = [at for at, by in change.items() if abs(by) > largest - 1e-6]
    at = most[len(most) // 2]
    return places[at], math.exp(change[at])


@fewer_examples
@given(
    seed=st.integers(0, 1000),
    ratio=positive(0.05, 20),
    sizes=st.tuples(st.integers(40, 150), st.integers(40, 150)),
)
def test_the_largest_shift_agrees_with_a_calculation_by_hand(seed, ratio, sizes):
    rng = np.random.default_rng(seed)
    norms = np.repeat([1.0, ratio], sizes) * np.exp(rng.normal(0, 0.2, sum(sizes)))
    norms[rng.random(len(norms)) < 0.05] = 0
    norms[rng.random(len(norms)) < 0.05] = NAN
    shift, expected = find_shift(norms), shift_by_hand(norms.tolist())
    assert (shift is None) == (expected is None)
    if expected:
        assert shift.step == expected[0]
        assert shift.ratio == pytest.approx(expected[1], rel=1e-6)


@pytest.mark.parametrize("ratio", [3.0, 1 / 3])
def test_a_shift_is_at_least_threefold(ratio):
    norms = np.repeat([1.0, ratio], 100)
    assert find_shift(norms) == (100, pytest.approx(ratio, rel=1e-6))
    assert find_shift(np.repeat([1.0, 0.99 * 3], 100)) is None
    assert find_shift(np.repeat([1.0, 1.01 / 3], 100)) is None


def test_a_shift_needs_fifty_steps_before_and_after():
    assert find_shift(np.repeat([1.0, 10.0], 50)) == (50, 10.0)
    assert find_shift(np.repeat([1.0, 10.0], [50, 49])) is None
    assert find_shift(np.repeat([1.0, 10.0], [49, 50])) is None
    # For 25 of 50 steps the median is between the two levels.
    assert find_shift(np.repeat([1.0, 100.0, 1.0], [80, 24, 80])) is None
    assert find_shift(np.repeat([1.0, 100.0, 1.0], [80, 26, 80]))
