"""Tests for stacks that clip by themselves: they ask for the threshold first."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from autoclip_core import Drop, Fixed, Quantile, StreamingQuantile
from autoclip_core.clipper.metrics_checks import CHANGES
from autoclip_torch import Clipper, NormClip, QuantileClip, StandardClip

from ..support.cases import policy_of
from ..support.torch_models import (
    CLIPPERS,
    backward,
    batches,
    bits,
    check_same,
    clippers_and_scopes,
    every_clipper,
    small_model,
)
from ..support.traces import oracle

NAN, INF = math.nan, math.inf
AHEAD = [
    name
    for name, case in CLIPPERS.items()
    if "include_current" not in case.code and "Drop" not in case.code
]
"""The clippers whose threshold is known before the norm."""


def one_row(make=QuantileClip, **keywords):
    return make([nn.Parameter(torch.ones(2))], **keywords)


@clippers_and_scopes(AHEAD)
def test_threshold_then_observe_is_a_step(case, scope):
    """Thresholds, decisions, states and metrics of a run are equal bit for bit."""
    model = small_model()
    steps, watches = case(model, scope=scope), case(model, scope=scope)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    clipped = 0
    for batch in batches(50):
        backward(model, batch)
        state = watches.state_dict()
        ahead = watches.threshold()
        check_same(watches.state_dict(), state)
        decision = steps.step()
        check_same(ahead, decision.threshold)
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        check_same(watches.observe(decision.norm), decision)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            assert torch.equal(bits(parameter.grad), bits(gradient))
        check_same(watches.state_dict(), steps.state_dict())
        metrics = watches.metrics(per_row=True)
        assert metrics.pop("clip/other_clippers") == 1.0  # it shares the parameters
        assert metrics == steps.metrics(per_row=True)
        clipped += int(decision.clipped.sum())
        optimizer.step()
    assert clipped > 3


@every_clipper
def test_a_series_is_its_steps(case):
    """The decision is that of the last norm, the state that after all norms."""
    model = small_model()
    series = np.random.default_rng(0).lognormal(size=(40, 6)).astype(np.float32)
    at_once, singly = case(model, scope="parameter"), case(model, scope="parameter")
    for norms in series:
        last = singly.observe(norms)
    check_same(at_once.observe(series), last)
    check_same(at_once.state_dict(), singly.state_dict())
    assert at_once.metrics() == singly.metrics()
    assert at_once.metrics()["clip/steps"] == 40


SERIES = [4.0, 1.0, 3.0, 2.0, 5.0]


@pytest.mark.parametrize(
    "series",
    [
        SERIES,
        tuple(SERIES),
        [4, 1, 3, 2, 5],
        [torch.tensor(norm) for norm in SERIES],
        np.array(SERIES),
        np.array(SERIES, np.float16),
        np.array(SERIES, np.int64)[:, None],
        torch.tensor(SERIES),
        torch.tensor(SERIES, requires_grad=True),
        torch.tensor(SERIES, dtype=torch.bfloat16)[:, None],
    ],
)
def test_a_series_may_be_any_sequence_of_numbers(series):
    clipper = one_row(quantile=0.5, history_length=100)
    decision = clipper.observe(series)
    assert decision.threshold.tolist() == [2.5]
    assert decision.clipped.tolist() == [True]
    assert clipper.threshold().tolist() == [3.0]


@pytest.mark.parametrize(
    "one", [7, 7.0, [7.0], [[7.0]], np.float32(7), torch.tensor(7)]
)
def test_one_number_is_one_step(one):
    clipper = one_row(quantile=0.5)
    assert clipper.threshold().tolist() == [INF]
    assert clipper.observe(one).norm.tolist() == [7]
    assert clipper.threshold().tolist() == [7]


def test_yesterday_s_norms_start_today_s_run():
    """The last `history_length` norms count, as in `np.quantile`."""
    yesterday = np.random.default_rng(1).lognormal(size=300).astype(np.float32)
    clipper = one_row(quantile=0.9, history_length=50)
    clipper.observe(yesterday)
    expected = np.quantile(yesterday[-50:], 0.9)
    assert clipper.threshold().item() == pytest.approx(expected, rel=1e-6)
    standard = one_row(StandardClip, deviations=1.0, history_length=32)
    standard.observe(range(1, 33))
    mean, deviation = 16.5, 9.380831519646859
    assert standard.threshold().item() == pytest.approx(mean + deviation, rel=1e-5)


@pytest.mark.parametrize("code", ["StreamingQuantile(0.9)", "ZScore(warmup_steps=5)"])
def test_a_series_gives_what_the_oracle_gives(code):
    norms = np.random.default_rng(2).lognormal(size=200).astype(np.float32)
    policy = oracle().evaluate(code)
    for norm in norms.tolist():
        policy.learn(norm)
    clipper = one_row(Clipper, policy=policy_of(code))
    clipper.observe(norms)
    expected = policy.limit(0.0, 1.0)[0]
    assert clipper.threshold().item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("bad", [-1.0, -1e-30, NAN, INF, -INF, 1e39])
def test_a_negative_norm_counts_as_not_finite(bad):
    """Some stacks report an overflow like this. The history does not record it."""
    clipper = one_row(quantile=0.5)
    clipper.observe([1.0, 3.0])
    decision = clipper.observe(bad)
    assert (decision.finite.item(), decision.scale.item()) == (False, 0)
    assert not math.isfinite(decision.norm.item())
    assert clipper.threshold().tolist() == [2]
    clipper.observe([5.0, bad, 7.0])
    assert clipper.threshold().tolist() == [4]
    metrics = clipper.metrics()
    assert (metrics["clip/nonfinite_total"], metrics["clip/steps"]) == (2, 6)


@every_clipper
@pytest.mark.parametrize("scope", ["global", "parameter"])
def test_observing_none_records_nothing(case, scope):
    """DeepSpeed reports no norm before the first update, nor in plain float32."""
    without_none, with_none = (case(small_model(), scope=scope) for _ in range(2))
    norms = np.random.default_rng(3).lognormal(size=(6, len(without_none.names)))
    with_none.observe(None)
    without_none.observe(norms)
    for norm in norms:
        with_none.observe(norm)
        decision = with_none.observe(None)
        assert decision.norm.isnan().all()
        assert decision.finite.all()
        assert not decision.clipped.any()
        assert not decision.skipped.any()
        assert (decision.scale == 1).all()
    steps = without_none.state_dict(), with_none.state_dict()
    assert [state["tally"].pop("steps").item() for state in steps] == [6, 13]
    check_same(*steps)


def test_observing_none_does_not_raise():
    clipper = one_row(nonfinite="raise")
    assert clipper.observe(None).finite.all()
    assert clipper.metrics()["clip/steps"] == 1
    assert clipper.threshold().tolist() == [INF]


def test_a_norm_of_zero_is_counted_and_not_recorded():
    clipper = one_row(quantile=0.5)
    assert clipper.observe([2.0, 0.0, -0.0, 0.0]).finite.all()
    assert clipper.threshold().tolist() == [2]
    assert clipper.metrics()["clip/steps"] == 4
    assert clipper.state_dict()["tally"]["observed"].tolist() == [4]


@pytest.mark.parametrize(
    ("nonfinite", "second"), [("zero", [3.0, 2.0]), ("skip", [2.0, 2.0])]
)
def test_a_bad_row_of_a_step(nonfinite, second):
    """The other rows record, unless the update is cancelled."""
    weights = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    clipper = QuantileClip(weights, quantile=0.5, nonfinite=nonfinite)
    decision = clipper.observe([[2.0, 2.0], [4.0, NAN]])
    assert clipper.threshold().tolist() == second
    assert decision.skipped.tolist() == [nonfinite == "skip"] * 2
    assert clipper.metrics()["clip/skipped_total"] == (nonfinite == "skip")


def test_policies_that_need_the_norm_can_observe():
    """The clippers refuse only `threshold()`, which comes before the norm."""
    current = one_row(quantile=0.5, include_current=True)
    assert current.observe([1.0, 3.0, 8.0]).threshold.tolist() == [3]
    drops = one_row(Clipper, policy=Drop(Quantile(0.5)))
    decision = drops.observe([1.0, 3.0, 8.0])
    assert (decision.threshold.item(), decision.scale.item()) == (2, 0)


def test_a_drop_with_a_clip_policy_has_a_threshold_before_the_norm_is_known():
    """The stack clips to it; what lies above the drop level is counted afterwards."""
    clipper = one_row(Clipper, policy=Drop(Fixed(9.0), clip=Quantile(0.5)))
    clipper.observe([1.0, 3.0])
    assert clipper.threshold().tolist() == [2.0]
    decision = clipper.observe(10.0)
    assert decision.dropped.tolist() == [True]
    assert clipper.threshold().tolist() == [3.0]
    assert clipper.metrics()["clip/dropped_total"] == 1


def test_clipping_with_torch_at_the_clipper_s_threshold():
    """The whole recipe, in which torch's own function clips."""
    model, twin = small_model(), small_model()
    steps = NormClip(twin, max_norm=0.7, max_threshold=0.5)
    clipper = NormClip(model, max_norm=0.7, max_threshold=0.5)
    clipped = 0
    for batch in batches(30):
        backward(model, batch)
        backward(twin, batch)
        limit = clipper.threshold().item()
        assert limit == 0.5
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        decision = clipper.observe(norm)
        clipped += bool(decision.clipped)
        expected = steps.step()
        torch.testing.assert_close(decision.norm, expected.norm)
        for one, other in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad)
    assert 3 < clipped < 30


def test_parameters_lists_given_and_added_parameters():
    model, later = small_model(), nn.Parameter(torch.ones(2))
    clipper = QuantileClip(model, exclude="*bias")
    clipper.add_param_group({"params": [later]})
    expected = [*model.parameters(), later]
    assert list(map(id, clipper.parameters)) == list(map(id, expected))


def test_the_threshold_is_a_copy():
    clipper = one_row(Clipper, policy=StreamingQuantile())
    clipper.observe([1.0, 2.0])
    kept = clipper.threshold()
    clipper.threshold().fill_(0)
    assert clipper.threshold().item() == kept.item() > 1
    clipper.observe(9.0)
    assert kept.item() != clipper.threshold().item()


@pytest.mark.parametrize("is_attached", [False, True])
def test_a_clipper_that_nothing_steps_warns(is_attached):
    """The optimizer that it is attached to does not step; or nothing calls step()."""
    model = torch.nn.Linear(2, 1)
    clipper = NormClip(model, 1.0)
    unused = torch.optim.SGD(model.parameters(), lr=0.1)
    if is_attached:
        clipper.attach(unused)

    def train():
        """Take the step of an optimizer that torch does not know."""
        model(torch.ones(2)).sum().backward()
        for p in model.parameters():
            p.data -= 0.1 * p.grad
        clipper.metrics()

    for _ in range(CHANGES):
        train()
    with pytest.warns(UserWarning, match=r"no step.* call clipper\.step\(\) before"):
        train()
    train()


def test_a_clipper_that_steps_after_many_micro_batches_does_not_warn():
    model = torch.nn.Linear(2, 1)
    clipper = QuantileClip(model)
    for _ in range(2 * CHANGES):
        model(torch.ones(2)).sum().backward()
        clipper.metrics()
    clipper.step()
    assert clipper.metrics()["clip/steps"] == 1
    clipper.reset()
    for _ in range(2 * CHANGES):
        torch.nn.init.normal_(model.weight)
        assert clipper.metrics()["clip/steps"] == 0
