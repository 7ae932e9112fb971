"""Decisions of clipping by value agree with Python formulas for each row."""

import itertools
import math

import numpy as np
import pytest

from autoclip_core.clipper.by_value import decide_by_value

INF, NAN = math.inf, math.nan
# Norm before, norm after, whether an element changes, whether there is a gradient.
FINITE_OR_ABSENT = [
    (5.0, 2.5, True, True),
    (3.0, 3.0, False, True),
    (0.0, 0.0, False, True),
    (9.0, 1.0, True, False),
    (NAN, 1.0, True, False),
    (INF, INF, False, False),
]
NONFINITE = [(NAN, 2.0, True, True), (INF, 4.0, True, True), (INF, INF, False, True)]
FIELDS = ["norm", "scale", "clipped", "finite", "skipped"]


def expected_rows(rows, nonfinite):
    """Yield norm, scale, clipped, finite and skipped of each row, as documented."""
    is_bad = [observed and not math.isfinite(norm) for norm, _, _, observed in rows]
    skipped = nonfinite == "skip" and any(is_bad)
    for (norm, after, changes, observed), bad in zip(rows, is_bad, strict=True):
        clipped = observed and changes and not bad
        scale = after / norm if clipped else 1.0
        if (bad and nonfinite == "zero") or (skipped and observed):
            scale = 0.0
        yield norm if observed else NAN, scale, clipped, not bad, skipped


@pytest.mark.parametrize("nonfinite", ["zero", "skip", "propagate"])
def test_each_row_follows_the_formulas(nonfinite):
    """Each row is tested alone, in every pair, and with all the others."""
    rows = [*FINITE_OR_ABSENT, *NONFINITE]
    tables = [[row] for row in rows] + list(map(list, itertools.combinations(rows, 2)))
    for table in [FINITE_OR_ABSENT, rows, *tables]:
        before, after, changed, observed = map(np.array, zip(*table, strict=True))
        limits = np.arange(1, len(table) + 1, dtype=np.float32)
        decision = decide_by_value(
            before,
            after,
            changed,
            thresholds=limits,
            observed=observed,
            nonfinite=nonfinite,
        )
        expected = zip(*expected_rows(table, nonfinite), strict=True)
        for name, column in zip(FIELDS, expected, strict=True):
            np.testing.assert_array_equal(getattr(decision, name), column)
        assert decision.threshold is limits
        assert decision.dropped.tolist() == [False] * len(table)


def test_a_row_that_is_not_finite_becomes_0_by_default():
    norm, yes = np.float32([NAN]), np.array([True])
    decision = decide_by_value(norm, norm, yes, thresholds=norm, observed=yes)
    assert (decision.scale.tolist(), decision.skipped.tolist()) == ([0.0], [False])
