"""`decide` in runs of many steps: bad batches, bad starts, missing gradients.

The table in test_scale.py defines the result of one step for one row.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest

from autoclip_core import (
    Cap,
    Decision,
    Fixed,
    Limit,
    Policy,
    Quantile,
    Warmup,
    decide,
)
from autoclip_core.clipper.metrics import count_step, empty_tally
from autoclip_core.loss import LossDecision
from autoclip_core.policy import select_rows

from ..support.cases import (
    POLICIES,
    Series,
    assert_same,
    cut,
    each,
    every_policy,
    leaves,
    log_normal,
    run,
    series_of,
)

ROWS = 3


@pytest.fixture(scope="module")
def healthy():
    """Return 200 steps of three rows, with growing parameters."""
    rng = np.random.default_rng(4)
    norms = log_normal(rng, (200, ROWS), 0.5)
    return series_of(norms, param_norms=np.float32(5 + np.cumsum(norms, axis=0)))


def without(series, step):
    """Return the series without a step."""
    return Series(*(np.delete(field, step, axis=0) for field in series))


# A bad batch in a run of 200 steps.


@every_policy
def test_a_bad_batch_leaves_nothing_behind(policy, healthy):
    """All rows are bad: later thresholds equal those of a run without the batch."""
    norms = healthy.norms.copy()
    norms[100] = np.nan, np.inf, np.nan
    for nonfinite in ("zero", "propagate"):
        state, decision = run(
            policy, healthy._replace(norms=norms), nonfinite=nonfinite
        )
        expected_state, expected = run(policy, without(healthy, 100))
        assert_same(state, expected_state)
        for field, other in zip(decision, expected, strict=True):
            np.testing.assert_array_equal(np.delete(field, 100, axis=0), other)
        assert decision.finite[100].tolist() == [False] * ROWS
        assert (decision.scale[100] == (nonfinite == "propagate")).all()


@every_policy
def test_a_bad_row_records_nothing_and_the_others_do(policy, healthy):
    """One row is bad: it acts as a row without a gradient, the others as usual."""
    norms, observed = healthy.norms.copy(), healthy.observed.copy()
    norms[100, 1] = np.nan
    observed[100, 1] = False
    state, decision = run(policy, healthy._replace(norms=norms))
    absent_state, absent = run(policy, healthy._replace(observed=observed))
    assert_same(state, absent_state)
    np.testing.assert_array_equal(decision.threshold, absent.threshold)
    _, good = run(policy, healthy)
    np.testing.assert_array_equal(
        decision.threshold[:, [0, 2]], good.threshold[:, [0, 2]]
    )
    alone = Series(*(field[:, 1:2] for field in without(healthy, 100)))
    _, never = run(policy, alone)
    np.testing.assert_array_equal(
        np.delete(decision.threshold[:, 1], 100), never.threshold[:, 0]
    )
    assert decision.scale[100, 1] == 0
    assert np.isfinite(decision.threshold[-1]).all()


@every_policy
def test_skip_lets_no_row_record_a_bad_batch(policy, healthy):
    norms = healthy.norms.copy()
    norms[100, 1] = np.nan
    state, decision = run(policy, healthy._replace(norms=norms), nonfinite="skip")
    expected_state, expected = run(policy, without(healthy, 100))
    assert_same(state, expected_state)
    np.testing.assert_array_equal(
        np.delete(decision.threshold, 100, axis=0), expected.threshold
    )
    assert (decision.scale[100] == 0).all()
    assert decision.skipped[100].all()
    assert decision.finite[100].tolist() == [True, False, True]


STATEFUL = {c: p for c, p in POLICIES.items() if leaves(p.init(1))}


@each(STATEFUL)
def test_the_batch_would_have_left_something(policy, healthy):
    """The positive control: a finite norm in its place changes the state."""
    healthy = cut(healthy, 50)
    norms = healthy.norms.copy()
    norms[-1] = norms[-1] / 3
    state, _ = run(policy, healthy._replace(norms=norms))
    expected, _ = run(policy, without(healthy, 49))
    with pytest.raises(AssertionError):
        assert_same(state, expected)


# The start of a run in float16: the loss scale is too large at first.


@every_policy
@pytest.mark.parametrize("start", [[np.inf, np.inf], [np.nan, np.inf, np.nan]], ids=str)
def test_a_start_with_bad_norms(policy, start):
    rng = np.random.default_rng(1)
    good = np.concatenate([[1.0, 1.0], log_normal(rng, 30)])
    state, decision = run(policy, series_of(np.concatenate([start, good])))
    expected_state, expected = run(policy, series_of(good))
    assert_same(state, expected_state)
    np.testing.assert_array_equal(decision.threshold[len(start) :], expected.threshold)
    np.testing.assert_array_equal(decision.scale[len(start) :], expected.scale)
    current = "include_current=True" in repr(policy)
    first = np.inf if current else expected.threshold[0, 0]
    assert (decision.threshold[: len(start)] == first).all()


def test_no_threshold_yet_is_infinite_and_never_zero():
    for policy in STATEFUL.values():
        _, decision = decide(policy, policy.init(2), [0.0, np.nan], param_norms=[1, 1])
        assert (decision.threshold > 0.01).all()
        assert decision.scale.tolist() == [1.0, 0.0]
    _, decision = decide(Quantile(), Quantile().init(1), [1e30])
    assert decision.threshold.tolist() == [np.inf]


# A row without a gradient, or with one of exactly 0.


@every_policy
def test_an_absent_gradient_is_not_a_norm_of_zero(policy, healthy):
    """Neither is recorded, but only the norm of zero is observed."""
    healthy = cut(healthy, 60)
    idle = np.arange(60) % 3 == 1
    zero, absent = healthy.norms.copy(), healthy.observed.copy()
    zero[idle, 0] = 0
    absent[idle, 0] = False
    zero_state, zero_decision = run(policy, healthy._replace(norms=zero))
    state, decision = run(policy, healthy._replace(observed=absent))
    assert_same(zero_state, state)
    np.testing.assert_array_equal(zero_decision.threshold, decision.threshold)
    assert (zero_decision.norm[idle, 0] == 0).all()
    assert np.isnan(decision.norm[idle, 0]).all()
    assert decision.finite.all()
    assert not decision.clipped[idle, 0].any()
    assert (decision.scale[idle, 0] == 1).all()


@every_policy
@pytest.mark.parametrize("nonfinite", ["zero", "skip"])
def test_what_is_in_an_unobserved_row_does_not_matter(policy, nonfinite, healthy):
    healthy = cut(healthy, 60)
    observed = healthy.observed.copy()
    observed[::4, 2] = False
    series = healthy._replace(observed=observed)
    _, expected = run(policy, series)
    norms = healthy.norms.copy()
    norms[::4, 2] = np.resize([np.nan, np.inf, 0.0, 1e30, 1.0], 15)
    _, decision = run(policy, series._replace(norms=norms), nonfinite=nonfinite)
    assert_same(decision, expected)


def test_observed_may_be_a_list_and_none_means_all():
    policy = Fixed(1.0)
    _, decision = decide(policy, policy.init(2), [2.0, 2.0], observed=[True, False])
    assert decision.scale.tolist() == [0.5, 1.0]
    _, decision = decide(policy, policy.init(2), [2.0, 2.0])
    assert decision.scale.tolist() == [0.5, 0.5]


def test_the_number_of_rows_may_be_none_at_all():
    """A group whose parameters are all excluded has no rows."""
    for policy in POLICIES.values():
        empty = np.zeros((0,), np.float32)
        state, decision = decide(policy, policy.init(0), empty, param_norms=empty)
        assert [field.shape for field in decision] == [(0,)] * len(Decision._fields)
        state, _ = decide(policy, state, empty, param_norms=empty)


@every_policy
@pytest.mark.parametrize("nonfinite", ["zero", "skip", "propagate"])
def test_a_row_alone_is_decided_as_two_equal_rows(policy, nonfinite):
    """NumPy computes a single row with scalars, and several rows with arrays."""
    norms = [2.0, 0.5, np.nan, 9.0, 0.0, 1e-40, np.inf, 1e39, 3e38, 1e-37, 7.0, 2.0]
    twice = np.repeat(np.array(norms)[:, None], 2, axis=1)
    series = series_of(np.ones(twice.shape))._replace(norms=twice)
    series.observed[[1, 6]] = False
    state, decision = run(policy, series, nonfinite=nonfinite)
    alone = Series(*(field[:, :1] for field in series))
    expected_state, expected = run(policy, alone, nonfinite=nonfinite)
    for array, other in zip(leaves(state), leaves(expected_state), strict=True):
        np.testing.assert_array_equal(array[:1], other, strict=True)
    for field, other in zip(decision, expected, strict=True):
        np.testing.assert_array_equal(field[:, :1], other, strict=True)


@pytest.mark.parametrize("norm", [0.5, 3.0, np.nan, 1e300])
def test_a_row_alone_has_the_precise_scale_and_the_loss_of_two(norm):
    no = np.array([False])
    for loss in (None, LossDecision(no, no, finite=~no, skipped=~no)):
        alone, expected = (
            decide(Fixed(1.0), (), norms, precise_norms=norms, loss=loss)[1]
            for norms in (np.full(1, norm), np.full(2, norm))
        )
        for field, other in zip(alone, expected, strict=True):
            np.testing.assert_array_equal(field, other[:1], strict=True)


@pytest.mark.parametrize("name", ["where", "any"])
def test_a_single_row_needs_no_function_of_arrays(monkeypatch, name):
    """An operation on a scalar takes a tenth of the time of one on an array."""
    calls, function = [], getattr(np, name)
    monkeypatch.setattr(np, name, lambda *x: calls.append(x) or function(*x))
    policy = Fixed(1.0)
    for rows in (1, 2):
        calls.clear()
        _, decision = decide(policy, policy.init(rows), np.full(rows, 2.0))
        count_step(empty_tally(rows), decision)
        assert (len(calls) > 0) is (rows == 2)


def test_a_state_is_copied_only_where_some_rows_keep_theirs():
    """In NumPy a copy of every window would cost more than the step."""
    old, new = (Quantile(history_length=2).init(2) for _ in range(2))
    assert select_rows(np.array([True, True]), new, old) is new
    assert select_rows(np.array([True, False]), old, old) is old
    assert select_rows(np.array([True, False]), new, old) is not new


# A policy that a user writes.


class Largest(NamedTuple):
    norm: np.ndarray


@dataclass(frozen=True, repr=False)
class Record(Policy):
    """Clip to the largest norm so far; a policy needs only three methods."""

    factor: float = 1.0

    def init(self, rows, xp=np):
        return Largest(xp.zeros((rows,), dtype=xp.float32))

    def limit(self, state, norms=None, *, param_norms=None, xp=np):
        known = xp.where(state.norm > 0, self.factor * state.norm, float("inf"))
        return Limit(known, known)

    def record(self, state, norms, limit, xp=np):
        return Largest(xp.maximum(state.norm, norms))


def test_a_policy_of_ones_own_gets_all_the_rules():
    policy = Record()
    norms = [2.0, np.nan, np.inf, 0.0, 1e-40, 3.0, 6.0]
    state, decision = run(policy, series_of(norms))
    assert decision.threshold[:, 0].tolist() == [np.inf, 2, 2, 2, 2, 2, 3]
    assert decision.scale[:, 0] == pytest.approx([1, 0, 0, 1, 1, 2 / 3, 0.5])
    assert state.norm.tolist() == [6.0]
    assert repr(policy) == "Record(factor=1.0)"
    assert policy.expected_clip_rate is None
    assert not policy.needs_param_norms


def test_a_policy_of_ones_own_goes_into_combinators():
    policy = Cap(Warmup(Record(2.0), steps=2, threshold=1.0), max_norm=3.0)
    _, decision = run(policy, series_of([1.0, 1.25, 4.0, 4.0]))
    assert decision.threshold[:, 0].tolist() == [1, 1, 2.5, 3]
    assert repr(policy) == (
        "Cap(policy=Warmup(policy=Record(factor=2.0), steps=2, threshold=1.0), "
        "max_norm=3.0)"
    )
