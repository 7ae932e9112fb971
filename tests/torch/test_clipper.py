"""Tests of what a clipper measures, decides, scales and reports at each step."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays as any_array
from torch import nn

from autoclip_core import Cap, Decision, Fixed, Quantile
from autoclip_torch import (
    AGC,
    AdaGC,
    Clipper,
    NormClip,
    QuantileClip,
    StandardClip,
    ValueClip,
    ZClip,
)

from ..support.cases import fewer_examples, linear_quantile, policy_of
from ..support.torch_models import (
    CLIPPERS,
    SCOPES,
    backward,
    batches,
    bits,
    clippers_and_scopes,
    every_clipper,
    every_scope,
    gradients_of,
    small_model,
    spoil,
    train,
)
from ..support.torch_reference import (
    Reference,
    arrays,
    check_close,
    check_decision,
    check_gradients,
    values_of,
)

STEPS = 70


# Clippers and scopes, over a run.


@clippers_and_scopes()
def test_a_run_follows_the_formulas(case, scope):
    """At each step, norms, thresholds, scales and gradients equal the reference's.

    Gradients within their limit are unchanged bit for bit, and something is clipped.
    """
    model = small_model()
    parameters = list(model.parameters())
    clipper = case(model, scope=scope)
    reference = Reference([tuple(p.shape) for p in parameters], case.code, scope)
    clipped, left_alone = 0, 0
    for _, before, decision in train(model, clipper, STEPS):
        expected = reference.step(arrays(before), arrays(parameters))
        check_decision(decision, expected)
        check_gradients(parameters, expected)
        check_identity(reference.rows, before, parameters, decision)
        clipped += int(expected.clipped.sum())
        left_alone += int((expected.scale == 1).sum())
    assert clipped >= 5
    assert left_alone >= 5
    assert clipper.metrics()["clip/steps"] == STEPS


def check_identity(rows, before, parameters, decision):
    """Check that a row with scale 1 is unchanged bit for bit."""
    for row, scale in zip(rows, decision.scale.tolist(), strict=True):
        for place, index in row if scale == 1 else []:
            after = parameters[place].grad[index]
            assert torch.equal(bits(after), bits(before[place][index]))


@clippers_and_scopes(["QuantileClip", "ZClip", "AdaGC", "Drop, to skip"])
@pytest.mark.parametrize("nonfinite", ["zero", "skip", "propagate"])
@pytest.mark.filterwarnings("ignore:the gradients of .* were not finite")
def test_a_rough_run_follows_the_formulas_too(case, scope, nonfinite):
    """Some gradients are NaN, infinite, zero or missing, at random."""
    rng = np.random.default_rng(7)
    model = small_model()
    parameters = list(model.parameters())
    clipper = case(model, scope=scope, nonfinite=nonfinite)
    shapes = [tuple(p.shape) for p in parameters]
    reference = Reference(shapes, case.code, scope, nonfinite=nonfinite)
    past = []
    for step, batch in enumerate(batches(STEPS)):
        backward(model, batch)
        spoil(parameters, rng)
        before = arrays(gradients_of(parameters))
        decision = clipper.step()
        expected = reference.step(before, arrays(parameters))
        check_decision(decision, expected)
        check_gradients(parameters, expected)
        past.append(expected)
        if step % 4 == 0:
            check_metrics(clipper, past)
    total = clipper.metrics()
    assert total["clip/nonfinite_total"] > 3
    cancels = nonfinite == "skip" or "skip" in case.code
    assert (total["clip/skipped_total"] > 3) == cancels


def check_metrics(clipper, past):
    """Check the metrics against their formulas, for all decisions so far."""
    last = past[-1]
    present = ~np.isnan(last.norm) | ~last.finite
    known = present & last.finite
    is_lost = not last.finite.all() and not known.any()
    norm = math.nan if is_lost else math.sqrt(np.sum(last.norm[known] ** 2))
    scaled = last.norm[known] * last.scale[known]
    after = math.nan if is_lost else math.sqrt(np.sum(scaled**2))
    finite = last.threshold[np.isfinite(last.threshold)]
    observed = [~np.isnan(step.norm) | ~step.finite for step in past]
    expected = {
        "clip/norm": norm,
        "clip/threshold": np.median(finite) if finite.size else math.inf,
        "clip/scale": 1.0 if norm == 0 else after / norm,
        "clip/norm_after": after,
        "clip/clipped": np.sum(last.clipped) / max(np.sum(present), 1),
        "clip/clip_rate": sum(np.sum(step.clipped) for step in past)
        / max(np.sum(observed), 1),
        "clip/nonfinite_total": sum(not step.finite.all() for step in past),
        "clip/skipped_total": sum(step.skipped.any() for step in past),
        "clip/dropped_total": sum(step.dropped.any() for step in past),
        "clip/steps": len(past),
        "clip/rows": len(clipper.names),
    }
    metrics = clipper.metrics()
    assert all(type(value) is float for value in metrics.values())
    assert list(metrics) == list(expected)
    assert metrics == pytest.approx(expected, rel=1e-5, abs=0, nan_ok=True)
    per_row = clipper.metrics(per_row=True)
    rates = sum(step.clipped for step in past) / np.maximum(sum(observed), 1)
    columns = {
        "norm": last.norm,
        "threshold": last.threshold,
        "scale": last.scale,
        "clip_rate": rates,
    }
    assert len(per_row) == len(metrics) + 4 * len(clipper.names)
    for kind, column in columns.items():
        row = [per_row[f"clip/{kind}/{name}"] for name in clipper.names]
        check_close(row, column, rtol=1e-5)


@pytest.mark.parametrize("scope", ["parameter", "unit"])
def test_quantiles_are_those_of_numpy_bit_for_bit(scope):
    """The quantiles are taken of the measured norms."""
    model = small_model()
    clipper = QuantileClip(model, quantile=0.85, history_length=20, scope=scope)
    norms = []
    for _, _, decision in train(model, clipper, STEPS):
        for row, threshold in enumerate(decision.threshold.tolist()):
            window = [norm[row].item() for norm in norms[-20:]]
            expected = linear_quantile(window, 0.85) if window else math.inf
            assert threshold == expected
        norms.append(decision.norm)


# Laws, for any gradients.

SPECIAL = [0.0, -0.0, 1e-45, 1e-38, 1e-20, 1.0, 1e10, 1e30, 3e38, math.inf, math.nan]
numbers = st.floats(-100, 100, width=32) | st.sampled_from(np.float32(SPECIAL).tolist())
gradient_steps = st.lists(
    st.tuples(any_array(np.float32, (3, 2), elements=numbers), st.booleans()),
    min_size=1,
    max_size=12,
)


@fewer_examples
@every_scope
@given(steps=gradient_steps)
@pytest.mark.filterwarnings("ignore:the gradients of ")
@pytest.mark.parametrize("name", ["QuantileClip", "ZClip", "AdaGC", "AGC", "Drop"])
@pytest.mark.filterwarnings("ignore:the gradients of .* were not finite")
def test_a_finite_gradient_stays_finite(name, scope, steps):
    """This holds next to non-finite rows, and after any number of them."""
    weight = nn.Parameter(torch.ones(3, 2))
    other = nn.Parameter(torch.ones(2))
    clipper = CLIPPERS[name]([weight, other], scope=scope)
    rows = Reference([(3, 2), (2,)], "Fixed(1.0)", scope).rows
    for gradient, also in steps:
        weight.grad = torch.tensor(gradient)
        other.grad = torch.tensor(gradient[0]) if also else None
        before = arrays([weight.grad, other.grad])
        decision = clipper.step()
        after = arrays([weight.grad, other.grad])
        assert not decision.threshold.isnan().any()
        for place, row in enumerate(rows):
            check_row(values_of(row, before), values_of(row, after), decision, place)


def check_row(before, after, decision, row):
    """Check one row before and after a step."""
    threshold, scale = decision.threshold[row].item(), decision.scale[row].item()
    assert 0 <= scale <= 1
    if before is None:
        assert after is None
    elif not np.isfinite(before).all():
        assert (scale, bool(decision.finite[row])) == (0, False)
        assert not after.any()
    elif scale == 1:
        assert before.tobytes() == after.tobytes()
    else:
        assert np.isfinite(after).all()
        norm, norm_before = (np.linalg.norm(v.astype(float)) for v in (after, before))
        # A subnormal scale and its product are rounded coarsely.
        assert norm <= threshold * (1 + 1e-5) + 1e-45 * norm_before + 1e-44


# The scopes, and when two of them are equal.


def same_gradients(models, batch):
    """Compute the first model's gradients, and copy them to the other models."""
    backward(models[0], batch)
    for model in models[1:]:
        pairs = zip(model.parameters(), models[0].parameters(), strict=True)
        for parameter, source in pairs:
            parameter.grad = None if source.grad is None else source.grad.clone()


def check_same(clippers, models, steps=40, change=lambda parameters, step: None):
    """Check that all clippers give the same decisions and gradients, bit for bit."""
    clipped = 0
    for step, batch in enumerate(batches(steps)):
        same_gradients(models, batch)
        for model in models:
            change(list(model.parameters()), step)
        decisions = [clipper.step() for clipper in clippers]
        for decision in decisions[1:]:
            for field, other in zip(decision, decisions[0], strict=True):
                torch.testing.assert_close(field, other, rtol=0, atol=0, equal_nan=True)
        for model in models[1:]:
            pairs = zip(model.parameters(), models[0].parameters(), strict=True)
            for parameter, other in pairs:
                assert (parameter.grad is None) == (other.grad is None)
                if other.grad is not None:
                    assert torch.equal(bits(parameter.grad), bits(other.grad))
        clipped += int(decisions[0].clipped.sum())
    assert clipped > 3


def one_parameter():
    """Return a model whose only parameter is one unit."""
    torch.manual_seed(3)
    return nn.Linear(4, 1, bias=False)


@every_clipper
def test_one_parameter_of_one_unit_is_the_same_at_every_scope(case):
    models = [one_parameter() for _ in SCOPES]
    pairs = zip(models, SCOPES, strict=True)
    clippers = [case(model, scope=scope) for model, scope in pairs]
    check_same(clippers, models)


@every_clipper
def test_one_group_is_global(case):
    models = [small_model() for _ in range(3)]
    check_same(
        [
            case(models[0], scope="group"),
            case([{"params": models[1]}], scope="group"),
            case(models[2], global_clipping=True),
        ],
        models,
    )


@every_clipper
def test_groups_of_one_parameter_are_per_parameter(case):
    models = [small_model() for _ in range(2)]
    groups = [{"params": parameter} for parameter in models[1].parameters()]
    check_same(
        [case(models[0], scope="parameter"), case(groups, scope="group")], models
    )


@pytest.mark.parametrize("scope", ["global", "group"])
def test_tensors_of_one_row_keep_their_direction(scope):
    """Norms of 30 and 40 under a threshold of 10 become 6 and 8, not 10 and 10."""
    weights = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    clipper = QuantileClip(weights, quantile=0.5, scope=scope)
    clipper.observe(10.0)
    weights[0].grad, weights[1].grad = torch.tensor([[30.0, 0.0], [0.0, 40.0]])
    assert clipper.step().norm.tolist() == [50]
    assert [w.grad.norm().item() for w in weights] == pytest.approx([6, 8])


@pytest.mark.parametrize(
    ("scope", "names"),
    [
        ("global", ["global"]),
        ("group", ["group 0"]),
        ("parameter", ["0.weight", "0.bias", "1.weight"]),
        ("unit", ["0.weight[0]", "0.weight[1]", "0.weight[2]", "0.bias", "1.weight"]),
    ],
)
def test_rows_are_named(scope, names):
    """The name of a parameter with one unit has no number."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1, bias=False))
    clipper = QuantileClip(model, scope=scope)
    assert clipper.names == names
    clipper.names.clear()
    assert clipper.names == names
    backward_on_ones(model)
    assert all(field.shape == (len(names),) for field in clipper.step())


def backward_on_ones(model):
    model(torch.ones(1, next(model.parameters()).shape[1])).sum().backward()


def test_parameters_without_names_are_numbered():
    model = nn.Linear(2, 2)
    assert Clipper(model.parameters(), policy_of("Fixed(1.0)")).names == [
        "parameter 0",
        "parameter 1",
    ]


def test_no_two_rows_share_a_name():
    """Two submodules each have a `weight`; the metrics list both."""
    encoder, decoder = nn.Linear(2, 2), nn.Linear(2, 1, bias=False)
    clipper = NormClip(
        [{"params": encoder}, {"params": decoder}], max_norm=1.0, scope="parameter"
    )
    assert clipper.names == ["weight (row 0)", "bias", "weight (row 2)"]
    backward_on_ones(encoder)
    clipper.step()
    per_row = clipper.metrics(per_row=True)
    assert per_row["clip/norm/weight (row 0)"] == 2
    assert math.isnan(per_row["clip/norm/weight (row 2)"])


DEFAULTS = [
    (QuantileClip, {}, "parameter"),
    (StandardClip, {}, "parameter"),
    (AdaGC, {}, "parameter"),
    (ValueClip, {"clip_value": 1.0}, "parameter"),
    (Clipper, {"policy": policy_of("Fixed(1.0)")}, "parameter"),
    (AGC, {}, "unit"),
    (ZClip, {}, "global"),
    (NormClip, {"max_norm": 1.0}, "global"),
]
every_default = pytest.mark.parametrize(("make", "keywords", "default"), DEFAULTS)


@every_default
def test_each_clipper_has_its_default_scope(make, keywords, default):
    model = small_model()
    assert make(model, **keywords).scope == default


@every_default
def test_global_clipping_is_the_older_spelling(make, keywords, default):
    """True is the scope "global"; False is the default scope, or "parameter"."""
    model = small_model()
    clipper = make(model, **keywords, global_clipping=True)
    assert (clipper.scope, clipper.names) == ("global", ["global"])
    spared = "parameter" if default == "global" else default
    assert make(model, **keywords, global_clipping=False).scope == spared
    for scope in SCOPES:
        both = {"scope": scope, "global_clipping": scope == "global"}
        assert make(model, **keywords, **both).scope == scope


@every_scope
def test_two_spellings_that_disagree_are_refused(scope):
    wrong = scope != "global"
    words = f"global_clipping must be in agreement with scope='{scope}', got {wrong}"
    with pytest.raises(ValueError, match=words):
        QuantileClip(small_model(), scope=scope, global_clipping=wrong)


# Other promises of a clipper.


def test_a_decision_is_of_tensors_with_one_entry_per_row():
    model = small_model()
    clipper = QuantileClip(model)
    backward(model, next(batches(1)))
    decision = clipper.step()
    assert isinstance(decision, Decision)
    for field in decision[:3]:
        assert (field.dtype, field.shape) == (torch.float32, (6,))
    for field in decision[3:]:
        assert (field.dtype, field.shape) == (torch.bool, (6,))


@every_clipper
def test_a_decision_is_a_copy(case):
    """Later steps do not change a decision, and writing to it changes no later step."""
    models = [small_model(), small_model()]
    clippers = [case(model) for model in models]
    kept = []
    for batch in batches(40):
        same_gradients(models, batch)
        written, decision = [clipper.step() for clipper in clippers]
        assert torch.equal(written.threshold, decision.threshold)
        for field in (*written, clippers[0].state_dict()["tally"]["observed"]):
            field.fill_(0)
        kept.append((decision, [field.clone() for field in decision]))
    for decision, copies in kept:
        for field, copy in zip(decision, copies, strict=True):
            torch.testing.assert_close(field, copy, rtol=0, atol=0, equal_nan=True)


@every_clipper
@pytest.mark.parametrize("nonfinite", ["zero", "skip"])
def test_a_dry_run_decides_the_same_and_touches_nothing(case, nonfinite):
    models = [small_model(), small_model()]
    wet = case(models[0], nonfinite=nonfinite)
    dry = case(models[1], nonfinite=nonfinite, dry_run=True)
    touched = 0
    for step, batch in enumerate(batches(40)):
        same_gradients(models, batch)
        for model in models:
            if step % 7 == 3:
                model[0].weight.grad[0, 0] = math.nan
        before = [p.grad.clone() for p in models[1].parameters()]
        for field, other in zip(wet.step(), dry.step(), strict=True):
            torch.testing.assert_close(field, other, rtol=0, atol=0, equal_nan=True)
        assert dry.metrics() == pytest.approx(wet.metrics(), nan_ok=True, rel=0)
        for parameter, gradient in zip(models[1].parameters(), before, strict=True):
            assert torch.equal(bits(parameter.grad), bits(gradient))
        touched += any(
            w.grad is None or not torch.equal(w.grad, d.grad)
            for w, d in zip(models[0].parameters(), models[1].parameters(), strict=True)
        )
    assert touched > 5


@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.enable_grad, torch.inference_mode]
)
def test_the_grad_mode_does_not_matter(mode):
    models = [small_model(), small_model()]
    plain, other = [QuantileClip(model, history_length=10) for model in models]
    for batch in batches(20):
        same_gradients(models, batch)
        expected = plain.step()
        with mode():
            decision = other.step()
        assert torch.equal(decision.threshold, expected.threshold)
        assert not decision.scale.requires_grad
        for parameter, like in zip(*map(nn.Module.parameters, models), strict=True):
            assert torch.equal(parameter.grad, like.grad)


@pytest.mark.parametrize("scope", ["parameter", "unit"])
def test_gradients_with_an_autograd_graph_are_clipped(scope):
    """`backward(create_graph=True)` leaves such gradients."""
    weight = nn.Parameter(torch.tensor([[3.0, 4.0], [6.0, 8.0]]))
    clipper = NormClip([weight], max_norm=1.0, scope=scope)
    gradient = (weight * weight).sum() / 2
    weight.grad = torch.autograd.grad(gradient, weight, create_graph=True)[0]
    assert weight.grad.requires_grad
    decision = clipper.step()
    norms = [5.0, 10.0] if scope == "unit" else [math.sqrt(125)]
    assert decision.norm.tolist() == pytest.approx(norms)
    expected = weight.detach() * decision.scale.reshape(-1, 1)
    torch.testing.assert_close(weight.grad.detach(), expected)


@every_clipper
def test_reset_restarts_a_run(case):
    models = [small_model(), small_model()]
    used, new = [case(model) for model in models]
    for batch in batches(30, seed=5):
        backward(models[0], batch)
        used.step()
    used.reset()
    assert used.metrics() == new.metrics()
    check_same([used, new], models)


def test_before_the_first_step_there_is_nothing_to_report():
    clipper = QuantileClip(small_model())
    metrics = clipper.metrics()
    assert metrics["clip/threshold"] == math.inf
    assert metrics["clip/scale"] == 1
    assert metrics["clip/rows"] == len(clipper.names)
    zero = set(metrics) - {"clip/threshold", "clip/scale", "clip/rows"}
    assert [metrics[name] for name in zero] == [0] * 8


# The value clip, which is no policy.


@every_scope
def test_a_value_clip_clamps_and_reports(scope):
    model = small_model()
    parameters = list(model.parameters())
    clipper = ValueClip(model, clip_value=0.5, scope=scope)
    rows = Reference([tuple(p.shape) for p in parameters], "Fixed(1.0)", scope).rows
    clipped = left_alone = 0
    for _, before, decision in train(model, clipper, STEPS):
        limit = np.float32(0.5)
        after = [np.clip(g, -limit, limit) for g in arrays(before)]
        for parameter, expected in zip(parameters, after, strict=True):
            np.testing.assert_array_equal(parameter.grad, expected)
        for place, row in enumerate(rows):
            values, kept = values_of(row, arrays(before)), values_of(row, after)
            norm, norm_after = (float(np.linalg.norm(v)) for v in (values, kept))
            assert decision.norm[place].item() == pytest.approx(norm, rel=1e-6)
            ratio = norm_after / norm
            assert decision.scale[place].item() == pytest.approx(ratio, rel=1e-5)
            changed = bool((values != kept).any())
            assert bool(decision.clipped[place]) == changed
            clipped += changed
            left_alone += not changed
        assert (decision.threshold == limit).all()
        assert clipper.metrics()["clip/norm_after"] == pytest.approx(
            float(np.linalg.norm(np.concatenate([a.ravel() for a in after]))), rel=1e-5
        )
    assert clipped > 5
    assert left_alone > 5


def test_a_clipper_prints_its_arguments_its_scope_and_its_rows():
    model, cap = small_model(), Cap(Quantile(0.9), max_norm=10.0)
    shown = {
        "QuantileClip(quantile=0.9, scope='parameter', rows=6)": QuantileClip(model),
        "QuantileClip(quantile=0.5, history_length=10, scope='global', "
        "nonfinite='skip', max_threshold=2.0, exclude=['*bias'], dry_run=True, "
        "rows=1)": QuantileClip(
            model,
            quantile=0.5,
            history_length=10,
            scope="global",
            nonfinite="skip",
            max_threshold=2.0,
            exclude="*bias",
            dry_run=True,
        ),
        "AGC(clipping=0.01, rule='layer', scope='unit', rows=6)": AGC(
            model, rule="layer"
        ),
        "NormClip(max_norm=1.0, scope='global', rows=1)": NormClip(model, max_norm=1.0),
        "ValueClip(clip_value=0.5, scope='parameter', rows=6)": ValueClip(
            model, clip_value=0.5
        ),
        "Clipper(policy=Cap(policy=Quantile(quantile=0.9, history_length=1000, "
        "include_current=False), max_norm=10.0), scope='group', rows=1)": Clipper(
            model, cap, scope="group"
        ),
        "NormClip(max_norm=1.0, scope='global', loss_policy=Fixed(max_norm=2.0), "
        "max_consecutive_skips=9, rows=1)": NormClip(
            model, 1.0, loss_policy=Fixed(2.0), max_consecutive_skips=9
        ),
    }
    for text, clipper in shown.items():
        assert repr(clipper) == text
