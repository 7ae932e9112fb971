"""Counts of rows per interval of a run, compared with lists of every step."""

import math

import numpy as np
import pytest

from autoclip_core.record import row_counts as log_rows
from autoclip_core.record.row_counts import RowCounts

NAN = math.nan


def intervals_by_hand(history, most):
    """Return the length and the steps of at most `most` intervals; lengths double."""
    width = 1
    while len(history) > most * width:
        width *= 2
    return width, [history[i : i + width] for i in range(0, len(history), width)]


def rate_by_hand(steps, row):
    """Return clipped / observed of a row; before it joins, a row is not observed."""
    clipped = sum(c[row] for c, _ in steps if row < len(c))
    observed = sum(o[row] for _, o in steps if row < len(o))
    return clipped / observed if observed else NAN


@pytest.mark.parametrize("steps", [*range(1, 10), 16, 17, 31, 33])
def test_counts_agree_with_lists_of_every_step(monkeypatch, steps):
    """There are three rows; the last joins at step 6."""
    monkeypatch.setattr(log_rows, "INTERVALS", 8)
    rng = np.random.default_rng(steps)
    counts, history = RowCounts(["a", "b"]), []
    for step in range(steps):
        observed = rng.random(2 if step < 6 else 3) < 0.6
        clipped = observed & (rng.random(len(observed)) < 0.5)
        counts.add(clipped, observed)
        history.append((clipped, observed))
    width, intervals = intervals_by_hand(history, 8)
    names = ["a", "b", "row 2"][: 2 if steps <= 6 else 3]
    assert (counts.names, counts.width) == (names, width)
    rows = range(len(names))
    expected = [[rate_by_hand(part, row) for part in intervals] for row in rows]
    np.testing.assert_array_equal(counts.rates_over_time(), expected)
    rates = [rate_by_hand(history, row) for row in rows]
    np.testing.assert_array_equal(counts.rates(), rates)
    clips = [sum(int(c[row]) for c, _ in history if row < len(c)) for row in rows]
    assert counts.clips().tolist() == clips
    saved = counts.to_dict()
    assert len(saved["clipped"]) == len(saved["observed"]) == len(intervals)
    restored = RowCounts.from_dict(saved)
    assert restored.to_dict() == saved
    np.testing.assert_array_equal(restored.rates_over_time(), expected)


def test_a_partly_clipped_row_counts_as_clipped():
    counts = RowCounts(["a", "b"])
    counts.add(np.array([0.5, 0.0]), np.array([True, True]))
    assert counts.clips().tolist() == [1, 0]


def test_a_run_has_at_most_128_intervals():
    counts = RowCounts(["a"])
    for _ in range(129):
        counts.add(np.array([True]), np.array([True]))
        assert counts.rates_over_time().shape[1] in (counts.steps, 65)
    assert counts.rates_over_time().shape == (1, 65)


def test_several_rows_may_join_at_once():
    counts = RowCounts()
    counts.add(np.array([True, False, True]), np.array([True, True, True]))
    assert counts.names == ["row 0", "row 1", "row 2"]
    assert counts.rates().tolist() == [1.0, 0.0, 1.0]


def test_rows_are_counted_by_name():
    counts = RowCounts(["a", "b"])
    counts.add_named(["b", "c"], np.array([True, False]), np.array([True, True]))
    counts.add_named(["c", "a"], np.array([True, True]), np.array([True, True]))
    assert counts.names == ["a", "b", "c"]
    assert counts.rates().tolist() == [1.0, 1.0, 0.5]


def test_without_a_step_the_map_is_empty():
    counts = RowCounts(["a"])
    assert counts.rates_over_time().shape == (1, 0)
    assert RowCounts.from_dict(counts.to_dict()).to_dict() == counts.to_dict()
