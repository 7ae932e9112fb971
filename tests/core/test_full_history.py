"""All norms of a row compared with a plain list: quantiles, and the cost of a step."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from autoclip_core import Quantile, Warmup, decide
from autoclip_core.history import full as history
from autoclip_core.history import ranks, window
from autoclip_core.policy import select_rows

from ..support.cases import (
    changed,
    fewer_examples,
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
    """Merge often: at most 3 recent norms and 15 settled norms."""
    monkeypatch.setattr(history, "RECENT", 4)


def after(norms, rows=1):
    """Return the history after these norms, of shape (steps, rows)."""
    state = history.empty(rows)
    for new in np.asarray(norms, np.float32).reshape(-1, rows):
        state = history.push(state, new)
    return state


def ascending(state, row):
    """Return the norms of a row in ascending order."""
    norms = np.concatenate([part[row] for part in parts_of(state)])
    return np.sort(norms[np.isfinite(norms)])


def parts_of(state):
    return state.old, state.settled, state.recent


def in_part(part):
    """Return the number of norms of each row in a part."""
    return np.isfinite(part).sum(axis=1)


def ordered(*rows):
    """Return a part of a history with the given rows."""
    part = np.full((len(rows), max(map(len, rows)) + 2), np.inf, np.float32)
    part[:, 0] = -np.inf
    for row, norms in zip(part, rows, strict=True):
        row[1 : len(norms) + 1] = np.sort(norms)
    return part


any_fraction = st.floats(0, 1) | st.sampled_from(FRACTIONS)


@fewer_examples
@given(norms=norms_with_gaps, q=any_fraction, recent=st.integers(1, 4))
def test_a_quantile_of_all_norms_is_exact_whenever_rows_merge(norms, q, recent):
    """Rows record in different steps, and their parts differ in length."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(history, "RECENT", recent)
        policy = Quantile(q, history_length=None)
        state, decision = run(policy, series_of(norms))
    recorded = np.isfinite(norms) & (norms > 0)
    for row in range(3):
        for step in range(len(norms)):
            past = norms[:step, row][recorded[:step, row]]
            expected = linear_quantile(past, q) if len(past) else np.inf
            assert decision.threshold[step, row] == expected
        expected = np.sort(norms[recorded[:, row], row])
        np.testing.assert_array_equal(ascending(state, row), expected)
        assert state.count[row] == len(expected)


@st.composite
def any_parts(draw):
    """Draw the norms of two rows in three parts: with ties, or on different levels."""
    norm = st.sampled_from([1.0, 2.0, 3.0]) | positive(1e-20, 1e20)
    most = draw(st.sampled_from([(6, 6, 6), (6, 40, 40), (6, 3, 40), (6, 40, 3)]))
    level = draw(st.permutations([1.0, 1.0, 1e10]))
    return [
        [
            [np.float32(level[part]) * np.float32(n) for n in norms]
            for norms in draw(st.tuples(*[st.lists(norm, max_size=most[part])] * 2))
        ]
        for part in range(3)
    ]


@fewer_examples
@given(parts=any_parts(), q=any_fraction)
def test_a_quantile_is_exact_wherever_the_norms_are(parts, q):
    """This holds whichever part is the longest or has the largest norms."""
    recent, settled, old = parts
    rows = [[*a, *b, *c] for a, b, c in zip(*parts, strict=True)]
    state = history.History(
        ordered(*old),
        ordered(*settled),
        history.widen(ordered(*recent), np.empty((2, 9))),  # it always has room
        np.int32([*map(len, rows)]),
    )
    expected = [linear_quantile(row, q) if row else np.inf for row in rows]
    assert history.quantile(state, q).tolist() == expected


@pytest.mark.parametrize("q", FRACTIONS)
def test_a_quantile_of_many_norms_is_exact(q):
    """The norms merge at the real length."""
    norms = np.float32(log_normal(np.random.default_rng(0), 3 * history.RECENT + 7))
    state = history.empty(1)
    assert history.quantile(state, q).tolist() == [np.inf]
    for step, norm in enumerate(norms, start=1):
        state = history.push(state, norm[None])
        if step % 97 == 0 or step % history.RECENT in (0, 1):
            expected = linear_quantile(norms[:step], q)
            assert history.quantile(state, q).tolist() == [expected]


def test_a_million_settled_norms_move_on():
    """The settled norms merge into the old norms at the real length."""
    most = history.RECENT**2
    norms = log_normal(np.random.default_rng(0), 2 * most).astype(np.float32)
    start = 2 * most - history.RECENT
    state = history.empty(1)._replace(
        old=ordered(norms[:most]),
        settled=ordered(norms[most:start]),
        count=np.int32([start]),
    )
    for count in range(start, 2 * most):
        if count in (start + 1, 2 * most - 1):
            check_quantiles(state, norms[:count])
            assert in_part(state.old) == most
        state = history.push(state, norms[[count]])
    check_quantiles(state, norms)
    assert in_part(state.old) == 2 * most


def check_quantiles(state, norms):
    """Compare the quantiles with `linear_quantile`, which sorts a list."""
    norms = np.sort(norms)
    for q in FRACTIONS:
        rank = (len(norms) - 1) * q
        lower = int(rank)
        expected = linear_quantile(norms[lower : lower + 2], rank - lower)
        assert history.quantile(state, q).tolist() == [expected]


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_rows_without_a_norm_have_no_quantile(rows):
    quantiles = history.quantile(history.empty(rows), 0.5)
    assert quantiles.shape == (rows,)
    assert quantiles.dtype == np.float32
    assert np.isposinf(quantiles).all()


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


def test_old_rows_are_shared_until_the_settled_one_is_full(merged_often):
    states = [after(range(16, 0, -1))]
    for norm in range(20, 36):
        states.append(history.push(states[-1], np.float32([norm])))
    assert all(state.old is states[0].old for state in states[:-1])
    assert states[0].old.tolist() == [[-np.inf, *range(1, 17), np.inf]]
    assert states[-2].settled.tolist() == [[-np.inf, *range(20, 32), np.inf]]
    assert states[-1].settled.tolist() == [[-np.inf, np.inf]]
    expected = [[-np.inf, *range(1, 17), *range(20, 36), np.inf]]
    assert states[-1].old.tolist() == expected


def test_an_old_state_stays_as_it_was(merged_often):
    """Two runs may continue from one state; they change neither it nor each other."""
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


def test_only_rows_that_record_merge(merged_often):
    """Otherwise an idle row with one free place would merge all rows in every step."""
    state = after([[1, 1], [2, 2], [3, 3]], rows=2)
    state = history.push(state, np.float32([0, 0]))
    assert state.settled.shape == (2, 2)
    assert state.count.tolist() == [3, 3]


def test_rows_that_record_in_different_steps_merge_together():
    """A row that is idle during a merge does not cause another merge of all rows.

    In this test each row in turn records alone when it is full. Between these steps all
    rows record.
    """
    policy, rows, steps = Quantile(0.5, history_length=None), 10, 200
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(history, "RECENT", 8)
        state, merges = policy.init(rows), 0
        for step in range(steps):
            alone = step % 17 - 7
            observed = (np.arange(rows) == alone) | (alone < 0)
            before = state
            state, _ = decide(policy, state, np.ones(rows), observed=observed)
            merges += state.settled is not before.settled
    assert merges <= steps / 8


def written(before, after):
    """Return how many numbers a step has written."""
    pairs = zip(before, after, strict=True)
    return sum(new.size for old, new in pairs if new is not old)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_what_a_step_writes_grows_as_the_logarithm_of_all_norms(parts, rows):
    """Each part is 16 times as long as the newer one."""
    rng, recent = np.random.default_rng(0), 16
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(history, "RECENT", recent)
        state, total = history.empty(rows), 0
        for _ in range(recent**parts):
            norms = log_normal(rng, rows) * (rng.random(rows) < 0.9)
            norms[0] = 1.0
            more = history.push(state, norms.astype(np.float32))
            total, state = total + written(state, more), more
    assert total / recent**parts <= 2 * recent * parts * rows


@fewer_examples
@given(norms=norms_with_gaps)
@example(norms=np.float32([[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0]]))
def test_a_part_is_as_wide_as_its_fullest_row(norms):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(history, "RECENT", 2)
        state = history.empty(3)
        for new in np.where(np.isfinite(norms), norms, 0):
            state = history.push(state, new)
            for part in (state.old, state.settled):
                assert part.shape[1] == in_part(part).max() + 2
                assert part.flags.c_contiguous
                assert part.base is None or part.base.size == part.size


@pytest.mark.parametrize("include_current", [False, True])
def test_a_step_copies_no_history(include_current):
    """The memory that a step allocates does not grow with the number of norms."""
    inner = Quantile(history_length=None, include_current=include_current)
    policy = Warmup(inner, steps=1)
    many = 10**6
    norms = np.sort(log_normal(np.random.default_rng(0), many)).astype(np.float32)
    row = np.concatenate([[-np.inf], norms, [np.inf]]).astype(np.float32)
    part, state = np.stack([row, row]), policy.init(2)
    large = state.inner._replace(old=part, settled=part, count=np.int32([2 * many] * 2))
    state, _ = decide(policy, state._replace(inner=large), [1.0, 1.0])
    tracemalloc.start()
    try:
        state, decision = decide(policy, state, [2.0, 0.0])
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 100_000
    assert state.inner.settled is large.settled
    assert state.inner.old is large.old
    expected = pytest.approx(np.quantile(norms, 0.9), rel=1e-4)
    assert decision.threshold[0] == expected


def test_a_row_that_does_not_record_is_unchanged_by_a_merge(merged_often):
    policy = Quantile(0.5, history_length=None)
    state = policy.init(2)
    for new in [[1, 0], [2, 0], [3, 7], [4, 0], [5, 0], [0, 9]]:
        state, _ = decide(policy, state, np.float32(new))
    assert state.count.tolist() == [5, 2]
    assert ascending(state, 0).tolist() == [1, 2, 3, 4, 5]
    assert ascending(state, 1).tolist() == [7, 9]
    _, decision = decide(policy, state, [1.0, 1.0])
    assert decision.threshold.tolist() == [3.0, 8.0]


@pytest.mark.parametrize("steps", [3, 15])
def test_a_row_may_stay_unchanged_while_others_merge(steps, merged_often):
    """The arrays of both states differ in width: the settled part grows and shrinks."""
    before = after(np.arange(2 * steps) + 1, rows=2)
    more = history.push(before, np.float32([100, 200]))
    for taken in ([True, False], [False, True]):
        state = select_rows(np.array(taken), more, before)
        assert state.find_problem() == ""
        for row in range(2):
            source = more if taken[row] else before
            np.testing.assert_array_equal(ascending(state, row), ascending(source, row))
            assert state.count[row] == source.count[row]


def test_a_row_of_a_history_that_no_memory_holds_is_refused():
    with pytest.raises(ValueError, match=r"takes 3\.8 GiB, more than 1"):
        Quantile(history_length=None).init(1_000_000)


def test_an_empty_history_of_the_most_that_is_allowed_is_not(monkeypatch):
    most = history.empty(2)
    size = sum(part.nbytes for part in parts_of(most))
    monkeypatch.setattr(ranks, "MAX_BYTES", size)
    history.empty(2)
    monkeypatch.setattr(ranks, "MAX_BYTES", size - 1)
    with pytest.raises(ValueError, match="history_length=None for 2 rows"):
        history.empty(2)


def test_a_history_is_for_the_host():
    with pytest.raises(ValueError, match="history_length must be a number"):
        history.empty(1, None, object())


# Loaded histories.


def test_a_history_has_no_fault(merged_often):
    for steps in range(40):
        norms = np.arange(2 * steps, dtype=np.float32).reshape(-1, 2) + 1
        assert after(norms, rows=2).find_problem() == ""


BROKEN = {
    "a count too large": changed("count", 0, 24),
    "a count too small": changed("count", 0, 22),
    "a negative count": changed("count", 0, -1),
    "old norms out of order": changed("old", (0, 1), 2.5),
    "settled norms out of order": changed("settled", (0, 1), 18.5),
    "recent norms out of order": changed("recent", (0, 1), 22.5),
    "NaN among the old": changed("old", (0, 2), np.nan),
    "NaN among the settled": changed("settled", (0, 2), np.nan),
    "NaN among the recent": changed("recent", (0, 2), np.nan),
    "NaN for a sentinel": changed("recent", (0, 0), np.nan),
    "a negative norm": changed("settled", (0, 1), -1),
    "a norm of 0": changed("settled", (0, 1), 0),
    "a sentinel that is a norm": changed("settled", (0, 0), 0.5),
    "an old sentinel that is a norm": changed("old", (0, 0), 0.5),
    "an upper sentinel that is a norm": changed("settled", (0, -1), 99),
    "a gap": changed("recent", (0, 1), np.inf),
    "a full recent row": lambda s: s._replace(
        recent=ordered([21, 22, 23, 24], [21, 22, 23]), count=np.int32([24, 23])
    ),
    "a full settled row": lambda s: s._replace(
        settled=ordered(range(1, 17), range(1, 5)), count=np.int32([35, 23])
    ),
    "nothing at all": lambda s: s._replace(settled=s.settled[:, :0]),
    "nothing old at all": lambda s: s._replace(old=s.old[:, :0]),
    "one sentinel": lambda s: s._replace(settled=s.settled[:, :1]),
    "norms cut off": lambda s: s._replace(settled=s.settled[:, :3]),
    "old norms cut off": lambda s: s._replace(old=s.old[:, :3]),
    "old norms lost": lambda s: s._replace(old=s.old[:, [0, -1]]),
}


@pytest.mark.parametrize("breaking", BROKEN.values(), ids=BROKEN)
def test_a_broken_history_has_a_fault(breaking, merged_often):
    """The other row is valid."""
    state = after(np.arange(1, 24).repeat(2), rows=2)
    counts = [in_part(part).tolist() for part in parts_of(state)]
    assert counts == [[16, 16], [4, 4], [3, 3]]
    assert state.find_problem() == ""
    assert breaking(state).find_problem()


def test_rows_grow_as_wide_as_others():
    narrow, wide = np.float32([[1], [2]]), np.float32([[1, 2, 3]])
    assert history.widen(narrow, wide).tolist() == [
        [1, np.inf, np.inf],
        [2, np.inf, np.inf],
    ]
    assert history.widen(wide, wide) is wide
    assert history.widen(wide, narrow) is wide


def test_all_norms_are_the_last_norms_of_a_longer_window(merged_often):
    norms = np.float32(log_normal(np.random.default_rng(3), (50, 3)))
    whole, last = history.empty(3), window.empty(3, 60)
    for new in norms:
        whole, last = history.push(whole, new), window.push(last, new)
        for q in FRACTIONS:
            np.testing.assert_array_equal(
                history.quantile(whole, q), window.quantile(last, q)
            )
