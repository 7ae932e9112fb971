"""A clipper as an optimizer works with everything that torch does to an optimizer.

The reference is a loop by hand, `clipper.step()` and then `optimizer.step()`: the
wrapped optimizer does the same, bit for bit.
"""

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from autoclip_core import ClipLog
from autoclip_torch import (
    AGC,
    ClippedOptimizer,
    NormClip,
    QuantileClip,
    ValueClip,
    optim,
)

from ..support.torch_optimizers import (
    CLIPPERS,
    OPTIMIZERS,
    assert_same_clipper,
    assert_same_state,
    assert_same_weights,
    backward,
    batches,
    network,
    train,
    train_by_hand,
    trained,
)

# The usual script.


# The clippers take turns at the optimizers: neither depends on the other.
TURNS = [
    (optimizer, list(CLIPPERS)[number % len(CLIPPERS)])
    for number, optimizer in enumerate(OPTIMIZERS)
]


@pytest.mark.parametrize(("optimizer", "clipper"), TURNS)
def test_it_clips_and_then_steps(optimizer, clipper):
    make, wrap = OPTIMIZERS[optimizer], CLIPPERS[clipper]
    by_hand, wrapped = network(), network()
    inner = make(by_hand.parameters())
    clipper = wrap(make(by_hand.parameters()), by_hand).clipper
    train_by_hand(by_hand, clipper, inner, steps=7)
    optimizer = wrap(make(wrapped.parameters()), wrapped)
    assert isinstance(optimizer, torch.optim.Optimizer)
    train(wrapped, optimizer, steps=7)
    assert_same_weights(wrapped, by_hand)
    assert_same_clipper(optimizer.clipper, clipper)
    assert_same_state(optimizer.optimizer.state_dict(), inner.state_dict())
    assert optimizer.clipper.metrics() == clipper.metrics()


SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=2),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=8),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=8),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "warm restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "warm-up first": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)],
        milestones=[3],
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.01, anneal_epochs=3),
}


@pytest.mark.parametrize("schedule", SCHEDULERS.values(), ids=list(SCHEDULERS))
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_a_scheduler_sets_the_learning_rate(name, schedule):
    """Some set the momentum, too. A warning would be an error."""
    by_hand, wrapped = network(), network()
    inner = OPTIMIZERS[name](by_hand.parameters())
    clipper = AGC(by_hand.parameters(), clipping=0.04, eps=0.003)
    scheduler = schedule(inner)
    train_by_hand(by_hand, clipper, inner, 7, scheduler.step)
    optimizer = optim.AGC(OPTIMIZERS[name](wrapped.parameters()), 0.04, 0.003)
    same = schedule(optimizer)
    train(wrapped, optimizer, 7, same.step)
    assert_same_weights(wrapped, by_hand)
    assert same.get_last_lr() == scheduler.get_last_lr()
    assert_same_state(optimizer.optimizer.state_dict(), inner.state_dict())


def test_a_scheduler_that_waits_for_a_plateau():
    model = network()
    optimizer = optim.AGC(OPTIMIZERS["SGD"](model.parameters()), 0.04, 0.003)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    train(model, optimizer, 3, lambda: scheduler.step(1.0))
    assert scheduler.get_last_lr() == [0.1 * 0.5**2]
    assert optimizer.optimizer.param_groups[0]["lr"] == 0.1 * 0.5**2


def test_a_scheduler_resumes():
    """Model, optimizer and scheduler are saved after 4 steps: the next 4 are equal."""

    def make():
        model = network()
        optimizer = QuantileClip.as_optimizer(
            OPTIMIZERS["Adam"](model.parameters()), quantile=0.5
        )
        return model, optimizer, lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9)

    first, second, third = make(), make(), make()
    train(first[0], first[1], 4, first[2].step)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    for part, state in zip(second, saved, strict=True):
        part.load_state_dict(state)
    for run in (first, second):
        train(run[0], run[1], 4, run[2].step)
    assert_same_weights(second[0], first[0])
    # The control: without the states it is another run.
    third[0].load_state_dict(saved[0])
    train(third[0], third[1], 4, third[2].step)
    assert not torch.equal(third[0][0].weight, first[0][0].weight)


def test_clipping_and_eps_by_position():
    """The call that a well-known README shows."""
    weight = nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    optimizer = optim.AGC(torch.optim.SGD([weight], lr=1.0), 0.04, 0.003)
    assert optimizer.clipper.policy.clipping == 0.04
    assert optimizer.clipper.policy.eps == 0.003
    weight.grad = torch.ones(2, 2)
    optimizer.step()
    moved = np.array([[3, 4], [0, 0]]) - weight.detach().numpy()
    expected = [0.04 * 5, 0.04 * 0.003]
    np.testing.assert_allclose(np.linalg.norm(moved, axis=1), expected, rtol=1e-5)


# Closures.


@pytest.mark.parametrize("name", ["SGD", "Adam", "Adam fused"])
def test_with_a_closure_it_clips_what_the_closure_computed(name):
    by_hand, wrapped = network(), network()
    inner = OPTIMIZERS[name](by_hand.parameters())
    clipper = NormClip(by_hand.parameters(), max_norm=0.1)
    train_by_hand(by_hand, clipper, inner, 5)
    optimizer = NormClip.as_optimizer(
        OPTIMIZERS[name](wrapped.parameters()), max_norm=0.1
    )
    for batch in batches(5):
        losses = []

        def closure(batch=batch, losses=losses):
            losses.append(backward(wrapped, optimizer, batch))
            return losses[0]

        assert optimizer.step(closure) is losses[0]
        assert len(losses) == 1
    assert_same_weights(wrapped, by_hand)
    assert optimizer.clipper.metrics() == clipper.metrics()


def test_lbfgs_is_clipped_after_each_backward():
    by_hand, wrapped = network(), network()
    settings = {"lr": 0.1, "max_iter": 4, "line_search_fn": "strong_wolfe"}
    inner = torch.optim.LBFGS(by_hand.parameters(), **settings)
    clipper = QuantileClip(by_hand.parameters(), quantile=0.5, global_clipping=True)
    optimizer = QuantileClip.as_optimizer(
        torch.optim.LBFGS(wrapped.parameters(), **settings),
        quantile=0.5,
        global_clipping=True,
    )
    calls = 0
    for batch in batches(3):

        def clipped_by_hand(batch=batch):
            loss = backward(by_hand, inner, batch)
            clipper.step()
            return loss

        def closure(batch=batch):
            nonlocal calls
            calls += 1
            return backward(wrapped, optimizer, batch)

        assert torch.equal(optimizer.step(closure), inner.step(clipped_by_hand))
    assert_same_weights(wrapped, by_hand)
    assert calls > 3 * 4
    assert optimizer.clipper.metrics()["clip/steps"] == calls
    assert 0 < optimizer.clipper.metrics()["clip/clip_rate"] < 1


def lbfgs_on_a_quadratic(clip, **settings):
    """Start where the gradient norm is some hundred times the threshold."""
    weight = nn.Parameter(torch.tensor([10.0, -20.0, 5.0]))
    stiffness = torch.tensor([1.0, 10.0, 100.0])
    optimizer = torch.optim.LBFGS([weight], lr=1.0, **settings)
    if clip == "attached":
        NormClip([weight], max_norm=1.0, nonfinite="propagate").attach(optimizer)

    def closure():
        optimizer.zero_grad()
        loss = 0.5 * (stiffness * weight.square()).sum()
        loss.backward()
        if clip == "by torch":
            nn.utils.clip_grad_norm_([weight], 1.0)
        return loss

    return [optimizer.step(closure).item() for _ in range(8)]


@pytest.mark.parametrize("clip", ["attached", "by torch"])
def test_lbfgs_needs_a_line_search_where_gradients_are_clipped(clip):
    """LBFGS takes the curvature from differences of gradients (docs/pytorch.md)."""
    assert not np.isfinite(lbfgs_on_a_quadratic(clip)[2])
    assert lbfgs_on_a_quadratic(None)[-1] < 1e-8
    assert lbfgs_on_a_quadratic(clip, line_search_fn="strong_wolfe")[-1] < 1e-8


# GradScaler.


def scaled_run(skip_by_hand):
    """Take ten steps under a scaler; the loss overflows in steps 0, 1 and 5."""
    model, log = network(), ClipLog()
    inner = torch.optim.Adam(model.parameters(), lr=0.01)
    clipper = QuantileClip(model.parameters(), quantile=0.5, history_length=5)
    optimizer = inner
    if not skip_by_hand:
        optimizer = ClippedOptimizer(inner, clipper)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    norms, scales = [], []
    for step, batch in enumerate(batches(10)):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
        overflow = step in (0, 1, 5)
        scaler.scale(loss * (float("inf") if overflow else 1.0)).backward()
        if skip_by_hand:
            scaler.unscale_(inner)
            if not overflow:
                norms.append(clipper.step().norm)
            scaler.step(inner)
        else:
            scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        log.record(clipper.metrics())
    assert (len(log), log.summary().repeated) == (7, 3)
    return model, clipper, scales


def test_a_grad_scaler_steps_it():
    """It clips unscaled gradients, and records nothing of an overflow."""
    model, clipper, scales = scaled_run(skip_by_hand=False)
    by_hand, own_clipper, own_scales = scaled_run(skip_by_hand=True)
    assert scales == own_scales
    assert len(set(scales)) > 1
    assert_same_weights(model, by_hand)
    assert_same_clipper(clipper, own_clipper)
    assert all(p.isfinite().all() for p in model.parameters())
    metrics = clipper.metrics()
    assert metrics["clip/steps"] == 7
    assert metrics["clip/nonfinite_total"] == 0
    assert metrics["clip/norm"] < 100, "the norm of unscaled gradients"


@pytest.mark.parametrize("name", ["SGD fused", "Adam fused"])
def test_a_grad_scaler_unscales_for_a_fused_optimizer_too(name):
    """The kernel would unscale too, but after the clipper."""
    model, plain = network(), network()
    optimizer = NormClip.as_optimizer(
        OPTIMIZERS[name](model.parameters()), max_norm=0.1
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    clipper = NormClip(plain.parameters(), max_norm=0.1)
    inner = OPTIMIZERS[name](plain.parameters())
    for batch in batches(4):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        backward(plain, inner, batch)
        clipper.step()
        inner.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert optimizer.clipper.metrics() == pytest.approx(clipper.metrics(), rel=1e-5)


def test_gradients_may_be_unscaled_before_the_step():
    """Some scripts read the norms in between."""
    model = network()
    optimizer = NormClip.as_optimizer(
        OPTIMIZERS["SGD"](model.parameters()), max_norm=0.1
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    loss = nn.functional.cross_entropy(model(torch.ones(1, 2, 6)), torch.tensor([0]))
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    scaler.step(optimizer)
    assert optimizer.clipper.metrics()["clip/norm"] == pytest.approx(
        norm.item(), rel=1e-5
    )


# Hooks.


def test_step_hooks_run_once_around_clipping_and_step():
    model = network()
    optimizer = NormClip.as_optimizer(
        OPTIMIZERS["SGD"](model.parameters()), max_norm=0.1
    )
    calls = []

    def note(when):
        def hook(self, args, kwargs):
            assert self is optimizer
            weights = torch.cat([p.detach().flatten() for p in model.parameters()])
            grads = [p.grad for p in model.parameters()]
            calls.append((when, torch.nn.utils.get_total_norm(grads).item(), weights))

        return hook

    handles = [
        optimizer.register_step_pre_hook(note("before")),
        optimizer.register_step_post_hook(note("after")),
    ]
    train(model, optimizer, 2)
    assert [when for when, _, _ in calls] == ["before", "after"] * 2
    for (_, norm, weights), (_, clipped, moved) in zip(
        calls[::2], calls[1::2], strict=True
    ):
        assert norm > 0.1
        assert clipped == pytest.approx(0.1, rel=1e-5)
        assert not torch.equal(weights, moved)
    for handle in handles:
        handle.remove()
    train(model, optimizer, 1)
    assert len(calls) == 4


class CountedSteps(ClippedOptimizer):
    """A subclass with its own step, as a user may write it."""

    count = 0

    def step(self, closure=None):
        self.count += 1
        return super().step(closure)


def test_a_subclass_with_its_own_step_runs_the_hooks_of_the_optimizer_once():
    model, calls = network(), []
    clipper = NormClip(model, max_norm=0.1)
    optimizer = CountedSteps(OPTIMIZERS["SGD"](model.parameters()), clipper)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    train(model, optimizer, 2)
    assert calls == ["before", "after"] * 2
    assert optimizer.count == 2


@pytest.mark.parametrize("kind", [ClippedOptimizer, CountedSteps])
def test_global_step_hooks_run_once_for_the_optimizer_inside(kind):
    """They run as without a clipper: before its other hooks, and so before clipping."""
    model = network()
    clipper = NormClip(model, max_norm=0.1)
    optimizer = kind(OPTIMIZERS["SGD"](model.parameters()), clipper)
    calls = []

    def note(when):
        def hook(stepped, args, kwargs):
            norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
            is_clipped = norm.item() <= 0.1 * (1 + 1e-5)
            calls.append((when, type(stepped).__name__, is_clipped))

        return hook

    handles = [
        register_optimizer_step_pre_hook(note("before")),
        register_optimizer_step_post_hook(note("after")),
    ]
    try:
        train(model, optimizer, 2)
    finally:
        for handle in handles:
            handle.remove()
    assert calls == [("before", "SGD", False), ("after", "SGD", True)] * 2


@pytest.mark.parametrize("by_keyword", [False, True])
def test_a_step_hook_may_replace_the_closure(by_keyword):
    model = network()
    optimizer = NormClip.as_optimizer(
        OPTIMIZERS["SGD"](model.parameters()), max_norm=0.1
    )

    def closure():
        return 2 * backward(model, optimizer, next(batches(1)))

    def replace(self, args, kwargs):
        return (args, {"closure": closure}) if by_keyword else ((self, closure), {})

    optimizer.register_step_pre_hook(replace)
    expected = closure().item()
    assert optimizer.step().item() == expected


def test_hooks_of_the_optimizer_inside_still_run():
    model = network()
    inner, calls = OPTIMIZERS["SGD"](model.parameters()), []
    inner.register_step_pre_hook(lambda *_: calls.append("step"))
    inner.register_state_dict_post_hook(lambda _, state: {**state, "more": 1})
    optimizer = NormClip.as_optimizer(inner, max_norm=0.1)
    train(model, optimizer, 2)
    assert calls == ["step"] * 2
    assert optimizer.state_dict()["more"] == 1


def test_hooks_of_the_state():
    _, optimizer = trained()
    calls = []
    optimizer.register_state_dict_pre_hook(lambda _: calls.append("before saving"))
    optimizer.register_state_dict_post_hook(lambda _, state: calls.append("saved"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("loading"))
    optimizer.register_load_state_dict_post_hook(lambda _: calls.append("loaded"))
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    assert calls == ["before saving", "saved", "loading", "loaded"]


# Groups.


def grouped(**more):
    model = network()
    return model, torch.optim.AdamW(
        [
            {"params": model[0].parameters(), "lr": 0.1, "eps": 1e-2},
            {"params": model[2].parameters(), "weight_decay": 0.5, **more},
            {"params": model[4].parameters()},
        ],
        lr=0.01,
    )


def test_a_group_of_the_optimizer_is_a_group_of_the_clipper():
    """Each group has its own norm. No setting of the optimizer is read."""
    model, inner = grouped()
    optimizer = AGC.as_optimizer(inner, clipping=0.5, eps=1e-3, scope="group")
    assert optimizer.clipper.names == ["group 0", "group 1", "group 2"]
    assert optimizer.clipper.policy.eps == 1e-3
    backward(model, optimizer, next(batches(1)))
    layers = [model[0], model[2], model[4]]
    grads = [np.concatenate([p.grad.flatten() for p in m.parameters()]) for m in layers]
    optimizer.step()
    metrics = optimizer.clipper.metrics(per_row=True)
    for index, grad in enumerate(grads):
        norm = metrics[f"clip/norm/group {index}"]
        assert norm == pytest.approx(np.linalg.norm(grad.astype(np.float64)), rel=1e-6)
    assert [g["lr"] for g in inner.param_groups] == [0.1, 0.01, 0.01]
    assert [g["eps"] for g in inner.param_groups] == [1e-2, 1e-8, 1e-8]
    assert [g["weight_decay"] for g in inner.param_groups] == [0.01, 0.5, 0.01]


def test_the_groups_are_shared():
    """The inner optimizer reads what a scheduler writes to the wrapper."""
    _, inner = grouped()
    optimizer = NormClip.as_optimizer(inner, max_norm=1.0)
    assert optimizer.param_groups is inner.param_groups
    assert optimizer.state is inner.state
    assert optimizer.defaults == inner.defaults
    optimizer.param_groups[1]["lr"] = 7.0
    assert inner.param_groups[1]["lr"] == 7.0


@pytest.mark.parametrize("scope", ["parameter", "group", "unit"])
def test_an_added_group_is_trained_and_clipped(scope):
    """The existing rows keep their history."""
    model, head = network(), nn.Linear(3, 3)
    optimizer = QuantileClip.as_optimizer(
        OPTIMIZERS["SGD"](model.parameters()), quantile=0.5, scope=scope
    )
    train(model, optimizer, 3)
    before = optimizer.clipper.threshold()
    rows = len(optimizer.clipper.names)
    optimizer.add_param_group({"params": head.parameters(), "lr": 0.5})
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.5]
    added = {"parameter": 2, "group": 1, "unit": 3 + 1}[scope]
    assert len(optimizer.clipper.names) == rows + added
    after = optimizer.clipper.threshold()
    assert torch.equal(after[:rows], before)
    assert after[rows:].isinf().all()
    weights = head.weight.detach().clone()
    whole = nn.Sequential(model, head)
    train(whole, optimizer, 3)
    assert not torch.equal(head.weight, weights)
    assert optimizer.clipper.threshold().isfinite().all()


def test_a_refused_group_is_added_to_neither():
    model = network()
    optimizer = NormClip.as_optimizer(
        OPTIMIZERS["SGD"](model.parameters()), max_norm=1.0
    )
    more = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="some parameters appear in more than one"):
        optimizer.add_param_group({"params": [more, model[0].weight]})
    whole = nn.Parameter(torch.ones(2), requires_grad=False)
    whole.data = torch.ones(2, dtype=torch.long)
    with pytest.raises(ValueError, match="floating-point"):
        optimizer.add_param_group({"params": [whole]})
    assert len(optimizer.param_groups) == 1
    assert len(optimizer.clipper.names) == 1
    train(model, optimizer, 2)


def test_the_names_of_an_optimizer_of_named_parameters():
    model = network()
    inner = torch.optim.SGD(model.named_parameters(), lr=0.1)
    optimizer = QuantileClip.as_optimizer(inner, exclude=["4.*"])
    assert optimizer.clipper.names == ["0.weight", "0.bias", "2.weight", "2.bias"]
    head = nn.Linear(3, 3)
    names = [("head.weight", head.weight), ("4.extra", head.bias)]
    optimizer.add_param_group({"params": names})
    assert optimizer.clipper.names[4:] == ["head.weight"]
    assert optimizer.param_groups[1]["param_names"] == ["head.weight", "4.extra"]


def test_a_model_gives_names_and_layers():
    model = network()
    inner = OPTIMIZERS["SGD"](model.parameters())
    optimizer = optim.AGC(inner, 0.04, 0.003, model=model, exclude="4")
    names = optimizer.clipper.names
    assert names == [f"0.weight[{i}]" for i in range(4)] + ["0.bias"] + [
        "2.weight[0]", "2.weight[1]", "2.bias",
    ]  # fmt: skip


# Averaged weights, and other features of torch that use an optimizer.


@pytest.mark.parametrize(
    "average",
    [
        {},
        {"multi_avg_fn": torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)},
    ],
    ids=["SWA", "EMA"],
)
def test_averaged_weights(average):
    by_hand, wrapped = network(), network()
    inner = OPTIMIZERS["SGD"](by_hand.parameters())
    clipper = NormClip(by_hand.parameters(), max_norm=0.1)
    averages = [
        torch.optim.swa_utils.AveragedModel(model, **average)
        for model in (by_hand, wrapped)
    ]
    train_by_hand(
        by_hand, clipper, inner, 4, lambda: averages[0].update_parameters(by_hand)
    )
    optimizer = NormClip.as_optimizer(
        OPTIMIZERS["SGD"](wrapped.parameters()), max_norm=0.1
    )
    train(wrapped, optimizer, 4, lambda: averages[1].update_parameters(wrapped))
    assert_same_weights(*averages)


def test_a_sparse_embedding_under_sparse_adam():
    tables = []
    for wrapped in (False, True):
        torch.manual_seed(0)
        table = nn.Embedding(6, 3, sparse=True)
        inner = torch.optim.SparseAdam(table.parameters(), lr=0.1)
        clipper = NormClip(table.parameters(), max_norm=0.5)
        optimizer = ClippedOptimizer(inner, clipper) if wrapped else inner
        for text in ([1, 1, 2], [0, 4, 4], [1, 5, 2]):
            optimizer.zero_grad()
            table(torch.tensor(text)).pow(2).sum().backward()
            if not wrapped:
                clipper.step()
            optimizer.step()
        assert clipper.metrics()["clip/clip_rate"] == 1
        tables.append(table)
    assert_same_weights(*tables)


def test_a_skip_changes_neither_moments_nor_weights():
    """A skip changes no momentum, no weight decay and no step count."""
    model = network()
    inner = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    optimizer = NormClip.as_optimizer(inner, max_norm=1.0, nonfinite="skip")
    train(model, optimizer, 2)
    weights = copy.deepcopy(model)
    state = copy.deepcopy(inner.state_dict())
    backward(model, optimizer, next(batches(1)))
    model[0].bias.grad[0] = float("nan")
    optimizer.step()
    assert_same_weights(model, weights)
    assert_same_state(inner.state_dict(), state)
    assert optimizer.clipper.metrics()["clip/skipped_total"] == 1


def test_a_clipped_optimizer_can_be_wrapped_again():
    """Clip the values, then the norm, then step."""
    by_hand, wrapped = network(), network()
    inner = OPTIMIZERS["SGD"](by_hand.parameters())
    values = ValueClip(by_hand.parameters(), clip_value=0.02)
    norm = NormClip(by_hand.parameters(), max_norm=0.1)
    for batch in batches(4):
        backward(by_hand, inner, batch)
        assert values.step().clipped.any()
        assert norm.step().clipped.all()
        inner.step()
    optimizer = ValueClip.as_optimizer(
        NormClip.as_optimizer(OPTIMIZERS["SGD"](wrapped.parameters()), max_norm=0.1),
        clip_value=0.02,
    )
    train(wrapped, optimizer, 4)
    assert_same_weights(wrapped, by_hand)


def test_zero_grad_is_that_of_torch():
    model, optimizer = trained()
    backward(model, optimizer, next(batches(1)))
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    backward(model, optimizer, next(batches(1)))
    optimizer.zero_grad(set_to_none=False)
    assert all((p.grad == 0).all() for p in model.parameters())


def test_an_argument_that_is_not_an_optimizer_is_refused():
    weight = nn.Parameter(torch.ones(2))
    clipper = NormClip([weight], max_norm=1.0)
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer"):
        ClippedOptimizer([weight], clipper)


def test_nothing_of_torch_is_patched():
    """The optimizer inside keeps its methods, and so does its class."""
    model = network()
    inner = OPTIMIZERS["SGD"](model.parameters())
    of_class, of_object = dict(vars(torch.optim.SGD)), dict(vars(inner))
    optimizer = NormClip.as_optimizer(inner, max_norm=0.1)
    train(model, optimizer, 2)
    for before, after in ((of_class, vars(torch.optim.SGD)), (of_object, vars(inner))):
        assert list(after) == list(before)
        assert all(after[name] is before[name] for name in before)
