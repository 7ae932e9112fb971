"""The totals and the histogram of a log."""

import math

import numpy as np
import pytest

from autoclip_core.record.store import STEP
from autoclip_core.record.totals import RunTotals, compute_bin_centres, find_bins

NAN, INF = math.nan, math.inf


def totals_of(norms, **columns):
    steps = np.zeros(len(norms), STEP)
    steps["norm"], steps["finite"] = norms, np.isfinite(norms)
    for name, column in columns.items():
        steps[name] = column
    totals = RunTotals()
    totals.add(steps)
    return totals


def test_totals_count_each_kind_of_step():
    totals = totals_of(
        [3.0, NAN, 4.0, INF, 0.0],
        threshold=[2.0, 2.0, INF, INF, 8.0],
        scale=[0.5, 0.0, 1.0, 0.0, 0.75],
        clipped=[1.0, 0.0, 0.25, 0.0, 0.5],
        skipped=[False, True, False, True, False],
        dropped=[True, False, False, False, True],
    )
    counts = {"steps": 5, "measured": 3, "armed": 2, "nonfinite": 2, "skipped": 2}
    counts["dropped"] = 2
    sums = {"norm": 7.0, "scale": 2.25, "clipped": 1.75, "armed_clipped": 1.5}
    assert (totals.counts, totals.sums, totals.largest) == (counts, sums, 4.0)
    assert totals.mean("norm") == 7 / 3
    assert totals.histogram.sum() == 3


def test_empty_totals_have_no_mean_and_no_quantile():
    totals = RunTotals()
    assert set(totals.counts.values()) | set(totals.sums.values()) == {0}
    assert math.isnan(totals.mean("norm"))
    assert math.isnan(totals.quantile(0.5))
    assert totals.largest == totals_of([NAN]).largest == -INF


def test_there_are_64_bins_between_powers_of_2():
    norms = [0.0, 1e-300, 2.0**-150, 2.0**-149, 1.0, 2.0, 2.0**129, 1e300]
    places = [0, 0, 0, 64, 150 * 64, 151 * 64, 279 * 64, 279 * 64]
    assert find_bins(np.array(norms)).tolist() == places
    assert compute_bin_centres()[150 * 64] == 2 ** (0.5 / 64)
    assert len(compute_bin_centres()) == len(RunTotals().histogram) == 280 * 64


def test_every_norm_is_within_half_a_bin_of_its_centre():
    logs = np.random.default_rng(0).uniform(-149, 129, 10_000)
    distance = np.log2(compute_bin_centres()[find_bins(2.0**logs)]) - logs
    assert abs(distance).max() == pytest.approx(1 / 128, rel=1e-3)


def test_a_quantile_is_the_bin_of_its_rank():
    """The sorted norms are 1, 1, 1, 4, 4. Quantile q has rank 4 * q, rounded down."""
    totals = totals_of([4.0, 1.0, 1.0, 4.0, 1.0])
    for q, norm in [(0.0, 1), (0.5, 1), (0.74, 1), (0.75, 4), (1.0, 4)]:
        assert totals.quantile(q) == norm * 2 ** (0.5 / 64)
    assert totals_of([0.0, 0.0, 1.0]).quantile(0.5) == 0


def test_restored_totals_are_the_same():
    totals, other = totals_of([1.0, 1.0, 9.0]), totals_of([5.0])
    other.restore(totals.to_dict())
    assert other.to_dict() == totals.to_dict()
    np.testing.assert_array_equal(other.histogram, totals.histogram)
