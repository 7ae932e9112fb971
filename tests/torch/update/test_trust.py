"""`TrustClip`: what its two halves do in training, with numbers; copies and states."""

import copy
import gc
import io
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from autoclip_core import ClipLog, Fixed, MeanStd
from autoclip_torch import Clipper, NormClip, TrustClip, UpdateClipper

from ...support.torch_optimizers import (
    OPTIMIZERS,
    assert_same_state,
    assert_same_weights,
    batches,
    network,
    train,
)

# Gradients have the norm 1 in most steps, as after another clip.
pytestmark = pytest.mark.filterwarnings("ignore:the clipper measures norms of 1 ")

RATIO, FLOOR = 0.01, 0.2


def rms(tensor):
    return math.sqrt(np.mean(np.float64(tensor.detach()) ** 2))


def train_on(gradients, weights, optimizer, after=lambda: None):
    """Train on given gradients; return the weights before and after each step."""
    path = [weights.detach().clone()]
    for gradient in gradients:
        weights.grad = torch.as_tensor(gradient).float()
        optimizer.step()
        after()
        path.append(weights.detach().clone())
    return path


def vector(start=1.0, size=8):
    """Return a module with one parameter."""
    model = nn.Module()
    model.w = nn.Parameter(torch.full((size,), start))
    return model


def directions(steps, size=8):
    generator = np.random.default_rng(0)
    x = generator.standard_normal((steps, size))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def spikes(steps):
    """Norms of 1, and 300 in every 20th step from step 3 on."""
    return np.where(np.arange(steps) % 20 == 3, 300.0, 1.0)


def explosion(steps):
    """Norms that grow by 1.5 in each step."""
    return 1.5 ** np.arange(steps)


def step_up(steps):
    return np.where(np.arange(steps) < 60, 1.0, 10.0)


def step_down(steps):
    return np.where(np.arange(steps) < 60, 1.0, 0.1)


LEVELS = {"spikes": spikes, "explosion": explosion, "x10": step_up, "/10": step_down}
"""The norm of the gradient in each step."""

RULES = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1),
}


@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("levels", list(LEVELS))
def test_both_limits_hold_in_every_step(levels, rule):
    """The filter is np.quantile of the past norms; the bound follows the weights."""
    norms = LEVELS[levels](75)
    model = vector()
    optimizer = RULES[rule](model.parameters())
    clipper = TrustClip(model, optimizer)
    seen = []
    path = train_on(
        norms[:, None] * directions(len(norms)),
        model.w,
        optimizer,
        lambda: seen.append(clipper.metrics()),
    )
    limits = [math.inf] + [np.quantile(norms[:i], 0.9) for i in range(1, len(norms))]
    thresholds = [metrics["clip/threshold"] for metrics in seen]
    np.testing.assert_allclose(thresholds, limits, rtol=1e-5)
    after = [metrics["clip/norm_after"] for metrics in seen]
    np.testing.assert_allclose(after, np.minimum(norms, limits), rtol=1e-5)
    bounds = [RATIO * max(rms(w), FLOOR) for w in path[:-1]]
    moved = [rms(b - a) for a, b in itertools.pairwise(path)]
    assert (moved <= np.array(bounds) * (1 + 1e-5)).all()
    assert np.isclose(moved, bounds, rtol=1e-4).any(), "the bound was never reached"


@pytest.mark.parametrize("levels", ["x10", "/10"])
def test_a_lasting_change_of_level_is_followed(levels):
    """The filter's threshold reaches the new level; the update is bounded throughout.

    SGD at a rate that the bound never cuts: the length of a step is lr * |g| after the
    filter, which is back within the history of 50 norms.
    """
    norms = LEVELS[levels](130)
    model = vector()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    clipper = TrustClip(model, optimizer, history_length=50)
    path = train_on(norms[:, None] * directions(130), model.w, optimizer)
    lengths = [(b - a).double().norm().item() for a, b in itertools.pairwise(path)]
    lengths = np.array(lengths)
    assert clipper.metrics()["clip/update_clip_rate"] == 0
    np.testing.assert_allclose(lengths[:60], 1e-3, rtol=1e-3)
    np.testing.assert_allclose(lengths[120:], 1e-3 * norms[-1], rtol=1e-3)
    if levels == "x10":  # 6 of 50 norms are the new ones before the quantile is
        np.testing.assert_allclose(lengths[60:65], 1e-3, rtol=1e-3)
        np.testing.assert_allclose(lengths[66:], 1e-2, rtol=1e-3)
    else:  # a lower level is below the threshold at once
        np.testing.assert_allclose(lengths[60:], 1e-4, rtol=1e-3)


def test_an_explosion_stays_within_compound_growth():
    """Without the clipper the weights overflow; with it they grow by 1 % a step."""
    gradients = 1.5 ** np.arange(190)[:, None] * directions(190)
    free, bounded = vector(), vector()
    train_on(gradients, free.w, torch.optim.SGD(free.parameters(), lr=1.0))
    optimizer = torch.optim.SGD(bounded.parameters(), lr=1.0)
    TrustClip(bounded, optimizer)
    path = train_on(gradients, bounded.w, optimizer)
    assert rms(free.w) > 1e30
    sizes = np.array([rms(w) for w in path])
    assert (sizes <= (1 + RATIO) ** np.arange(191) * (1 + 1e-5)).all()


SCHEDULES = {
    "warm-up": lambda o: lr_scheduler.LambdaLR(o, lambda step: min(1.0, step / 10)),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=30),
}


@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_the_bound_is_reached_only_where_the_rate_is_high(schedule):
    """Plain SGD: the update is lr * g, of rms lr / sqrt(8), below 0.01 or cut to it."""
    model = vector()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clipper = TrustClip(model, optimizer)
    scheduler = SCHEDULES[schedule](optimizer)
    rates, scales = [], []

    def after():
        scales.append(clipper.metrics()["clip/update_scale"])
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step()

    path = train_on(directions(31), model.w, optimizer, after)
    moves = np.array(rates) / math.sqrt(8)
    bounds = np.array([RATIO * rms(w) for w in path[:-1]])
    expected = np.minimum(1, bounds / np.maximum(moves, 1e-30))
    np.testing.assert_allclose(scales, expected, rtol=1e-4)
    is_cut = expected < 1
    assert is_cut.any()
    assert not is_cut.all()
    assert rates[0 if schedule == "warm-up" else -1] < 1e-9
    still = 0 if schedule == "warm-up" else 30
    torch.testing.assert_close(path[still + 1], path[still], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", ["SGD", "Adam fused", "AdamW"])
def test_a_resumed_run_is_equal_bit_for_bit(name):
    def make():
        model = network()
        optimizer = OPTIMIZERS[name](model.parameters())
        return (
            model,
            optimizer,
            TrustClip(model, optimizer, ratio=0.04, history_length=3),
        )

    whole, other = make(), make()
    train(*whole[:2], 5)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in whole], file)
    file.seek(0)
    for part, state in zip(other, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    for run in (whole, other):
        train(*run[:2], 5)
    assert_same_weights(other[0], whole[0])
    assert_same_state(other[2].state_dict(), whole[2].state_dict())
    assert other[2].metrics() == whole[2].metrics()
    assert 0 < whole[2].metrics()["clip/update_clip_rate"] < 1


@pytest.mark.parametrize("nonfinite", ["zero", "skip", "propagate", "raise"])
def test_a_nan_never_enters_the_weights(nonfinite):
    """Filter: zero, skip or raise. The bound restores what is propagated."""
    model = vector()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    clipper = TrustClip(model, optimizer, nonfinite=nonfinite)
    train_on(directions(2), model.w, optimizer)
    before = model.w.detach().clone()
    model.w.grad = torch.tensor([math.nan] + [1.0] * 7)
    if nonfinite == "raise":
        with pytest.raises(FloatingPointError, match="global is not finite"):
            optimizer.step()
    elif nonfinite == "propagate":
        with pytest.warns(UserWarning, match="an update was not finite"):
            optimizer.step()
    else:
        optimizer.step()
    assert torch.equal(model.w, before)
    metrics = clipper.metrics()
    assert metrics["clip/nonfinite_total"] == (nonfinite != "raise")
    assert metrics["clip/update_nonfinite_total"] == (nonfinite == "propagate")
    assert metrics["clip/skipped_total"] == (nonfinite == "skip")
    train_on(directions(1), model.w, optimizer)
    assert model.w.isfinite().all()
    assert not torch.equal(model.w, before)


@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_of_the_loss_scale_is_no_step(fused):
    """The scale halves after an overflow; other steps are those without a scaler."""

    def run(scaler):
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
        clipper = TrustClip(model, optimizer, history_length=3)
        for step, (x, y) in enumerate(batches(6)):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            if scaler is None:
                if step != 2:
                    loss.backward()
                    optimizer.step()
                continue
            scaler.scale(loss).backward()
            if step == 2:
                model[0].bias.grad[0] = math.inf
            scaler.step(optimizer)
            scaler.update()
        return model, clipper

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    scaled, clipper = run(scaler)
    plain, other = run(None)
    assert scaler.get_scale() == 2.0**9
    # The loss scale is a power of 2, so it changes no bit of a gradient.
    assert_same_weights(scaled, plain)
    seen, expected = clipper.metrics(), other.metrics()
    names = "clip_rate", "norm", "threshold", "update_norm", "update_clip_rate"
    for name in (f"clip/{each}" for each in names):
        assert seen[name] == expected[name], name
    assert 0 < seen["clip/clip_rate"] < 1
    assert 0 < seen["clip/update_clip_rate"]


def test_the_optimizer_keeps_it_alive():
    model = vector()
    optimizer = torch.optim.SGD(model.parameters(), lr=100.0)
    TrustClip(model, optimizer)
    gc.collect()
    path = train_on(directions(1), model.w, optimizer)
    assert rms(path[1] - path[0]) == pytest.approx(RATIO, rel=1e-5)


def test_it_keeps_no_optimizer_alive():
    model = vector()
    optimizer = torch.optim.SGD(model.parameters(), lr=100.0)
    clipper = TrustClip(model, optimizer)
    del optimizer
    gc.collect()
    assert not clipper._bound._hooks.active


def test_detached_it_does_nothing_and_may_be_replaced():
    model, plain = network(), network()
    optimizer, reference = (OPTIMIZERS["SGD"](m.parameters()) for m in (model, plain))
    clipper = TrustClip(model, optimizer)
    clipper.detach()
    clipper.detach()
    train(model, optimizer, 3)
    train(plain, reference, 3)
    assert_same_weights(model, plain)
    assert not optimizer._optimizer_step_pre_hooks
    assert clipper.metrics()["clip/steps"] == 0
    again = TrustClip(model, optimizer)
    train(model, optimizer, 3)
    assert again.metrics()["clip/update_steps"] == 3


def test_dry_run_and_exclude_concern_both_halves():
    model, plain = network(), network()
    optimizer, reference = (OPTIMIZERS["SGD"](m.parameters()) for m in (model, plain))
    clipper = TrustClip(model, optimizer, exclude="0.weight", dry_run=True)
    assert clipper.names == [n for n, _ in model.named_parameters() if n != "0.weight"]
    train(model, optimizer, 3)
    train(plain, reference, 3)
    assert_same_weights(model, plain)
    metrics = clipper.metrics(per_row=True)
    assert metrics["clip/update_clipped"] > 0
    assert metrics["clip/norm/global"] > 0
    assert "clip/update_norm/0.weight" not in metrics
    clipper.dry_run = False
    before = model[0].bias.detach().clone()
    optimizer.param_groups[0]["lr"] = 1e4
    train(model, optimizer, 1)
    moved = rms(model[0].bias - before)
    assert moved == pytest.approx(RATIO * max(rms(before), FLOOR), rel=1e-4)


def test_norms_of_an_earlier_run_give_the_first_step_a_threshold():
    """The log has them as steps of the gradient, before the first update."""
    model = vector()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    clipper, log = TrustClip(model, optimizer), ClipLog()
    norms = np.random.default_rng(0).lognormal(0, 0.3, 50).astype(np.float32)
    clipper.observe(norms)
    train_on([1e4 * directions(1)[0]], model.w, optimizer)
    metrics = clipper.metrics()
    log.record(metrics)
    assert metrics["clip/threshold"] == pytest.approx(np.quantile(norms, 0.9), rel=1e-6)
    assert metrics["clip/norm_after"] == pytest.approx(metrics["clip/threshold"])
    assert (metrics["clip/steps"], metrics["clip/update_steps"]) == (51, 1)
    assert (log.steps.tolist(), log.updates.steps.tolist()) == ([50], [50])
    assert log.summary().steps == 51


def test_new_parameters_are_clipped_without_a_call():
    model = vector()
    optimizer = torch.optim.SGD(model.parameters(), lr=100.0)
    clipper = TrustClip(model, optimizer)
    train_on(directions(2), model.w, optimizer)
    model.late = nn.Parameter(torch.ones(8))
    optimizer.add_param_group({"params": model.late})
    model.late.grad = torch.ones(8)
    train_on(directions(1), model.w, optimizer)
    assert rms(model.late - 1) == pytest.approx(RATIO, rel=1e-5)
    assert clipper.names == ["w", "late"]
    metrics = clipper.metrics()
    assert metrics["clip/norm"] == pytest.approx(3.0)  # sqrt(1 + 8)
    assert metrics["clip/steps"] == metrics["clip/update_steps"] == 3


# As an optimizer, and its copies.


def as_optimizer(name="AdamW"):
    model = network()
    inner = OPTIMIZERS[name](model.parameters())
    return model, TrustClip.as_optimizer(inner, model=model, history_length=3)


def test_as_an_optimizer_it_does_the_same():
    model, optimizer = as_optimizer()
    other = network()
    inner = OPTIMIZERS["AdamW"](other.parameters())
    clipper = TrustClip(other, inner, history_length=3)
    lr = lr_scheduler.StepLR(optimizer, 2), lr_scheduler.StepLR(inner, 2)
    train(model, optimizer, 6, lr[0].step)
    train(other, inner, 6, lr[1].step)
    assert_same_weights(model, other)
    assert_same_state(optimizer.state_dict()["clipper"], clipper.state_dict())

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(2, 2, 6)).square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    assert optimizer.clipper.metrics()["clip/update_steps"] == 7


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_copies_of_the_optimizer_clip(copied):
    model, optimizer = as_optimizer()
    train(model, optimizer, 3)
    other, same = copied((model, optimizer))
    for run in ((model, optimizer), (other, same)):
        train(*run, 4)
    assert_same_weights(other, model)
    assert_same_state(same.state_dict(), optimizer.state_dict())
    assert same.clipper.metrics()["clip/update_steps"] == 7


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_a_copied_clipper_is_not_registered(copied):
    model = network()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    clipper = TrustClip(model, optimizer, exclude=["0.bias"])
    train(model, optimizer, 3)
    other, clone, its_optimizer = copied((model, clipper, optimizer))
    assert_same_state(clone.state_dict(), clipper.state_dict())
    with pytest.warns(UserWarning, match="the clipper does not act in its step"):
        train(other, its_optimizer, 1)
    assert clone.metrics()["clip/steps"] == 3
    again = TrustClip(other, its_optimizer, exclude=["0.bias"])
    again.load_state_dict(clone.state_dict())
    assert again.metrics()["clip/update_steps"] == 3


def test_a_group_is_added_to_all_or_to_none():
    model, optimizer = as_optimizer()
    model.late = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [model.late]})
    assert optimizer.clipper.names[-1] == "late"
    state = optimizer.state_dict()
    assert len(state["clipper"]["gradient"]["parameters"]) == 7
    with pytest.raises(ValueError, match=r"more than one|some parameters"):
        optimizer.add_param_group({"params": [model.late]})
    assert len(optimizer.param_groups) == 2


def test_without_a_model_rows_are_named_by_position():
    model = network()
    optimizer = TrustClip.as_optimizer(torch.optim.SGD(model.parameters(), lr=1.0))
    assert optimizer.clipper.names == [f"parameter {i}" for i in range(6)]
    train(model, optimizer, 2)
    assert optimizer.clipper.metrics()["clip/update_clip_rate"] > 0
    named = torch.optim.SGD(model.named_parameters(), lr=1.0)
    clipper = TrustClip.as_optimizer(named, exclude="0.bias").clipper
    assert clipper.names[:2] == ["0.weight", "2.weight"]
    unnamed = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(ValueError, match=r"exclude='0.bias' needs named parameters"):
        TrustClip.as_optimizer(unnamed, exclude="0.bias")


@pytest.mark.parametrize("half", ["gradient", "update"])
def test_a_state_is_loaded_whole_or_not_at_all(half):
    model, optimizer = as_optimizer()
    train(model, optimizer, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, 2)
    before, metrics = optimizer.state_dict(), optimizer.clipper.metrics()
    saved["clipper"][half]["scope"] = "unit"
    for load, state in (
        (optimizer.load_state_dict, saved),
        (optimizer.clipper.load_state_dict, saved["clipper"]),
    ):
        with pytest.raises(ValueError, match="scope"):
            load(state)
        assert_same_state(optimizer.state_dict()["clipper"], before["clipper"])
        assert optimizer.clipper.metrics() == metrics


def test_other_settings_load_without_strict():
    model, optimizer = as_optimizer()
    train(model, optimizer, 3)
    saved = optimizer.clipper.state_dict()
    optimizer.clipper.detach()
    other = TrustClip(model, optimizer, history_length=3, ratio=0.5, quantile=0.25)
    with pytest.raises(ValueError, match=r"quantile.* pass strict=False"):
        other.load_state_dict(saved)
    other.load_state_dict(state_dict=saved, strict=False)
    assert other.metrics()["clip/update_steps"] == 3
    other.reset()
    assert other.metrics()["clip/update_steps"] == other.metrics()["clip/steps"] == 0


# Errors, and the repr.


def attach_norm_clip(model, optimizer):
    NormClip(model, 1.0).attach(optimizer)


def wrap_norm_clip(model, optimizer):
    return NormClip.as_optimizer(optimizer, max_norm=1.0)


def bound_update(model, optimizer):
    UpdateClipper(model, optimizer, Fixed(1.0))


PAIRS = {
    "twice": (TrustClip, TrustClip, RuntimeError, r"detach\(\) on the first"),
    "after a bound": (bound_update, TrustClip, ValueError, "one update clipper"),
    "before a bound": (TrustClip, bound_update, ValueError, "one update clipper"),
    "after a clipper": (attach_norm_clip, TrustClip, RuntimeError, "UpdateClipper"),
    "before a clipper": (TrustClip, attach_norm_clip, RuntimeError, "clipped twice"),
    "in a wrapper": (wrap_norm_clip, TrustClip, RuntimeError, "UpdateClipper"),
    "under a wrapper": (TrustClip, wrap_norm_clip, RuntimeError, "clipped twice"),
}


@pytest.mark.parametrize(
    ("first", "second", "error", "words"), PAIRS.values(), ids=PAIRS
)
def test_no_work_is_done_twice(first, second, error, words):
    model = vector()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clipper = first(model, optimizer)
    wrapped = clipper if isinstance(clipper, torch.optim.Optimizer) else optimizer
    hooks = len(optimizer._optimizer_step_pre_hooks)
    with pytest.raises(error, match=words):
        second(model, wrapped)
    assert len(optimizer._optimizer_step_pre_hooks) == hooks


@pytest.mark.parametrize(
    ("keywords", "is_refused"),
    [({}, True), ({"dry_run": True}, False), ({"loss_policy": Fixed(9.0)}, False)],
    ids=["clips", "dry run", "loss"],
)
def test_a_clipper_by_hand_does_not_clip_before_it(keywords, is_refused):
    """The first update shows which optimizer steps what the clipper clips."""
    model = vector()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    TrustClip(model, optimizer)
    by_hand = Clipper(model, Fixed(0.5), **keywords)
    loss = {"loss": 1.0} if "loss_policy" in keywords else {}
    model.w.grad = torch.ones(8)
    by_hand.step(**loss)
    optimizer.step()
    if is_refused:
        with pytest.raises(RuntimeError, match=r"clipped twice; leave this clipper"):
            by_hand.step()
    else:
        by_hand.step(**loss)


@pytest.mark.parametrize("trust_first", [True, False])
def test_a_clipper_of_the_loss_may_be_attached_too(trust_first):
    model = vector()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = Clipper(model, Fixed(math.inf), loss_policy=MeanStd(3.0))
    if not trust_first:
        losses.attach(optimizer)
    clipper = TrustClip(model, optimizer)
    if trust_first:
        losses.attach(optimizer)
    for loss in (1.0, 1.1, 0.9, 50.0):
        losses.observe_loss(loss)
        before = model.w.detach().clone()
        train_on(directions(1), model.w, optimizer)
        assert torch.equal(model.w, before) == (loss == 50.0)
    assert losses.metrics()["clip/skipped_total"] == 1
    assert clipper.metrics()["clip/steps"] == 4


ERRORS = {
    "ratio": ({"ratio": 0}, ValueError, "ratio must be > 0 and finite"),
    "quantile": ({"quantile": 90}, ValueError, "quantile must be in"),
    "history": ({"history_length": 0}, ValueError, "history_length must be"),
    "scope": ({"scope": "layer"}, ValueError, "scope must be one of"),
    "exclude": ({"exclude": "head"}, ValueError, "exclude must match"),
    "all": ({"exclude": "*"}, ValueError, r"exclude must leave .*, got \['\*'\]"),
    "nonfinite": ({"nonfinite": "keep"}, ValueError, "nonfinite must be one of"),
    "dry_run": ({"dry_run": 1}, TypeError, "dry_run must be True or False"),
}


@pytest.mark.parametrize(("keywords", "error", "words"), ERRORS.values(), ids=ERRORS)
def test_a_wrong_argument_registers_nothing(keywords, error, words):
    model = vector()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(error, match=words):
        TrustClip(model, optimizer, **keywords)
    assert not optimizer._optimizer_step_pre_hooks


def test_other_misuses():
    model = vector()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"write TrustClip\(model, optimizer\)"):
        TrustClip(model.parameters(), optimizer)
    with pytest.raises(TypeError, match=r"model must be .*, got SGD; write TrustClip"):
        TrustClip(optimizer, model)
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer"):
        TrustClip(model, model)
    clipper = TrustClip(model, optimizer)
    way_out = r"clipper\.step\(\) out.*; to log, call log\.record\(clipper\.metrics"
    for by_hand in (clipper, clipper._filter, clipper._bound):
        with pytest.raises(RuntimeError, match=way_out):
            by_hand.step()
    for state in (None, {}, NormClip(model, 1.0).state_dict()):
        with pytest.raises(ValueError, match=r"state_dict\(\) of a TrustClip"):
            clipper.load_state_dict(state)


def test_its_repr_has_the_arguments_that_are_not_defaults():
    model = vector()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clipper = TrustClip(model, optimizer)
    assert repr(clipper) == "TrustClip(ratio=0.01, scope='parameter', rows=1)"
    clipper.detach()
    clipper = TrustClip(
        model, optimizer, quantile=0.5, scope="unit", nonfinite="skip", dry_run=True
    )
    assert repr(clipper) == (
        "TrustClip(ratio=0.01, quantile=0.5, scope='unit', dry_run=True, "
        "nonfinite='skip', rows=1)"
    )
