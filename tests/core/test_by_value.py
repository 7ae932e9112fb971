"""What clipping the elements does to the norms, against a row at a time in Python."""

import itertools
import math

import numpy as np
import pytest

from autoclip_core.clipper.by_value import decide_by_value

INF, NAN = math.inf, math.nan
# Norm before, norm after, whether any element changes, whether there is a gradient.
SOUND = [
    (5.0, 2.5, True, True),
    (3.0, 3.0, False, True),
    (0.0, 0.0, False, True),
    (9.0, 1.0, True, False),
    (NAN, 1.0, True, False),
    (INF, INF, False, False),
]
LOST = [(NAN, 2.0, True, True), (INF, 4.0, True, True), (INF, INF, False, True)]


def by_rows(rows, nonfinite):
    """Norm, scale, clipped, finite and skipped of each row, by the documented words."""
    lost = [seen and not math.isfinite(norm) for norm, _, _, seen in rows]
    cancelled = nonfinite == "skip" and any(lost)
    for (norm, after, changes, seen), bad in zip(rows, lost, strict=True):
        clipped = seen and changes and not bad
        scale = after / norm if clipped else 1.0
        if (bad and nonfinite == "zero") or (cancelled and seen):
            scale = 0.0
        yield norm if seen else NAN, scale, clipped, not bad, cancelled


@pytest.mark.parametrize("nonfinite", ["zero", "skip", "propagate"])
def test_each_row_is_described(nonfinite):
    """Alone, beside one other, and all of them together."""
    rows = [*SOUND, *LOST]
    tables = [[row] for row in rows] + list(map(list, itertools.combinations(rows, 2)))
    for table in [SOUND, rows, *tables]:
        before, after, changed, seen = map(np.array, zip(*table, strict=True))
        limits = np.arange(1, len(table) + 1, dtype=np.float32)
        told = decide_by_value(
            before,
            after,
            changed,
            thresholds=limits,
            observed=seen,
            nonfinite=nonfinite,
        )
        expected = zip(*by_rows(table, nonfinite), strict=True)
        fields = (told.norm, told.scale, told.clipped, told.finite, told.skipped)
        for field, column in zip(fields, expected, strict=True):
            np.testing.assert_array_equal(field, column)
        assert told.threshold is limits


def test_what_is_not_finite_becomes_0_unless_told_otherwise():
    one, yes = np.float32([NAN]), np.array([True])
    told = decide_by_value(one, one, yes, thresholds=one, observed=yes)
    assert (told.scale.tolist(), told.skipped.tolist()) == ([0.0], [False])
