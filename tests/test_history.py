"""All norms of a row, against a plain list: quantiles, and what a step costs."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from autoclip_core import Quantile, Warmup, decide, history, window

from .cases import (
    changed,
    few,
    linear_quantile,
    log_normal,
    positive,
    run,
    series_of,
)

FRACTIONS = (0.0, 0.1, 1 / 3, 0.5, 0.9, 0.999, 1.0)

norms_with_gaps = st.integers(1, 40).flatmap(
    lambda steps: arrays(
        np.float32,
        (steps, 3),
        elements=positive(1e-20, 1e20)
        | st.sampled_from(np.float32([1, 2, 0, np.nan, np.inf]).tolist()),
    )
)


@pytest.fixture
def merged_often(monkeypatch):
    monkeypatch.setattr(history, "RECENT", 4)


def after(norms, rows=1):
    """The history of all rows after these norms, of shape (steps, rows)."""
    state = history.empty(rows)
    for new in np.asarray(norms, np.float32).reshape(-1, rows):
        state = history.push(state, new)
    return state


def ascending(state, row):
    """What a row holds, in order."""
    held = np.concatenate([state.settled[row], state.recent[row]])
    return np.sort(held[np.isfinite(held)])


@few
@given(norms=norms_with_gaps, q=st.floats(0, 1) | st.sampled_from(FRACTIONS))
def test_a_quantile_of_all_norms_is_exact_whenever_rows_merge(norms, q):
    """Rows learn in different steps, and so merge in different steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(history, "RECENT", 4)
        policy = Quantile(q, history_length=None)
        state, decision = run(policy, series_of(norms))
    learned = np.isfinite(norms) & (norms > 0)
    for row in range(3):
        for step in range(len(norms)):
            past = norms[:step, row][learned[:step, row]]
            expected = linear_quantile(past, q) if len(past) else np.inf
            assert decision.threshold[step, row] == expected
        kept = np.sort(norms[learned[:, row], row])
        np.testing.assert_array_equal(ascending(state, row), kept)
        assert state.count[row] == len(kept)


@pytest.mark.parametrize("q", FRACTIONS)
def test_a_quantile_of_many_norms_is_exact(q):
    """Across merges of the length that is used."""
    norms = np.float32(log_normal(np.random.default_rng(0), 3 * history.RECENT + 7))
    state = history.empty(1)
    assert history.quantile(state, q).tolist() == [np.inf]
    for step, norm in enumerate(norms, start=1):
        state = history.push(state, norm[None])
        if step % 97 == 0 or step % history.RECENT in (0, 1):
            expected = linear_quantile(norms[:step], q)
            assert history.quantile(state, q).tolist() == [expected]


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_rows_without_a_norm_have_no_quantile(rows):
    found = history.quantile(history.empty(rows), 0.5)
    assert found.shape == (rows,)
    assert found.dtype == np.float32
    assert np.isposinf(found).all()


def test_one_settled_row_is_shared_until_the_recent_one_is_full(merged_often):
    states = [after([5, 1, 4, 2, 3, 6])]
    for norm in (9, 8):
        states.append(history.push(states[-1], np.float32([norm])))
    first, second, third = states
    assert second.settled is first.settled
    assert third.settled is not first.settled
    assert first.settled.tolist() == [[-np.inf, 1, 2, 4, 5, np.inf]]
    assert second.recent.tolist() == [[-np.inf, 3, 6, 9, np.inf, np.inf]]
    assert np.isinf(third.recent).all()


def test_an_old_state_stays_as_it_was(merged_often):
    """Two runs may go on from one state, and neither disturbs it or the other."""
    norms = np.float32(log_normal(np.random.default_rng(1), (40, 2)))
    states = [history.empty(2)]
    for new in norms:
        states.append(history.push(states[-1], new))
    for step, state in enumerate(states):
        other = history.push(history.push(state, norms[0]), norms[1])
        for row in range(2):
            past = norms[:step, row]
            np.testing.assert_array_equal(ascending(state, row), np.sort(past))
            both = np.sort([*past, *norms[:2, row]])
            np.testing.assert_array_equal(ascending(other, row), both)


def test_no_row_merges_but_those_that_learn(merged_often):
    """An idle row with one free place would otherwise merge them all in every step."""
    state = after([[1, 1], [2, 2], [3, 3]], rows=2)
    state = history.push(state, np.float32([0, 0]))
    assert state.settled.shape == (2, 2)
    assert state.count.tolist() == [3, 3]


@pytest.mark.parametrize("include_current", [False, True])
def test_a_step_copies_no_history(include_current):
    """What it allocates does not grow with what is remembered, idle rows or not."""
    inner = Quantile(history_length=None, include_current=include_current)
    policy = Warmup(inner, steps=1)
    many = 10**6
    norms = np.sort(log_normal(np.random.default_rng(0), many)).astype(np.float32)
    row = np.concatenate([[-np.inf], norms, [np.inf]]).astype(np.float32)
    state = policy.init(2)
    held = state.inner._replace(
        settled=np.stack([row, row]), count=np.int32([many] * 2)
    )
    state, _ = decide(policy, state._replace(inner=held), [1.0, 1.0])
    tracemalloc.start()
    try:
        state, decision = decide(policy, state, [2.0, 0.0])
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 100_000
    assert state.inner.settled is held.settled
    expected = pytest.approx(np.quantile(norms, 0.9), rel=1e-4)
    assert decision.threshold[0] == expected


def test_a_row_that_does_not_learn_in_a_merge_keeps_its_own(merged_often):
    policy = Quantile(0.5, history_length=None)
    state = policy.init(2)
    for new in [[1, 0], [2, 0], [3, 7], [4, 0], [5, 0], [0, 9]]:
        state, _ = decide(policy, state, np.float32(new))
    assert state.count.tolist() == [5, 2]
    assert ascending(state, 0).tolist() == [1, 2, 3, 4, 5]
    assert ascending(state, 1).tolist() == [7, 9]
    _, decision = decide(policy, state, [1.0, 1.0])
    assert decision.threshold.tolist() == [3.0, 8.0]


def test_a_row_of_a_history_that_no_memory_holds_is_refused():
    with pytest.raises(ValueError, match=r"takes 3\.8 GiB, more than 1"):
        Quantile(history_length=None).init(1_000_000)


def test_a_history_is_for_the_host():
    with pytest.raises(ValueError, match="history_length must be a number"):
        history.empty(1, None, object())


# What a checkpoint may hold.


def test_a_history_has_no_fault(merged_often):
    for steps in range(12):
        norms = np.arange(2 * steps, dtype=np.float32).reshape(-1, 2) + 1
        assert after(norms, rows=2).fault() == ""


BROKEN = {
    "a count too large": changed("count", 0, 8),
    "a count too small": changed("count", 0, 6),
    "a negative count": changed("count", 0, -1),
    "settled norms out of order": changed("settled", (0, 1), 4.5),
    "recent norms out of order": changed("recent", (0, 1), 6.5),
    "NaN among the settled": changed("settled", (0, 2), np.nan),
    "NaN among the recent": changed("recent", (0, 2), np.nan),
    "NaN for a sentinel": changed("recent", (0, 0), np.nan),
    "a negative norm": changed("settled", (0, 1), -1),
    "a norm of 0": changed("settled", (0, 1), 0),
    "a sentinel that is a norm": changed("settled", (0, 0), 0.5),
    "an upper sentinel that is a norm": changed("settled", (0, -1), 9),
    "a gap": changed("recent", (0, 1), np.inf),
    "a full recent row": changed("recent", (0, slice(1, 5)), [5, 6, 7, 8]),
    "nothing at all": lambda s: s._replace(settled=s.settled[:, :0]),
    "one sentinel": lambda s: s._replace(settled=s.settled[:, :1]),
    "norms cut off": lambda s: s._replace(settled=s.settled[:, :3]),
}


@pytest.mark.parametrize("breaking", BROKEN.values(), ids=BROKEN)
def test_a_broken_history_has_a_fault(breaking, merged_often):
    state = after([1, 2, 3, 4, 5, 6, 7])
    assert state.fault() == ""
    assert breaking(state).fault()


def test_rows_grow_as_wide_as_others():
    narrow, wide = np.float32([[1], [2]]), np.float32([[1, 2, 3]])
    assert history.widened(narrow, wide).tolist() == [
        [1, np.inf, np.inf],
        [2, np.inf, np.inf],
    ]
    assert history.widened(wide, wide) is wide


def test_all_norms_are_the_last_norms_of_a_longer_window(merged_often):
    norms = np.float32(log_normal(np.random.default_rng(3), (50, 3)))
    whole, last = history.empty(3), window.empty(3, 60)
    for new in norms:
        whole, last = history.push(whole, new), window.push(last, new)
        for q in FRACTIONS:
            np.testing.assert_array_equal(
                history.quantile(whole, q), window.quantile(last, q)
            )
