"""What is kept of a step of several rows, at the edges of the table."""

import math
from types import SimpleNamespace

import pytest

from autoclip_core.record.step import (
    FIELDS,
    Step,
    read_decision,
    reduce_rows,
    step_from_numbers,
)

NAN, INF = math.nan, math.inf


def step_of(norm, *, threshold=None, scale=None, clipped=None, finite=None, **more):
    """The step of a decision; what is not given is as if nothing was clipped."""
    size = len(norm)
    known = [math.isfinite(one) for one in norm]
    fields = {
        "norm": norm,
        "threshold": [8.0] * size if threshold is None else threshold,
        "scale": [1.0] * size if scale is None else scale,
        "clipped": [False] * size if clipped is None else clipped,
        "finite": known if finite is None else finite,
    }
    return reduce_rows(read_decision(SimpleNamespace(**fields, **more)))


def test_rows_that_are_all_removed_have_the_scale_0():
    assert step_of([3.0, 4.0], scale=[0.0, 0.0]) == Step(5, 8, 0, 0, True, False)
    assert step_of([0.0, 0.0], scale=[0.0, 0.0]).scale == 1


@pytest.mark.parametrize("skipped", [[True, False], [False, True], [True, True]])
def test_one_row_that_is_skipped_is_enough(skipped):
    assert step_of([3.0, 4.0], skipped=skipped).skipped is True
    assert step_of([3.0, 4.0], skipped=[False, False]).skipped is False


def test_a_step_without_a_finite_norm_keeps_the_largest_it_has():
    kept = step_of([NAN, INF, 3.0], finite=[True, False, False])  # the first: no row
    assert kept[:2] == (INF, 8)
    assert (kept.clipped, kept.finite, kept.skipped) == (0, False, False)
    assert math.isnan(kept.scale)
    kept = step_of([NAN, NAN], finite=[True, True])
    assert math.isnan(kept.norm)
    assert kept.finite is True


def test_the_threshold_is_the_median_of_the_finite():
    limits = [9.0, INF, 1.0, 4.0, NAN, 2.0]
    assert step_of([1.0] * 6, threshold=limits).threshold == 3
    assert step_of([1.0] * 6, threshold=[INF] * 5 + [2.0]).threshold == 2
    assert step_of([1.0], threshold=[INF]).threshold == INF


@pytest.mark.parametrize("wrong", [1.5, 2.0, -0.5, NAN])
@pytest.mark.parametrize("place", [0, 1])
def test_a_row_is_clipped_by_a_fraction(wrong, place):
    clipped = [0.5, 0.5]
    assert step_of([1.0, 1.0], clipped=clipped).clipped == 0.5
    clipped[place] = wrong
    with pytest.raises(ValueError, match=rf"clipped must be in \[0, 1\], got {wrong}"):
        step_of([1.0, 1.0], clipped=clipped)


def test_a_decision_has_one_entry_per_row():
    wide = SimpleNamespace(**{name: [[1.0, 1.0]] for name in FIELDS})
    with pytest.raises(ValueError, match=r"shape \(rows,\), got .*\(1, 2\)"):
        read_decision(wide)


def test_an_integer_below_all_floats_is_negative():
    assert step_from_numbers(10**400, 1.0, None, None).norm == INF
    with pytest.raises(ValueError, match="norm must be >= 0, got -inf"):
        step_from_numbers(-(10**400), 1.0, None, None)
