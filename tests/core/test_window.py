"""The window compared with a plain list: order, quantile, mean and deviation.

The tests cover three known traps: a rank computed in float32, subnormal norms, and
norms that are not finite.
"""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from autoclip_core import MeanStd, Quantile, decide
from autoclip_core.history import ranks, window
from autoclip_core.history.lookup import get_tables

from ..support.cases import (
    assert_same,
    changed,
    fewer_examples,
    linear_quantile,
    log_normal,
    positive,
)

EXACT_RANK = tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4)


def filled(norms, length):
    """Return the window after these norms, of shape (steps, rows)."""
    norms = np.asarray(norms, np.float32)
    state = window.empty(norms.shape[1], length)
    for new in norms:
        state = window.push(state, new)
    return state


def column(norms):
    return np.float32(norms)[:, None]


def units_apart(actual, expected):
    """Return the distance in units in the last place of float32."""
    return abs(float(actual) - float(expected)) / np.spacing(np.float32(expected))


positives = positive() | st.sampled_from(np.float32([1, 2, 1.2e-38, 3e38]).tolist())


# Order.


@pytest.mark.parametrize("length", [1, 2, 3, 7, 100])
@given(
    norms=arrays(
        np.float32, st.tuples(st.integers(0, 30), st.just(2)), elements=positives
    )
)
def test_the_last_norms_in_order_between_sentinels(length, norms):
    state = filled(norms, length)
    last = norms[-length:]
    for row in range(2):
        np.testing.assert_array_equal(
            state.ordered[row, : len(last) + 1], [-np.inf, *sorted(last[:, row])]
        )
        assert np.isposinf(state.ordered[row, len(last) + 1 :]).all()
    assert window.count_norms(state).tolist() == [len(last)] * 2


@pytest.mark.parametrize("length", [1, 2, 5])
def test_the_ring_holds_the_last_norms_and_the_count_stays_small(length):
    norms = np.arange(1, 40, dtype=np.float32)
    state = window.empty(1, length)
    for step, norm in enumerate(norms, start=1):
        state = window.push(state, norm[None])
        assert sorted(state.ring[0][np.isfinite(state.ring[0])]) == sorted(
            norms[max(step - length, 0) : step]
        )
        assert min(step, length) <= state.count[0] < 2 * length
        assert window.count_norms(state)[0] == min(step, length)


def test_rows_of_different_age_do_not_mix():
    policy = Quantile(0.5, history_length=3)
    state = policy.init(rows=3)
    series = [[1, 5, 0], [2, 0, 0], [3, 7, 0], [4, 9, 6]]
    for norms in series:
        state, _ = decide(policy, state, np.float32(norms))
    assert window.count_norms(state).tolist() == [3, 3, 1]
    np.testing.assert_array_equal(state.ordered[:, 1:-1], [
        [2, 3, 4], [5, 7, 9], [6, np.inf, np.inf],
    ])  # fmt: skip


# Trap 1: the rank of a quantile needs float64.

QUANTILES = (0.0, 0.05, 0.1, 0.25, 1 / 3, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1.0)


def streams(rng, steps):
    """Return norms of shape (steps, kinds): one column per kind of series."""
    steady = log_normal(rng, steps)
    return np.float32([
        steady,
        log_normal(rng, steps, log_std=1.0),
        np.sort(steady),
        np.sort(steady)[::-1],
        rng.integers(1, 5, steps),
        steady * 1e30,
        steady * 1e-30,
        np.full(steps, 3),
    ]).T  # fmt: skip


@pytest.mark.parametrize("length", [1, 2, 3, 10, 32, 100, 333, 1000])
def test_quantiles_are_exact(length):
    """The test covers a partly filled window, a full one, and one that wraps."""
    rng = np.random.default_rng(length)
    norms = streams(rng, min(2 * length + 3, length + 40))
    state = window.empty(norms.shape[1], length)
    for step, new in enumerate(norms, start=1):
        state = window.push(state, new)
        if length < 20 or step % 37 == 0 or step > len(norms) - 2:
            last = norms[max(step - length, 0) : step]
            for q in QUANTILES:
                expected = [linear_quantile(row, q) for row in last.T]
                np.testing.assert_array_equal(window.quantile(state, q), expected)


@given(
    norms=st.lists(positive(1e-20, 1e20), min_size=1, max_size=40),
    q=st.floats(0, 1) | st.sampled_from(QUANTILES),
)
def test_the_formula_is_that_of_numpy(norms, q):
    norms = np.float32(norms)
    formula = linear_quantile(norms, q)
    assert formula.dtype == np.float32
    # Three roundings in float32; those in float64 do not show.
    assert units_apart(formula, np.quantile(np.float64(norms), q)) <= 2
    if EXACT_RANK:
        assert formula == np.quantile(norms, q)


@pytest.mark.parametrize("length", [1, 2, 3, 50])
def test_one_row_of_a_window_is_bit_for_bit_that_row_among_others(length):
    rng = np.random.default_rng(length)
    norms = rng.choice(np.float32([0.5, 1, 1, 2, 3e38, 1.2e-38, 7]), size=200)
    alone, among = window.empty(1, length), window.empty(2, length)
    for norm in norms:
        alone = window.push(alone, np.array([norm]))
        among = window.push(among, np.array([norm, 2.0], np.float32))
        for one, two in zip(alone, among, strict=True):
            assert one[0].tobytes() == two[0].tobytes()
        for q in QUANTILES:
            one, two = window.quantile(alone, q), window.quantile(among, q)
            assert one[0].tobytes() == two[0].tobytes()


def test_a_window_that_was_pushed_to_is_as_it_was():
    before = window.push(window.empty(1, 3), np.float32([2.0]))
    kept = [array.copy() for array in before]
    window.push(before, np.float32([1.0]))
    for array, copy in zip(before, kept, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_a_rank_in_float32_would_be_wrong():
    """The positive control: the tests above notice a float32 rank."""
    norms = np.sort(log_normal(np.random.default_rng(0), 1000, 1.0)).astype(np.float32)
    state = filled(column(norms), 1000)
    worst = 0
    for q in (0.05, 0.1, 0.9, 0.95, 0.99, 0.999):
        rank = np.float32(len(norms) - 1) * np.float32(q)
        lower = int(rank)
        part = rank - np.float32(lower)
        naive = norms[lower] + (norms[lower + 1] - norms[lower]) * part
        exact = window.quantile(state, q)[0]
        assert exact == linear_quantile(norms, q)
        worst = max(worst, units_apart(naive, exact))
    assert worst > 20


def test_tables_are_made_once():
    """A new table in every step would be copied to the device in every step."""
    first = get_tables(ranks.compute_ranks, 50, 0.9)
    assert get_tables(ranks.compute_ranks, 50, 0.9) is first


# Trap 2: norms below the smallest normal number. (In XLA: test_parity.py.)


@pytest.mark.parametrize("tiny", [1e-45, 1e-39, 1.1754942e-38])
@pytest.mark.parametrize("length", [3, None])
def test_a_subnormal_norm_is_not_recorded(tiny, length):
    policy = Quantile(0.5, history_length=length)
    state, _ = decide(policy, policy.init(1), [2.0])
    after, decision = decide(policy, state, [tiny])
    assert_same(after, state)
    assert decision.norm.tolist() == [0.0]


def test_the_smallest_normal_norm_is_recorded():
    policy = Quantile(0.5, history_length=3)
    smallest = np.finfo(np.float32).tiny
    state, _ = decide(policy, policy.init(1), [smallest])
    assert state.ordered[0, 1] == smallest


# Trap 3: norms that are not finite.


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300])
@pytest.mark.parametrize("length", [1, 3, None])
def test_a_norm_that_is_not_finite_is_not_recorded(bad, length):
    policy = Quantile(0.5, history_length=length)
    state = policy.init(2)
    for norm in (1.0, bad, 2.0, bad, bad, 3.0):
        state, _ = decide(policy, state, [norm, 4.0])
    _, decision = decide(policy, state, [1.0, 1.0])
    kept = [1.0, 2.0, 3.0][-(length or 3) :]
    assert decision.threshold.tolist() == [linear_quantile(kept, 0.5), 4.0]


# Mean and deviation.


def levels(norms, deviations=1.0, **settings):
    """Return the threshold of MeanStd after these norms, and that of NumPy."""
    policy = MeanStd(deviations, **settings)
    state = policy.init(1)
    for norm in np.float32(norms):
        state, _ = decide(policy, state, norm[None])
    last = np.float64(np.float32(norms))
    if policy.history_length is not None:
        last = last[-policy.history_length :]
    expected = np.inf
    if len(last) >= max(2, policy.ddof + 1):
        values = np.log(last) if policy.log else last
        expected = values.mean() + deviations * values.std(ddof=policy.ddof)
        expected = np.exp(expected) if policy.log else expected
    return policy.limit(state).threshold[0], expected


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("ddof", [0, 1, 3])
@pytest.mark.parametrize("length", [2, 5, 40, None])
@fewer_examples
@given(
    norms=st.lists(positive(), max_size=60),
    deviations=st.sampled_from([0.0, 0.5, 1.0, 4.0]),
)
def test_mean_and_deviation_are_those_of_numpy(log, ddof, length, norms, deviations):
    settings = {"log": log, "ddof": ddof, "history_length": length}
    actual, expected = levels(norms, deviations, **settings)
    assert actual == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("scale", [1e-36, 1e-20, 1, 1e20, 3e30, 1e37])
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("deviations", [0.0, 1.0])
def test_no_raw_norm_is_squared(scale, log, deviations):
    """The square of 3e30 is infinite in float32, and the square of 1e-30 is 0."""
    norms = scale * log_normal(np.random.default_rng(0), 20)
    actual, expected = levels(norms, deviations, log=log)
    assert actual == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("deviations", [0.0, 1.0])
def test_one_window_may_hold_the_smallest_and_the_largest_norm(log, deviations):
    norms = [1.2e-38, 1e-20, 1.0, 1e20, 3e37]
    actual, expected = levels(norms, deviations * (0.5 if log else 1), log=log)
    assert actual == pytest.approx(expected, rel=5e-5)


LOSSES = [
    [0, 0, 0],
    [-3, -1, 2],
    [-3e30, -1e30, -2e30],
    [-2e38, 1, 2],
    [1e-30, -2e-30, 3e-30],
    [-0.5, 0.25, 0.125],
]


@pytest.mark.parametrize("losses", LOSSES)
def test_the_deviation_of_losses_is_that_of_numpy(losses):
    """Losses may be negative, and the lowest may have the largest magnitude."""
    losses = np.float64(np.float32(losses))
    middle, mean, std = window.mean_std(filled(column(losses), 4), log=False, ddof=1)
    assert middle + mean == pytest.approx(losses.mean(), rel=1e-5)
    assert std == pytest.approx(losses.std(ddof=1), rel=1e-5, abs=0)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("norm", [1.0, 3.0, 0.1, 1e30, 1.7e-20])
def test_equal_norms_have_no_deviation_and_are_their_own_mean(log, norm):
    """sum / n has a rounding error for some n, and would clip constant norms."""
    norm = np.float32(norm)
    for steps in (2, 3, 7, 49, 50, 51):
        for deviations in (0.0, 0.5, 2.0):
            actual, _ = levels([norm] * steps, deviations, log=log, history_length=50)
            if log:
                assert actual == pytest.approx(norm, rel=1e-5)
            else:
                assert actual == norm


@pytest.mark.parametrize("log", [False, True])
def test_one_norm_is_its_own_middle(log):
    results = window.mean_std(filled(column([3]), 4), log=log, ddof=0)
    assert [array.tolist() for array in results] == [[3.0], [0.0], [np.inf]]


def test_no_deviation_of_one_norm_and_no_nan():
    """In other packages the deviation of one value is NaN, and so are all gradients."""
    for ddof, least in [(0, 2), (1, 2), (2, 3), (5, 6)]:
        policy = MeanStd(2.0, ddof=ddof)
        state = policy.init(rows=1)
        thresholds = []
        for norm in np.arange(1, 10, dtype=np.float32):
            state, decision = decide(policy, state, norm[None])
            thresholds.append(decision.threshold[0])
        assert np.isposinf(thresholds[:least]).all()
        assert np.isfinite(thresholds[least:]).all()


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("length", [1, 5])
def test_an_empty_row_has_no_limit_and_one_entry(length, rows):
    """A single row has its own code; the result has the same shape."""
    state = window.empty(rows, length)
    for _ in range(2):
        results = window.quantile(state, 0.5), window.count_norms(state)
        assert [array.shape for array in results] == [(rows,)] * 2
        assert results[0].dtype == np.float32
        assert (results[0] == np.where(results[1] > 0, 3, np.inf)).all()
        state = window.push(state, np.full(rows, 3, np.float32))


# The size limit.


@pytest.mark.parametrize(
    ("rows", "length"), [(100_000, 1340), (3, 44_739_241), (1, 134_217_726)]
)
def test_a_window_up_to_one_gib_is_not_refused(rows, length):
    class Nothing:
        """A namespace that makes no arrays."""

        float32 = int32 = None

        def __getattr__(self, verb):
            return lambda *args, **kwargs: None

    assert 4 * rows * (2 * length + 3) <= 2**30
    window.empty(rows, length, Nothing())


def test_one_gib_is_no_more_than_one_gib():
    ranks.check_size(2**20, None, 2**10)
    with pytest.raises(ValueError, match=r"for 1048576 rows takes 1\.0 GiB"):
        ranks.check_size(2**20, None, 2**10 + 1)


def test_a_window_above_one_gib_is_refused():
    with pytest.raises(ValueError, match="GiB") as refused:
        Quantile(0.9, history_length=1000).init(rows=1_000_000)
    assert str(refused.value) == (
        "history_length=1000 for 1000000 rows takes 7.5 GiB, more than 1 GiB; shorten "
        "history_length, choose a coarser scope, or use StreamingQuantile, which needs "
        "one number per row"
    )
    with pytest.raises(ValueError, match=r"takes 1\.0 GiB, more than 1 GiB"):
        MeanStd(history_length=134_217_727).init(rows=1)


def test_a_window_of_known_contents():
    """For 1, 2, 6, 9 the median is 4, the mean 4.5, the deviation sqrt(41/3)."""
    norms = [50, 9, 1, 6, 2]
    assert window.quantile(filled(column(norms), 4), 0.5).tolist() == [4.0]
    threshold, _ = levels(norms, 2.0, history_length=4)
    assert threshold == pytest.approx(4.5 + 2 * math.sqrt(41 / 3))


# Loaded windows.


@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_a_window_has_no_fault(length, rows):
    state = window.empty(rows, length)
    for step in range(3 * length):
        assert state.find_problem() == ""
        state = window.push(state, np.float32(np.arange(rows) + 1 + step % 3))


def test_only_a_window_of_losses_may_hold_values_below_0():
    state = filled(column([-3, 0, 0.5]), 5)
    assert state.find_signed_problem() == ""
    assert "than it counts" in state.find_problem()
    assert "than it counts" in changed("ring", (0, 1), np.nan)(state).find_problem()
    assert filled(column([0.5]), 5).find_problem() == ""


# Four norms in a window of five: 3, 1, 4, 2.
BROKEN = {
    "a negative count": (changed("count", 0, -1), "counts -1 norms"),
    "a count too large": (changed("count", 0, 10), "counts 10 norms"),
    "a norm less": (changed("count", 0, 3), "than it counts"),
    "a norm more": (changed("count", 0, 5), "than it counts"),
    "a gap": (changed("ring", (0, 1), np.inf), "than it counts"),
    "NaN arrived": (changed("ring", (0, 1), np.nan), "than it counts"),
    "a norm of 0": (changed("ring", (0, 1), 0.0), "than it counts"),
    "out of order": (changed("ordered", (0, slice(1, 3)), [2, 1]), "ascending order"),
    "another norm": (changed("ordered", (0, 2), 2.5), "ascending order"),
    "NaN in order": (changed("ordered", (0, 2), np.nan), "ascending order"),
    "no lowest": (changed("ordered", (0, 0), 0.0), "ascending order"),
    "no highest": (changed("ordered", (0, -1), 9.0), "ascending order"),
}
broken = pytest.mark.parametrize(
    ("breaking", "expected_text"), BROKEN.values(), ids=list(BROKEN)
)


@broken
def test_a_broken_window_has_a_fault(breaking, expected_text):
    state = filled(column([3, 1, 4, 2]), 5)
    assert state.find_problem() == ""
    assert expected_text in breaking(state).find_problem()


@broken
@pytest.mark.needs("torch")
def test_a_broken_window_is_not_loaded(breaking, expected_text):
    import torch

    from autoclip_torch import QuantileClip

    clipper = QuantileClip([torch.nn.Parameter(torch.ones(1))], history_length=5)
    clipper.observe([3.0, 1.0, 4.0, 2.0])
    state, before = clipper.state_dict(), clipper.threshold()
    spoiled = breaking(
        window.Window(**{n: a.numpy() for n, a in state["states"][0].items()})
    )
    state["states"][0] = {n: torch.from_numpy(a) for n, a in spoiled._asdict().items()}
    with pytest.raises(ValueError, match=rf"states\[0\].*{expected_text}"):
        clipper.load_state_dict(state)
    assert torch.equal(clipper.threshold(), before)
