"""Tests of what a clipper does with NaN, infinity and missing gradients."""

import copy
import math
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

from autoclip_core import Cap, Drop, Fixed, MeanStd, Quantile, ZScore
from autoclip_torch import Clipper, NormClip, QuantileClip, ZClip

from ..support.cases import policy_of
from ..support.torch_models import (
    CLIPPERS,
    SCOPES,
    backward,
    batches,
    bits,
    check_same,
    clippers_and_scopes,
    every_clipper,
    every_scope,
    gradients_of,
    small_model,
    spoil,
)
from ..support.torch_reference import Reference, arrays, check_decision, check_gradients

NAN, INF = math.nan, math.inf
BAD = [NAN, INF, -INF]


def three_policies(model, **keywords):
    """Return a clipper with three policies, after twelve steps."""
    clipper = Clipper(
        [
            {"params": model[0].named_parameters()},
            {"params": model[2].parameters(), "policy": Fixed(0.05)},
            {"params": model[3].parameters(), "policy": MeanStd(1.0)},
        ],
        Quantile(0.5, history_length=10),
        **keywords,
    )
    for batch in batches(12):
        backward(model, batch)
        clipper.step()
    return clipper


def spoilt(bad=NAN, places=(1,)):
    """Return a model, its parameters, and a function that makes some gradients bad."""
    model = small_model()
    parameters = list(model.parameters())

    def spoil():
        backward(model, next(batches(1, seed=9)))
        for place in places:
            parameters[place].grad.view(-1)[0] = bad
        return [parameter.grad.clone() for parameter in parameters]

    return model, parameters, spoil


ROWS = {"parameter": [1], "group": [0], "global": [0], "unit": [3]}
"""The row of parameter 1, the first bias, at each scope."""


@every_scope
@pytest.mark.parametrize("bad", BAD)
def test_zero_removes_the_row_and_no_other(scope, bad):
    """The row records nothing; the others are clipped and record as usual."""
    model, parameters, spoil = spoilt(bad)
    clipper = CLIPPERS["QuantileClip"](model, scope=scope)
    shapes = [tuple(p.shape) for p in parameters]
    reference = Reference(shapes, "Quantile(0.8, history_length=20)", scope)
    for batch in batches(12):
        backward(model, batch)
        reference.step(arrays(gradients_of(parameters)), arrays(parameters))
        clipper.step()
    before = spoil()
    state = clipper.state_dict()["states"][0]
    decision = clipper.step()
    check_decision(decision, reference.step(arrays(before), arrays(parameters)))
    (row,) = ROWS[scope]
    assert decision.finite.logical_not().nonzero().tolist() == [[row]]
    assert decision.scale[row] == 0
    assert not parameters[1].grad.any()
    assert all(parameter.grad.isfinite().all() for parameter in parameters)
    after = clipper.state_dict()["states"][0]
    for name in ("ring", "ordered", "count"):
        check_same(after[name][row], state[name][row])
    recorded = (after["count"] != state["count"]).tolist()
    assert recorded == [place != row for place in range(len(recorded))]


@every_scope
@pytest.mark.parametrize("bad", BAD)
def test_propagate_leaves_the_row_unchanged(scope, bad):
    model, parameters, spoil = spoilt(bad)
    clipper = NormClip(model, max_norm=1e-3, scope=scope, nonfinite="propagate")
    before = spoil()
    decision = clipper.step()
    (row,) = ROWS[scope]
    assert decision.scale[row] == 1
    assert not decision.clipped[row]
    assert torch.equal(bits(parameters[1].grad), bits(before[1]))
    changed = [
        not torch.equal(bits(parameter.grad), bits(gradient))
        for parameter, gradient in zip(parameters, before, strict=True)
    ]
    # A row with the NaN is not scaled; the other rows are.
    alone = scope in ("global", "group")
    assert changed == [not alone and place != 1 for place in range(6)]


def check_untouched(parameters, before):
    for parameter, gradient in zip(parameters, before, strict=True):
        assert torch.equal(bits(parameter.grad), bits(gradient))


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("scope", ["parameter", "group", "unit"])
def test_raise_changes_nothing_and_names_the_row(scope, bad):
    """The clipper has several policies. No gradient and no state changes."""
    model, parameters, spoil = spoilt(bad)
    clipper = three_policies(model, scope=scope, nonfinite="raise")
    before, state, metrics = spoil(), clipper.state_dict(), clipper.metrics()
    name = {"parameter": "bias", "group": "group 0", "unit": "bias"}[scope]
    words = f"the gradient norm of {name} is not finite and nonfinite=.raise.; to go on"
    with pytest.raises(FloatingPointError, match=words):
        clipper.step()
    check_untouched(parameters, before)
    check_same(clipper.state_dict(), state)
    assert clipper.metrics() == metrics
    parameters[1].grad.zero_()
    assert clipper.step().finite.all()


def test_raise_names_three_rows_and_counts_the_others():
    model, _, spoil = spoilt(places=(0, 1, 3, 4, 5))
    clipper = NormClip(model, max_norm=1.0, scope="parameter", nonfinite="raise")
    spoil()
    with pytest.raises(FloatingPointError, match=r"of 0.weight, 0.bias, 2.bias and 2"):
        clipper.step()


@every_scope
@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_an_excluded_parameter_raises_and_skips_nothing(nonfinite, scope):
    model, parameters, spoil = spoilt()
    before = spoil()
    settings = {"scope": scope, "nonfinite": nonfinite, "exclude": "0.bias"}
    decision = NormClip(model, max_norm=1e3, **settings).step()
    assert decision.finite.all()
    assert not decision.skipped.any()
    check_untouched(parameters, before)


# Skip.


def one_policy(model, **keywords):
    """Return a clipper with one policy, after twelve steps."""
    clipper = QuantileClip(model, history_length=10, **keywords)
    for batch in batches(12):
        backward(model, batch)
        clipper.step()
    return clipper


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("scope", ["parameter", "group", "unit"])
@pytest.mark.parametrize("make", [one_policy, three_policies])
def test_skip_removes_all_gradients_and_no_policy_records(make, scope, bad):
    """This holds even if the bad row belongs to another policy."""
    model, parameters, spoil = spoilt(bad)
    clipper = make(model, scope=scope, nonfinite="skip")
    spoil()
    state = clipper.state_dict()
    decision = clipper.step()
    assert gradients_of(parameters) == [None] * 6
    assert decision.skipped.all()
    assert not decision.scale.any()
    after = clipper.state_dict()
    check_same(after["states"], state["states"])
    counts = {name: count.tolist() for name, count in after["tally"].items()}
    assert counts["steps"] == state["tally"]["steps"] + 1
    assert [counts[n] for n in ("nonfinite", "skipped", "skipped_in_a_row")] == [1] * 3


def test_skip_removes_the_gradients_of_excluded_parameters_too():
    """They belong to the same update, which would go on without the others."""
    model, parameters, spoil = spoilt()
    clipper = QuantileClip(model, exclude=["3"], nonfinite="skip")
    spoil()
    clipper.step()
    assert gradients_of(parameters) == [None] * 6


@pytest.mark.parametrize("cancelled_by", ["nonfinite", "Drop"])
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW])
def test_a_skipped_update_leaves_the_optimizer_bit_for_bit(optimizer, cancelled_by):
    """Parameters, moments, step counters and weight decay are unchanged."""
    model, parameters, spoil = spoilt(NAN if cancelled_by == "nonfinite" else 1e4)
    adam = optimizer(parameters, lr=0.1, weight_decay=0.1)
    if cancelled_by == "Drop":
        clipper = Clipper(model, Drop(Quantile(1.0), action="skip"))
    else:
        clipper = QuantileClip(model, nonfinite="skip")
    for batch in batches(5, spread=0.0):
        backward(model, batch)
        clipper.step()
        adam.step()
    kept = copy.deepcopy((model.state_dict(), adam.state_dict()))
    spoil()
    assert clipper.step().skipped.all()
    adam.step()
    check_same(dict(model.state_dict()), dict(kept[0]))
    check_same(adam.state_dict(), kept[1])
    backward(model, next(batches(1)))
    assert not parameters[0].grad.isnan().any()
    adam.step()
    moved = zip(kept[0].values(), model.state_dict().values(), strict=True)
    assert not any(torch.equal(old, new) for old, new in moved)


@pytest.mark.parametrize("action", ["zero", "skip"])
def test_drop_zeroes_its_row_or_cancels_the_update(action):
    """ "zero" drops the row; "skip" cancels the update, and every policy records."""
    model, parameters, spoil = spoilt(1e4)
    reference = Reference(
        [tuple(p.shape) for p in parameters],
        [f"Drop(Quantile(0.7), action='{action}')", "Quantile(0.5)"],
        "parameter",
        groups=[range(2), range(2, 6)],
    )
    clipper = Clipper(
        [
            {
                "params": model[0].parameters(),
                "policy": Drop(Quantile(0.7), action=action),
            },
            {"params": [*model[2].parameters(), *model[3].parameters()]},
        ],
        Quantile(0.5),
    )
    dropped = 0
    for step, batch in enumerate(batches(40)):
        if step % 5 == 4:
            spoil()
        else:
            backward(model, batch)
        before = arrays(gradients_of(parameters))
        decision = clipper.step()
        expected = reference.step(before, arrays(parameters))
        check_decision(decision, expected)
        check_gradients(parameters, expected)
        dropped += int(decision.clipped[:2].sum())
        assert decision.skipped.any() == (
            action == "skip" and bool(decision.clipped[:2].any())
        )
    assert dropped > 5
    skipped = clipper.metrics()["clip/skipped_total"]
    assert (skipped > 3) if action == "skip" else (skipped == 0)


def test_a_cap_clips_500_healthy_updates_and_drop_skips_the_spike():
    """Every norm exceeds the cap. The cap must not lower the level of `Drop`."""
    norms = 3 * np.exp(0.1 * np.random.default_rng(0).standard_normal(501))
    norms[-1] = 60.0
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    policy = Cap(Drop(ZScore(4.0), action="skip"), max_norm=1.0)
    clipper = Clipper([weight], policy, scope="global")
    for norm in norms:
        weight.grad = torch.full((1,), float(norm))
        clipper.step()
        optimizer.step()
    # Each healthy update is clipped to 1, and the last one is skipped.
    assert weight.item() == pytest.approx(-500, rel=1e-6)
    totals = ("skipped_total", "dropped_total", "clip_rate")
    metrics = clipper.metrics()
    assert [metrics[f"clip/{name}"] for name in totals] == [1, 1, 1]


@pytest.mark.parametrize("by", ["nonfinite", "Drop"])
def test_too_many_skips_in_a_row_are_an_error(by):
    """An update that is not skipped restarts the count; `metrics` raises, too."""
    weight = nn.Parameter(torch.ones(2))
    clipper = Clipper(
        [weight],
        Fixed(10.0) if by == "nonfinite" else Drop(Fixed(10.0), action="skip"),
        nonfinite="skip",
        max_consecutive_skips=2,
    )
    bad = NAN if by == "nonfinite" else 100.0

    def step(value):
        weight.grad = torch.tensor([1.0, value])
        return clipper.step()

    for value in [bad, bad, 1.0, bad, bad, 2.0, 3.0, bad, bad]:
        assert bool(step(value).skipped) == (value is bad)
        assert clipper.metrics()["clip/steps"] > 0
    words = "3 updates in a row were skipped, more than max_consecutive_skips=2: "
    with pytest.raises(RuntimeError, match=words):
        step(bad)
    assert weight.grad is None
    with pytest.raises(RuntimeError, match=words):
        clipper.metrics()
    assert not step(1.0).skipped
    assert clipper.metrics()["clip/skipped_total"] == 7


@pytest.mark.parametrize("by", ["nonfinite", "Drop", "loss", "attached", "on a device"])
def test_a_run_that_skips_every_update_warns_once(by):
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    policy = Drop(Fixed(10.0), action="skip") if by == "Drop" else Fixed(10.0)
    losses = {"loss_policy": Fixed(1.0)} if by == "loss" else {"nonfinite": "skip"}
    clipper = Clipper([weight], policy, **losses)
    if by == "attached":
        clipper.attach(optimizer)
    if by == "on a device":
        clipper._stepper.move_states = lambda gradients: None
        clipper._policy_states.move_to(torch.device("cpu"))

    def take_steps(count, *, good=False):
        for _ in range(count):
            weight.grad = torch.full((2,), {"Drop": 1e3, "loss": 1.0}.get(by, NAN))
            if good:
                weight.grad = torch.ones(2)
            if by != "attached":
                loss = None if by != "loss" else 0.5 if good else 9.0
                clipper.step(loss=loss)
            if by == "on a device":
                clipper.metrics()
            optimizer.step()

    for _ in range(4):
        take_steps(49)
        take_steps(1, good=True)
    take_steps(49)
    words = "50 updates in a row were skipped.* max_consecutive_skips"
    with pytest.warns(UserWarning, match=words):
        take_steps(1)
    take_steps(60)


def test_a_dry_run_and_a_limit_of_skips_do_not_warn():
    weight = nn.Parameter(torch.ones(2))
    keywords = {"nonfinite": "skip", "max_norm": 1.0}
    dry = NormClip([weight], **keywords, dry_run=True)
    limited = NormClip([weight], **keywords, max_consecutive_skips=60)
    for clipper in (dry, limited):
        for _ in range(60):
            weight.grad = torch.full((2,), NAN)
            clipper.step()
        assert clipper.metrics()["clip/skipped_total"] == 60


def test_a_limit_of_skips_is_kept_through_a_checkpoint():
    weight = nn.Parameter(torch.ones(2))
    keywords = {"nonfinite": "skip", "max_consecutive_skips": 1, "max_norm": 1.0}
    clipper, other = [NormClip([weight], **keywords) for _ in range(2)]
    weight.grad = torch.full((2,), NAN)
    clipper.step()
    other.load_state_dict(clipper.state_dict())
    weight.grad = torch.full((2,), NAN)
    with pytest.raises(RuntimeError, match="2 updates in a row"):
        other.step()


# One bad batch in a run.

BATCH = 40
RUN = 90
"""Both parts are longer than the histories, of at most 30 norms."""


def thresholds_of(case, scope, steps, bad=None, optimizer=torch.optim.SGD, **keywords):
    """Train; return the thresholds of all steps, and the final weights.

    Args:
      steps: the numbers of the batches, in order.
      bad: the number of the batch whose loss is NaN.
    """
    model = small_model()
    clipper = case(model, scope=scope, **keywords)
    trainer = optimizer(model.parameters(), lr=0.02)
    data, thresholds = list(batches(RUN, spread=0.5)), []
    for step in steps:
        x, y, factor = data[step]
        backward(model, (x, y, factor * NAN if step == bad else factor))
        thresholds.append(clipper.step().threshold)
        trainer.step()
    return thresholds, list(model.state_dict().values())


def check_as_if_never_seen(case, scope, **keywords):
    saw, weights = thresholds_of(case, scope, range(RUN), bad=BATCH, **keywords)
    others = [step for step in range(RUN) if step != BATCH]
    never, expected = thresholds_of(case, scope, others, **keywords)
    check_same(saw[:BATCH] + saw[BATCH + 1 :], never)
    check_same(weights, expected)
    assert all(weight.isfinite().all() for weight in weights)
    assert len(torch.stack(saw[-50:]).unique()) > 10 or "Fixed" in case.code


@every_clipper
def test_a_run_with_a_batch_of_nan_equals_the_run_without_it(case):
    """All gradients are NaN in one of 90 steps. The later thresholds and weights equal
    those of a run without that batch, bit for bit."""
    check_as_if_never_seen(case, case.default_scope)


@pytest.mark.parametrize(
    ("name", "scope"),
    [*product(["QuantileClip"], SCOPES), ("ZClip", "unit"), ("AdaGC", "group")],
)
def test_the_same_holds_at_every_scope_with_adam_and_skip(name, scope):
    check_as_if_never_seen(
        CLIPPERS[name], scope, nonfinite="skip", optimizer=torch.optim.Adam
    )


def lone_run(case, scope, seed, without=None):
    """Train one small layer on its own batches; return its thresholds."""
    layer, data = lone_layer(seed), list(batches(RUN, seed, spread=0.5))
    clipper = case(layer, scope=scope)
    trainer = torch.optim.SGD(layer.parameters(), lr=0.02)
    thresholds = []
    for step, batch in enumerate(data):
        if step != without:
            backward(layer, batch)
            thresholds.append(clipper.step().threshold)
            trainer.step()
    return thresholds


def lone_layer(seed):
    torch.manual_seed(seed)
    return nn.Linear(4, 2)


LONE = ["QuantileClip", "AGC", "ZClip", "AdaGC", "StreamingQuantile", "Drop, and clip"]
"""A clipper for each class of state; core/test_laws.py tests every policy."""


@clippers_and_scopes(LONE, scopes=["parameter", "group", "unit"])
def test_nan_in_one_layer_changes_no_other_row(case, scope):
    """Three layers share one clipper, and one layer gets a batch of NaN. That layer
    continues like one without the batch, the others like layers without any NaN."""
    layers = [lone_layer(seed) for seed in range(3)]
    clipper = case([{"params": layer} for layer in layers], scope=scope)
    parameters = [p for layer in layers for p in layer.parameters()]
    trainer = torch.optim.SGD(parameters, lr=0.02)
    data = [list(batches(RUN, seed, spread=0.5)) for seed in range(3)]
    by_layer = []
    for step in range(RUN):
        for seed, layer in enumerate(layers):
            x, y, factor = data[seed][step]
            bad = (seed, step) == (1, BATCH)
            backward(layer, (x, y, factor * NAN if bad else factor))
        by_layer.append(clipper.step().threshold.chunk(3))
        trainer.step()
    for seed in range(3):
        without = BATCH if seed == 1 else None
        thresholds = [
            threshold[seed]
            for step, threshold in enumerate(by_layer)
            if step != without
        ]
        check_same(thresholds, lone_run(case, scope, seed, without=without))


def test_a_run_that_starts_with_overflows_is_not_harmed():
    """Every fp16 run starts with norms like [inf, inf, 1, 1, ...]."""
    weight = nn.Parameter(torch.ones(4))
    norms = [INF, INF] + [1.0] * 20 + [8.0]
    for name, first in [("QuantileClip", 3), ("StandardClip", 4), ("ZClip", 12)]:
        clipper = CLIPPERS[name]([weight])
        for step, norm in enumerate(norms):
            weight.grad = torch.tensor([norm, 0.0, 0.0, 0.0])
            decision = clipper.step()
            known = step >= first
            assert decision.threshold.item() == pytest.approx(1 if known else INF)
            expected = 0 if norm == INF else 1
            assert weight.grad.norm().item() == pytest.approx(expected)
        assert clipper.metrics()["clip/nonfinite_total"] == 2


@pytest.mark.parametrize("nonfinite", ["zero", "skip", "propagate"])
def test_with_a_loss_scaler_the_weights_stay_finite(nonfinite):
    """The usual recipe: unscale, clip, and let the scaler skip overflows."""
    model = small_model()
    clipper = ZClip(model, z=1.0, warmup_steps=5, nonfinite=nonfinite)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22)
    reference = Reference([()] * 6, "ZScore(1.0, warmup_steps=5)", "global")
    bad = 0
    for x, y, factor in batches(60, spread=0.5):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = factor * (model(x) - y).square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        gradients = arrays(gradients_of(model.parameters()))
        decision = clipper.step()
        if all(np.isfinite(gradient).all() for gradient in gradients):
            threshold = reference.step(gradients, gradients).threshold
            np.testing.assert_allclose(decision.threshold, threshold, rtol=1e-5)
        else:
            bad += 1
        scaler.step(optimizer)
        scaler.update()
    assert bad > 3
    assert clipper.metrics()["clip/nonfinite_total"] == bad
    assert decision.threshold.isfinite().all()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("scope", ["parameter", "group", "unit"])
@pytest.mark.parametrize("nonfinite", ["zero", "skip", "propagate"])
@pytest.mark.filterwarnings("ignore:the gradients of .* were not finite")
def test_several_policies_in_a_rough_run(nonfinite, scope):
    """NaN, infinities, zeros and missing gradients, at random."""
    model, rng = small_model(), np.random.default_rng(3)
    parameters = list(model.parameters())
    codes = [
        "Quantile(0.7, history_length=15)",
        "ZScore(1.0, warmup_steps=5)",
        "Drop(MeanStd(1.5), action='skip')",
    ]
    groups = [
        {"params": layer, "policy": policy_of(code)}
        for layer, code in zip((model[0], model[2], model[3]), codes, strict=True)
    ]
    clipper = Clipper(groups, Fixed(1.0), scope=scope, nonfinite=nonfinite)
    reference = Reference(
        [tuple(p.shape) for p in parameters],
        codes,
        scope,
        groups=[range(2), range(2, 4), range(4, 6)],
        nonfinite=nonfinite,
    )
    for batch in batches(80):
        backward(model, batch)
        spoil(parameters, rng)
        before = arrays(gradients_of(parameters))
        decision = clipper.step()
        expected = reference.step(before, arrays(parameters))
        check_decision(decision, expected)
        check_gradients(parameters, expected)
    metrics = clipper.metrics()
    assert metrics["clip/nonfinite_total"] > 5
    assert metrics["clip/skipped_total"] > 2


# Missing gradients.


@pytest.mark.filterwarnings("ignore:the clipper has not received a gradient yet")
@every_clipper
def test_a_step_without_any_gradient_counts_and_changes_nothing_else(case):
    models = [small_model(), small_model()]
    clippers = [case(model) for model in models]
    for batch in batches(30):
        for model in models:
            backward(model, batch)
        models[1].zero_grad()
        decision = clippers[1].step()
        assert decision.norm.isnan().all()
        assert decision.finite.all()
        assert not decision.clipped.any()
        assert decision.scale.tolist() == [1] * len(decision.scale)
        assert gradients_of(models[1].parameters()) == [None] * 6
        backward(models[1], batch)
        check_same(*(clipper.step() for clipper in clippers))
        for model in models:
            torch.optim.SGD(model.parameters(), lr=0.02).step()
    one, two = (clipper.state_dict()["tally"] for clipper in clippers)
    assert (two["steps"], one["steps"]) == (60, 30)
    check_same(two["observed"], one["observed"])


@clippers_and_scopes(scopes=["parameter", "unit"])
def test_an_unfrozen_parameter_continues_with_its_history(case, scope):
    """Its rows do not change without a gradient, and then continue like the oracle."""
    model = small_model()
    parameters = list(model.parameters())
    clipper = case(model, scope=scope)
    shapes = [tuple(p.shape) for p in parameters]
    reference = Reference(shapes, case.code, scope)
    for step, batch in enumerate(batches(45)):
        model[0].requires_grad_(not 15 <= step < 30)
        backward(model, batch)
        gradients = arrays(gradients_of(parameters))
        assert (gradients[0] is None) == (15 <= step < 30)
        decision = clipper.step()
        check_decision(decision, reference.step(gradients, arrays(parameters)))
    rows = {"parameter": 1, "unit": 3}[scope]
    assert clipper.state_dict()["tally"]["observed"].tolist()[: rows + 1] == (
        [30] * (rows + 1)
    )
