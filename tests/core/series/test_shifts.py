"""Changes of level, each rule at its limit."""

import numpy as np
import pytest

from autoclip_core.series.diagnosis import diagnose
from autoclip_core.series.levels import measure_levels
from autoclip_core.series.shifts import find_lasting_shift, find_rise_at_end


def steady(size=400, spread=0.1):
    return np.exp(np.random.default_rng(0).normal(scale=spread, size=size))


def test_a_rise_lasts_if_later_steps_are_twice_the_level():
    for end, place in [(2.1, 200), (1.9, None)]:
        norms = np.repeat([1.0, 4.0, end], [200, 80, 120])
        rise = find_lasting_shift(measure_levels(norms))
        assert rise == (None if place is None else (place, 4.0))


def test_the_end_of_a_dip_is_no_rise():
    for before, place in [(1.0, 300), (4.0, None), (2.1, None), (1.9, 300)]:
        norms = np.repeat([before, 1.0, 4.0], [240, 60, 200])
        shift = find_lasting_shift(measure_levels(norms))
        assert shift == (None if place is None else (place, 4.0))


def test_a_fall_lasts_if_it_is_to_a_fifth_after_the_first_100_steps():
    for size, level, end, place in [
        *((200, 0.19, 0.45, 200), (200, 0.21, 0.21, None)),
        *((200, 0.19, 0.55, None), (99, 0.1, 0.1, None)),
    ]:
        norms = np.repeat([1.0, level, end], [size, 80, 120])
        shift = find_lasting_shift(measure_levels(norms))
        assert shift == (None if place is None else (place, level))


def test_a_change_after_a_spike_that_does_not_last_is_a_spike():
    for rest, verdict in [(1.0, "spikes"), (2.6, "shifted")]:
        norms = steady() * np.repeat([1.0, 2.6, rest], [200, 40, 160])
        norms[200] *= 300.0
        assert diagnose(norms).verdict == verdict


@pytest.mark.parametrize(
    ("factors", "sizes", "rise"),
    [
        ([1.0, 3.1], [380, 20], (380, 3.1)),
        ([1.0, 2.9], [380, 20], None),
        ([1.0, 3.1], [391, 9], None),
        ([9.0, 1.0, 3.1], [190, 190, 20], (380, 3.1)),  # only the later half counts
        ([1.0, 2.0, 1.0, 3.1], [240, 40, 100, 20], (380, 3.1)),
        ([1.0, 2.1, 1.0, 3.1], [240, 40, 100, 20], None),
        ([1.0, 3.1], [100, 20], (100, 3.1)),
        ([1.0, 3.1], [79, 20], None),
    ],
)
def test_a_rise_at_the_end_is_3_times_the_norms_before(factors, sizes, rise):
    norms = np.repeat(factors, sizes)
    assert find_rise_at_end(measure_levels(norms)) == rise


def test_a_rise_at_the_end_is_a_shift():
    diagnosis = diagnose(steady() * np.repeat([1.0, 5.0], [376, 24]))
    assert (diagnosis.verdict, diagnosis.step) == ("shifted", 376)


def test_gradients_that_vanish_are_another_level():
    norms = np.r_[steady(300), np.full(100, 1e-12)]
    diagnosis = diagnose(norms)
    assert diagnosis.verdict == "shifted"
    level = 1e-12 / np.median(norms[: diagnosis.step])
    assert f"the level is {level:.3g} times" in str(diagnosis)
