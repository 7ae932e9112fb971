"""The numbers a log stores of a step of several rows, in special cases."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from autoclip_core.record.read_metrics import split_metrics
from autoclip_core.record.statistics import median, root_sum_squares
from autoclip_core.record.step import (
    FIELDS,
    Step,
    read_decision,
    reduce_rows,
    step_from_numbers,
)

NAN, INF = math.nan, math.inf


def step_of(norm, *, threshold=None, scale=None, clipped=None, finite=None, **more):
    """Return the step of a decision; the defaults are those of an unclipped row."""
    size = len(norm)
    fields = {
        "norm": norm,
        "threshold": [8.0] * size if threshold is None else threshold,
        "scale": [1.0] * size if scale is None else scale,
        "clipped": [False] * size if clipped is None else clipped,
        "finite": [*map(math.isfinite, norm)] if finite is None else finite,
    }
    return reduce_rows(read_decision(SimpleNamespace(**fields, **more)))


def test_the_scale_is_0_if_all_rows_are_removed():
    assert step_of([3.0, 4.0], scale=[0.0, 0.0]) == Step(5, 8, 0, 0, True, False)
    assert step_of([0.0, 0.0], scale=[0.0, 0.0]).scale == 1


@pytest.mark.parametrize("skipped", [[True, False], [False, True], [True, True]])
def test_a_step_is_skipped_if_any_row_is(skipped):
    assert step_of([3.0, 4.0], skipped=skipped).skipped is True
    assert step_of([3.0, 4.0], skipped=[False, False]).skipped is False


def test_a_step_without_a_finite_norm_stores_the_largest_norm():
    # The first row was not observed.
    step = step_of([NAN, INF, 3.0], finite=[True, False, False])
    assert step[:2] == (INF, 8)
    assert (step.clipped, step.finite, step.skipped) == (0, False, False)
    assert math.isnan(step.scale)
    step = step_of([NAN, NAN], finite=[True, True])
    assert math.isnan(step.norm)
    assert step.finite is True


def test_the_threshold_is_the_median_of_the_finite_ones():
    limits = [9.0, INF, 1.0, 4.0, NAN, 2.0]
    assert step_of([1.0] * 6, threshold=limits).threshold == 3
    assert step_of([1.0] * 6, threshold=[INF] * 5 + [2.0]).threshold == 2
    assert step_of([1.0], threshold=[INF]).threshold == INF


@pytest.mark.parametrize("value", [1.5, 2.0, -0.5, NAN])
@pytest.mark.parametrize("place", [0, 1])
def test_clipped_is_a_fraction_of_a_row(value, place):
    clipped = [0.5, 0.5]
    assert step_of([1.0, 1.0], clipped=clipped).clipped == 0.5
    clipped[place] = value
    with pytest.raises(ValueError, match=rf"clipped must be in \[0, 1\], got {value}"):
        step_of([1.0, 1.0], clipped=clipped)


def test_a_decision_with_two_axes_is_refused():
    wide = SimpleNamespace(**{name: [[1.0, 1.0]] for name in FIELDS})
    with pytest.raises(ValueError, match=r"shape \(rows,\), got .*\(1, 2\)"):
        read_decision(wide)


def test_an_integer_beyond_every_float_is_infinite():
    assert step_from_numbers(10**400, 1.0, None, None).norm == INF
    with pytest.raises(ValueError, match="norm must be >= 0, got -inf"):
        step_from_numbers(-(10**400), 1.0, None, None)


def test_a_row_keeps_its_name_in_the_metrics_of_updates():
    metrics = {"clip/update_norm": 5.0, "clip/update_norm/clip/update_a": 3.0}
    updates = {"clip/norm": 5.0, "clip/norm/clip/update_a": 3.0}
    assert split_metrics(metrics, clipper=None) == ({}, updates)


# Statistics.


@pytest.mark.parametrize("size", range(1, 8))
def test_the_median_is_that_of_numpy(size):
    values = np.array([3.0, 70.0, 2.0, 11.0, 0.5, 30.0, 7.0])[:size]
    assert median(values) == np.median(values)


@pytest.mark.parametrize("unit", [1.0, 1e300, 1e-300])
def test_the_root_of_a_sum_of_squares_stays_in_range(unit):
    values = unit * np.array([1e-200, 3.0, 4.0])
    assert root_sum_squares(values) == pytest.approx(5.0 * unit, rel=1e-12)
