"""The running moments of all norms: compared with NumPy, and their memory."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoclip_core import MeanStd, decide
from autoclip_core.history import moments

from ..support.cases import fewer_examples, leaves, log_normal, positive, run, series_of


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("ddof", [0, 1, 3])
@fewer_examples
@given(norms=st.lists(positive(1e-30, 1e30), min_size=1, max_size=60))
def test_they_are_those_of_numpy(log, ddof, norms):
    state = moments.empty(1)
    for norm in np.float32(norms):
        state = moments.push(state, norm[None])
    middle, mean, std = moments.mean_std(state, log=log, ddof=ddof)
    values = np.float64(np.float32(norms))
    values = np.log(values) if log else values
    centre = np.exp(values.mean()) if log else values.mean()
    assert (mean == 0).all()
    assert middle[0] == pytest.approx(centre, rel=1e-6)
    if len(norms) >= max(2, ddof + 1):
        expected = values.std(ddof=ddof)
        assert std[0] == pytest.approx(expected, rel=1e-6, abs=1e-12 * abs(centre))
    else:
        assert np.isposinf(std[0])


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("deviations", [0.0, 2.0])
@given(norm=positive(1.2e-38, 3.4e38))
def test_equal_norms_are_their_own_threshold(log, deviations, norm):
    """Without exact equality a constant run would be clipped in every step."""
    policy = MeanStd(deviations, history_length=None, log=log)
    _, decision = run(policy, series_of([norm] * 20))
    assert (decision.threshold[2:] == np.float32(norm)).all()
    assert not decision.clipped.any()


@pytest.mark.parametrize("log", [False, True])
def test_the_memory_does_not_grow(log):
    policy = MeanStd(history_length=None, log=log)
    start = policy.init(2)
    state, _ = run(policy, series_of(log_normal(np.random.default_rng(0), (3000, 2))))
    sizes = [[leaf.nbytes for leaf in leaves(s)] for s in (start, state)]
    assert sizes[0] == sizes[1]
    assert sum(sizes[1]) == 2 * 36


def test_nothing_is_lost_where_deviations_are_small():
    """A sum of squares would cancel: 1e6 ± 1e-1 in float64 leaves few digits."""
    norms = np.float32(1e6 + np.arange(-8, 8) / 8)
    norms = np.tile(norms, 2000)
    state = moments.empty(1)
    for norm in norms:
        state = moments.push(state, norm[None])
    _, _, std = moments.mean_std(state, log=False, ddof=1)
    assert std[0] == pytest.approx(np.float64(norms).std(ddof=1), rel=1e-6)


def test_rows_that_do_not_record_keep_their_moments():
    policy = MeanStd(1.0, history_length=None, ddof=0)
    state = policy.init(2)
    for new in [[1, 0], [3, np.nan], [0, 5], [np.inf, 7]]:
        state, _ = decide(policy, state, np.float32(new))
    assert state.count.tolist() == [2, 2]
    assert policy.limit(state).threshold.tolist() == [3.0, 7.0]


def test_moments_are_kept_on_the_cpu():
    with pytest.raises(ValueError, match="history_length must be a number"):
        moments.empty(1, None, object())


BROKEN = {
    "a negative count": {"count": np.int32([-1])},
    "a mean that is NaN": {"mean": np.float64([[np.nan, 0.5]])},
    "a negative mean": {"mean": np.float64([[-1, 0.5]])},
    "an infinite mean": {"mean": np.float64([[1, np.inf]])},
    "squares that are NaN": {"squares": np.float64([[0, np.nan]])},
    "negative squares": {"squares": np.float64([[-1, 0]])},
}


@pytest.mark.parametrize("parts", BROKEN.values(), ids=BROKEN)
def test_broken_moments_have_a_fault(parts):
    state = moments.push(moments.empty(1), np.float32([2.0]))
    assert state.find_problem() == ""
    assert state._replace(**parts).find_problem()


def test_only_moments_of_losses_may_have_a_mean_below_0():
    negative, small = (
        moments.push(moments.empty(1), np.float32([value])) for value in (-2, 0.5)
    )
    assert small.find_problem() == ""
    assert negative.find_signed_problem() == ""
    assert "mean" in negative.find_problem()


def test_one_broken_count_among_sound_ones_is_a_fault():
    state = moments.push(moments.empty(2), np.float32([2.0, 3.0]))
    assert state.find_problem() == ""
    broken = state._replace(count=np.int32([1, -1]))
    assert "got -1" in broken.find_problem()
