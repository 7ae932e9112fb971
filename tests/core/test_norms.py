"""The norm of a whole follows from the norms of its parts, in float64 formulas."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoclip_core import Fixed, decide
from autoclip_core.clipper.metrics import (
    compute_metrics,
    compute_totals,
    count_step,
    empty_tally,
)
from autoclip_core.clipper.norms import NORMS, check_norm, combine_norms, to_rms

FORMULAS = {
    "l2": lambda x: np.sqrt(np.sum(np.abs(np.complex128(x)) ** 2)),
    "rms": lambda x: np.sqrt(np.sum(np.abs(np.complex128(x)) ** 2) / max(len(x), 1)),
    "max": lambda x: np.max(np.abs(np.complex128(x)), initial=0.0),
}
all_norms = pytest.mark.parametrize("norm", FORMULAS)

sizes = st.lists(st.integers(0, 5), min_size=1, max_size=5)
scales = st.sampled_from([1.0, 1e30, 1e-30, 1e37])


def draw_parts(counts, scale):
    rng = np.random.default_rng(sum(counts))
    return [scale * rng.standard_normal(count) for count in counts]


@all_norms
@given(counts=sizes, scale=scales)
def test_parts_combine_to_the_norm_of_all_elements(norm, counts, scale):
    parts = draw_parts(counts, scale)
    by_part = np.float32([FORMULAS[norm](part) for part in parts])
    whole = combine_norms(by_part, norm, sizes=np.float32(counts))
    expected = FORMULAS[norm](np.concatenate(parts))
    np.testing.assert_allclose(whole, expected, rtol=1e-6)
    pair = combine_norms(
        np.stack([by_part, by_part]), norm, sizes=np.float32([counts, counts])
    )
    expected = [FORMULAS[norm](np.concatenate([part, part])) for part in parts]
    np.testing.assert_allclose(pair, expected, rtol=1e-6)


@all_norms
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_part_that_is_not_finite_makes_the_whole_so(norm, value):
    parts = np.float32([[1.0, value, 0.0], [value, 2.0, 0.0]])
    whole = combine_norms(parts, norm, sizes=np.float32([[3, 3, 0], [1, 1, 0]]))
    assert np.isfinite(whole).tolist() == [False, False, True]


@all_norms
def test_the_metrics_are_those_of_one_row_of_everything(norm):
    """Rows without a gradient, and rows that are not finite, are left out."""
    parts = [*draw_parts([3, 1, 8, 2], 1.0), np.array([np.nan]), np.array([7.0])]
    observed = np.array([True] * 5 + [False])
    policy = Fixed(0.5)
    state = policy.init(6)
    norms = [FORMULAS[norm](part) for part in parts]
    _, decision = decide(policy, state, norms, observed=observed)
    counts = np.float32([len(part) for part in parts])
    tally = count_step(empty_tally(6), decision)
    totals = compute_totals(decision, norm=norm, sizes=counts)
    metrics = compute_metrics(decision, tally, totals=totals)
    pairs = zip(parts[:4], decision.scale, strict=False)
    before = FORMULAS[norm](np.concatenate(parts[:4]))
    after = FORMULAS[norm](np.concatenate([scale * part for part, scale in pairs]))
    assert after < before
    np.testing.assert_allclose(metrics["clip/norm"], before, rtol=1e-6)
    np.testing.assert_allclose(metrics["clip/norm_after"], after, rtol=1e-6)
    np.testing.assert_allclose(metrics["clip/scale"], after / before, rtol=1e-6)


def test_a_row_without_elements_has_norm_0():
    assert to_rms(np.float32([0.0, 6.0]), np.float32([0, 4])).tolist() == [0.0, 3.0]
    for norm in NORMS:
        empty = np.zeros((0,), np.float32)
        assert combine_norms(empty, norm, sizes=empty) == 0


def test_another_norm_is_refused_by_name():
    assert [check_norm(norm) for norm in NORMS] == list(FORMULAS)
    for value in (2, float("inf"), "inf", None, "L2"):
        with pytest.raises(ValueError, match=r"norm must be .*'max', got .*norm_type"):
            check_norm(value)
