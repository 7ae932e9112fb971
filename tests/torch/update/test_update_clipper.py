"""`UpdateClipper` inside the step of an optimizer, against formulas in float64."""

import copy
import pickle
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn

from autoclip_core import Drop, Fixed, MeanStd, ParamRatio, Quantile
from autoclip_torch import NormClip, UpdateClipper

INF, NAN = float("inf"), float("nan")


class Net(nn.Module):
    """A model with every kind of unit."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 3)
        self.conv = nn.Conv1d(2, 2, 3)
        self.transposed = nn.ConvTranspose1d(4, 2, 3, groups=2)
        self.norm = nn.LayerNorm(5)
        self.to(dtype)


def give_gradients(model, step, size=1.0):
    """Set seeded gradients."""
    rng = np.random.default_rng(step)
    for p in model.parameters():
        values = torch.from_numpy(size * rng.standard_normal(tuple(p.shape)))
        if p.requires_grad:
            p.grad = values.to(p.dtype)


def snapshot(model):
    return {k: p.detach().clone() for k, p in model.named_parameters()}


def have_same_weights(model, other):
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return all(torch.equal(p, q) for p, q in pairs)


def train(optimizer, model, steps, start=0):
    for step in range(start, start + steps):
        give_gradients(model, step)
        optimizer.step()


# The formula, for each scope and norm.

MEASURES = {
    "l2": lambda x: np.sqrt(np.square(x).sum()),
    "rms": lambda x: np.sqrt(np.square(x).mean()),
    "max": lambda x: np.abs(x).max(),
}


def cut(name, values, scope):
    """Yield the row and the index of each part of a parameter that is in one row."""
    if scope == "global":
        yield "global", ...
    elif scope == "group":
        yield f"group {int(name.endswith('bias'))}", ...
    elif scope == "parameter" or values.ndim < 2:
        yield name, ...
    else:
        axis = 1 if name == "transposed.weight" else 0
        groups = 2 if name == "transposed.weight" else 1
        for group in range(groups):
            for unit in range(values.shape[axis]):
                index = [slice(None)] * values.ndim
                index[axis] = unit
                if groups > 1:
                    half = values.shape[0] // groups
                    index[0] = slice(group * half, (group + 1) * half)
                yield f"{name} {group} {unit}", tuple(index)


def clip_by_formula(before, after, scope, norm, ratio, eps):
    """Return the weights and how many rows were clipped."""
    rows = {}
    for name, values in before.items():
        for row, index in cut(name, values.numpy(), scope):
            rows.setdefault(row, []).append((name, index))
    result, clipped = {k: v.numpy().copy() for k, v in after.items()}, 0
    measure = MEASURES[norm]
    for parts in rows.values():
        old = np.concatenate([before[k].numpy()[i].ravel() for k, i in parts])
        new = np.concatenate([after[k].numpy()[i].ravel() for k, i in parts])
        threshold = ratio * max(measure(old), eps)
        if (size := measure(new - old)) > threshold:
            clipped += 1
            for name, index in parts:
                first = before[name].numpy()[index]
                step = after[name].numpy()[index] - first
                result[name][index] = first + threshold / size * step
    return result, clipped, len(rows)


OPTIMIZERS = {
    "momentum": lambda groups: torch.optim.SGD(
        groups, lr=0.2, momentum=0.9, weight_decay=0.1
    ),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.02, weight_decay=0.5),
    "adamw, fused": lambda groups: torch.optim.AdamW(groups, lr=0.02, fused=True),
}


def two_groups(model):
    named = list(model.named_parameters())
    weights = [p for k, p in named if not k.endswith("bias")]
    return [
        {"params": weights},
        {"params": [p for k, p in named if k.endswith("bias")]},
    ]


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("scope", ["global", "group", "parameter", "unit"])
@pytest.mark.parametrize("norm", MEASURES)
def test_the_update_follows_the_formula(kind, scope, norm):
    """An optimizer without a clipper takes the same steps from the same weights."""
    ours, free = Net(), Net()
    optimizer, reference = (OPTIMIZERS[kind](two_groups(m)) for m in (ours, free))
    ratio, eps = {"l2": (0.05, 0.2), "rms": (0.05, 0.1), "max": (0.015, 0.2)}[norm]
    UpdateClipper(ours, optimizer, ParamRatio(ratio, eps=eps), scope=scope, norm=norm)
    clipped = rows = 0
    for step in range(4):
        before = snapshot(ours)
        with torch.no_grad():
            for p, q in zip(free.parameters(), ours.parameters(), strict=True):
                p.copy_(q)
        for model in (ours, free):
            give_gradients(model, step, size=2.0 if step == 2 else 0.3)
        for group in [*optimizer.param_groups, *reference.param_groups]:
            group["lr"] *= {1: 0.01, 2: 100.0}.get(step, 1.0)
        optimizer.step()
        reference.step()
        expected, count, of = clip_by_formula(
            before, snapshot(free), scope, norm, ratio, eps
        )
        clipped, rows = clipped + count, rows + of
        for name, p in ours.named_parameters():
            np.testing.assert_allclose(
                p.detach().numpy(), expected[name], rtol=1e-6, atol=1e-9
            )
    assert 0 < clipped < rows


@pytest.mark.parametrize("scope", ["parameter", "unit"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "complex64"])
def test_a_row_within_its_bound_is_unchanged_bit_for_bit(scope, dtype):
    """Every second unit gets a large gradient, and so does the second parameter."""
    weights = torch.randn(6, 3).to(getattr(torch, dtype))
    weights[0] = -0.0
    ours, free = (nn.ParameterList([weights.clone(), weights.clone()]) for _ in "ab")
    optimizer, reference = (
        torch.optim.SGD(m.parameters(), lr=0.1) for m in (ours, free)
    )
    clipper = UpdateClipper(ours, optimizer, Fixed(0.5), scope=scope)
    large = torch.tensor([0.1, 100.0] * 3)[:, None]
    for model in (ours, free):
        model[0].grad = torch.full((6, 3), 0.1, dtype=weights.dtype)
        model[1].grad = (large * torch.ones(6, 3)).to(weights.dtype)
    optimizer.step()
    reference.step()
    same = [torch.equal(a, b) for a, b in zip(ours, free, strict=True)]
    assert same == [True, False]
    if scope == "unit":
        assert torch.equal(ours[1][::2], free[1][::2])
        change = (ours[1] - weights).detach()[1::2].to(torch.complex128)
        norms = change.abs().square().sum(1).sqrt()
        tolerance = {"bfloat16": 2e-2, "float16": 2e-3}.get(dtype, 1e-6)
        torch.testing.assert_close(
            norms, torch.full_like(norms, 0.5), rtol=tolerance, atol=0
        )
    assert clipper.metrics()["clip/update_clipped"] == (
        0.25 if scope == "unit" else 0.5
    )


# Rows that are removed.


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_row_that_is_not_finite_is_restored_and_warned_of_once(value):
    model = Net(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clipper = UpdateClipper(model, optimizer, Fixed(1e3))
    with torch.no_grad():
        model.linear.weight[0, 0] = -0.0
    before = snapshot(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(3):
            give_gradients(model, step)
            model.linear.weight.grad[1, 1] = value
            optimizer.step()
    after = snapshot(model)
    assert [k for k in before if torch.equal(before[k], after[k])] == ["linear.weight"]
    assert torch.signbit(after["linear.weight"][0, 0])
    assert len(caught) == 1
    assert "not finite" in str(caught[0].message)
    assert caught[0].filename == __file__
    assert clipper.metrics()["clip/update_nonfinite_total"] == 3


def test_raise_restores_all_rows_and_the_next_step_starts_clean():
    model = Net(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clipper = UpdateClipper(model, optimizer, Fixed(1e3), nonfinite="raise")
    before = snapshot(model)
    give_gradients(model, 0)
    model.linear.weight.grad[1, 1] = NAN
    with pytest.raises(FloatingPointError, match=r"update norm of linear\.weight"):
        optimizer.step()
    assert all(torch.equal(p, before[k]) for k, p in model.named_parameters())
    train(optimizer, model, 1)
    assert clipper.metrics()["clip/update_steps"] == 1
    assert clipper.metrics()["clip/update_clipped"] == 0


def test_a_dropped_row_is_restored_and_a_propagated_row_is_not():
    model = Net(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    clipper = UpdateClipper(model, optimizer, Drop(Fixed(50.0)), nonfinite="propagate")
    before = snapshot(model)
    give_gradients(model, 0)
    model.linear.weight.grad.mul_(1e6)
    model.linear.bias.grad[0] = NAN
    optimizer.step()
    assert torch.equal(model.linear.weight, before["linear.weight"])
    assert model.linear.bias.isnan().tolist() == [True, False, False]
    assert clipper.metrics()["clip/update_dropped_total"] == 1


def test_a_step_that_fails_leaves_nothing_behind():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=100.0)
    UpdateClipper(model, optimizer, ParamRatio(0.01, eps=0.1))

    def fail():
        with torch.no_grad():
            model.linear.weight.fill_(7.0)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        optimizer.step(fail)
    train(optimizer, model, 1)
    change = torch.linalg.vector_norm(model.linear.weight.detach() - 7.0)
    assert change == pytest.approx(0.01 * 7 * np.sqrt(12), rel=1e-6)


# Which parameters are copied and measured.


def test_frozen_unused_and_foreign_parameters_are_left_out():
    """The optimizer steps the linear layer and the norm; nothing else is a row."""
    model = Net()
    model.linear.bias.requires_grad_(False)
    stepped = [*model.linear.parameters(), *model.norm.parameters()]
    optimizer = torch.optim.SGD(stepped, lr=100.0, weight_decay=0.1)
    clipper = UpdateClipper(model, optimizer, ParamRatio(0.1), exclude="norm.bias")
    give_gradients(model, 0)
    model.norm.weight.grad = None
    before = snapshot(model)
    optimizer.step()
    assert clipper.names == ["linear.weight", "linear.bias", "norm.weight"]
    metrics = clipper.metrics(per_row=True)
    norms = [metrics[f"clip/update_norm/{name}"] for name in clipper.names]
    assert np.isfinite(norms).tolist() == [True, False, False]
    after = snapshot(model)
    changed = [k for k in before if not torch.equal(before[k], after[k])]
    assert changed == ["linear.weight", "norm.bias"]
    assert len(clipper._stepper._copies._buffers) == 1


def test_the_copies_reuse_their_memory_and_follow_a_conversion():
    model = Net(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=100.0)
    clipper = UpdateClipper(model, optimizer, ParamRatio(0.1))
    train(optimizer, model, 1)
    buffers = clipper._stepper._copies._buffers
    places = [buffer.data_ptr() for buffer in buffers.values()]
    train(optimizer, model, 2)
    assert [buffer.data_ptr() for buffer in buffers.values()] == places
    model.double()
    before = model.linear.weight.detach().clone()
    train(optimizer, model, 1, start=3)
    change = torch.linalg.vector_norm(model.linear.weight.detach() - before)
    assert change == pytest.approx(0.1 * float(before.norm()), rel=1e-6)


def test_tied_parameters_count_once():
    model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False)})
    model["b"] = nn.Linear(3, 3, bias=False)
    model["b"].weight = model["a"].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    clipper = UpdateClipper(model, optimizer, Fixed(1e3), scope="global")
    model["a"].weight.grad = torch.full((3, 3), 2.0)
    optimizer.step()
    assert clipper.metrics()["clip/update_norm"] == pytest.approx(6.0)


def test_parameters_that_the_optimizer_gets_later_are_clipped_in_its_next_step():
    model = Net()
    optimizer = torch.optim.SGD(model.linear.parameters(), lr=100.0)
    clipper = UpdateClipper(model, optimizer, ParamRatio(0.1))
    train(optimizer, model, 1)
    optimizer.add_param_group({"params": model.conv.parameters()})
    before = model.conv.weight.detach().clone()
    train(optimizer, model, 1, start=1)
    assert clipper.names[2:] == ["conv.weight", "conv.bias"]
    change = torch.linalg.vector_norm(model.conv.weight.detach() - before)
    assert change == pytest.approx(0.1 * float(before.norm()), rel=1e-6)
    assert clipper.metrics()["clip/update_steps"] == 2


SPARSE = {
    "SparseAdam": lambda p: torch.optim.SparseAdam(p, lr=0.5),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.5),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.5),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9),
}


# torch's own Adagrad makes sparse tensors.
@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@pytest.mark.parametrize("kind", SPARSE)
@pytest.mark.parametrize("scope", ["parameter", "unit"])
def test_of_a_sparse_gradient_the_touched_rows_are_clipped(kind, scope):
    """With momentum, every row may change, and the whole weight is copied."""
    weights = torch.randn(7, 2, dtype=torch.float64)
    ours, free = (nn.Embedding(7, 2, sparse=True).double() for _ in "ab")
    optimizer, reference = (SPARSE[kind](m.parameters()) for m in (ours, free))
    clipper = UpdateClipper(ours, optimizer, ParamRatio(0.1, eps=0.1), scope=scope)
    with torch.no_grad():
        ours.weight.copy_(weights)
    for step, index in enumerate([[1, 4, 4], [0, 1], [5]]):
        before = ours.weight.detach().clone()
        with torch.no_grad():
            free.weight.copy_(before)
        for model in (ours, free):
            model.zero_grad()
            (model(torch.tensor(index)).sum() * (1 + step)).backward()
        optimizer.step()
        reference.step()
        axes = (0, 1) if scope == "parameter" else (1,)
        change = free.weight.detach() - before
        norms = change.square().sum(axes, keepdim=True).sqrt()
        old = before.square().sum(axes, keepdim=True).sqrt()
        scale = (0.1 * old.clamp(min=0.1) / norms).clamp(max=1)
        expected = before + torch.where(norms > 0, scale, 1) * change
        torch.testing.assert_close(ours.weight.detach(), expected, rtol=4e-6, atol=1e-9)
    assert clipper.metrics()["clip/update_clip_rate"] > 0
    has_copy = bool(clipper._stepper._copies._buffers)
    assert has_copy == (kind == "SGD with momentum")


# Closures, loss scales, other hooks.


@pytest.mark.parametrize("by_keyword", [False, True])
def test_with_a_closure_the_weights_are_copied_before_it(by_keyword):
    """The closure computes the gradients, and may be None."""
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=100.0)
    UpdateClipper(model, optimizer, ParamRatio(0.1, eps=1e-9))
    before = snapshot(model)

    def closure():
        give_gradients(model, 0)
        return 3.0

    result = optimizer.step(closure=closure) if by_keyword else optimizer.step(closure)
    assert result == 3.0
    for name, p in model.named_parameters():
        change = torch.linalg.vector_norm(p.detach() - before[name])
        limit = 0.1 * max(float(before[name].norm()), 1e-9)
        assert float(change) == pytest.approx(limit, rel=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_under_a_scaler_records_nothing(fused):
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    clipper = UpdateClipper(model, optimizer, Quantile(0.5, history_length=8))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor in (1.0, INF, 2.0):
        before = model.weight.detach().clone()
        optimizer.zero_grad()
        scaler.scale((model.weight * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, model.weight) == (factor == INF)
    recorded = UpdateClipper.state_dict(clipper)["states"][0]
    assert int(recorded["count"].sum()) == 2


def hook_orders():
    """Yield both orders of registering a gradient clipper and an update clipper."""
    return pytest.mark.parametrize("first", ["gradient", "update"])


@hook_orders()
def test_an_update_that_a_gradient_clipper_cancelled_is_not_recorded(first):
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=100.0, momentum=0.9)
    made = {
        "gradient": lambda: NormClip(model, max_norm=1.0, nonfinite="skip").attach(
            optimizer
        ),
        "update": lambda: UpdateClipper(model, optimizer, ParamRatio(0.1)),
    }
    order = [first, *(set(made) - {first})]
    clippers = {name: made[name]() for name in order}
    train(optimizer, model, 1)
    before = snapshot(model)
    give_gradients(model, 1)
    model.linear.weight.grad[0, 0] = NAN
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert all(torch.equal(p, before[k]) for k, p in model.named_parameters())
    metrics = clippers["update"].metrics()
    assert metrics["clip/update_clip_rate"] == 1.0, "the second step is not observed"
    assert metrics["clip/update_nonfinite_total"] == 0


class FreesGradients(torch.optim.Optimizer):
    """An optimizer that removes each gradient once it is used."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else closure()
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                p.sub_(100 * p.grad)
                p.grad = None
        return loss


@pytest.mark.parametrize("has_closure", [False, True])
def test_a_gradient_may_be_removed_within_the_step(has_closure):
    """An unused parameter is copied before a closure, and has no update."""
    model = Net()
    optimizer = FreesGradients(model.parameters())
    clipper = UpdateClipper(model, optimizer, ParamRatio(0.1, eps=1e-9))
    before = snapshot(model)

    def closure():
        give_gradients(model, 0)
        model.conv.weight.grad = None

    if has_closure:
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()
    change = torch.linalg.vector_norm(
        model.linear.weight.data - before["linear.weight"]
    )
    assert float(change) == pytest.approx(0.1 * before["linear.weight"].norm())
    norms = clipper.metrics(per_row=True)
    assert np.isnan(norms["clip/update_norm/conv.weight"])
    assert norms["clip/update_clip_rate"] == 1


class DecaysWeights(torch.optim.SGD):
    """torch runs the hooks for the step of the class and for that of its base."""

    fails = False

    def step(self, closure=None):
        with torch.no_grad():
            for group in self.param_groups:
                torch._foreach_mul_(group["params"], 0.9)
        super().step(closure)
        if self.fails:
            raise KeyError("the step failed")
        with torch.no_grad():
            for group in self.param_groups:
                torch._foreach_mul_(group["params"], 0.5)


def test_the_update_is_that_of_the_whole_step_of_a_subclass():
    torch.optim.SGD([nn.Parameter(torch.zeros(1))])  # torch hooks the class once
    model = Net()
    optimizer = DecaysWeights(model.parameters(), lr=100.0)
    clipper = UpdateClipper(model, optimizer, ParamRatio(0.1, eps=0.1), norm="rms")
    for step, fails in enumerate((False, True, False, False)):
        optimizer.fails = fails
        optimizer.param_groups[0]["lr"] = 100.0 * 10**step
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(KeyError) if fails else nullcontext():
            train(optimizer, model, 1)
        if not fails:
            for parameter, old in zip(model.parameters(), before, strict=True):
                change = float((parameter.data - old).square().mean().sqrt())
                bound = 0.1 * max(float(old.square().mean().sqrt()), 0.1)
                assert change == pytest.approx(bound, rel=1e-4)
    assert clipper.metrics()["clip/update_steps"] == 3
    assert clipper.metrics()["clip/update_clip_rate"] == 1


@pytest.mark.parametrize("wrap", ["schedule", "clipped", "attached", "zero_grad"])
@hook_orders()
def test_other_hooks_may_come_before_or_after(wrap, first):
    """The weights are those of the two clippers by hand."""
    ours, free = Net(), Net()
    optimizer = torch.optim.SGD(ours.parameters(), lr=1.0, momentum=0.9)
    reference = torch.optim.SGD(free.parameters(), lr=1.0, momentum=0.9)
    gradient, outer, schedules = NormClip(free, max_norm=0.3), optimizer, []

    def add_other():
        nonlocal outer
        if wrap == "schedule":
            schedules.append(torch.optim.lr_scheduler.StepLR(outer, 2, gamma=0.5))
        elif wrap == "clipped":
            outer = NormClip.as_optimizer(outer, max_norm=0.3)
        elif wrap == "attached":
            NormClip(ours, max_norm=0.3).attach(outer)
        else:
            outer.register_step_post_hook(lambda o, *_: o.zero_grad())

    if first == "gradient":
        add_other()
    UpdateClipper(ours, outer, ParamRatio(0.01, eps=0.2))
    if first == "update":
        add_other()
    if wrap == "schedule":
        schedules.append(torch.optim.lr_scheduler.StepLR(reference, 2, gamma=0.5))
    for step in range(4):
        before = snapshot(ours)
        with torch.no_grad():
            for p, q in zip(free.parameters(), ours.parameters(), strict=True):
                p.copy_(q)
        for model in (ours, free):
            give_gradients(model, step)
        if wrap in ("clipped", "attached"):
            gradient.step()
        outer.step()
        reference.step()
        for schedule in schedules:
            schedule.step()
        expected, count, _ = clip_by_formula(
            before, snapshot(free), "parameter", "l2", 0.01, 0.2
        )
        assert count
        for name, p in ours.named_parameters():
            np.testing.assert_allclose(
                p.detach().numpy(), expected[name], rtol=1e-6, atol=1e-9
            )


# State, copies, dry run.


def pickled(objects):
    return pickle.loads(pickle.dumps(objects))


def test_a_resumed_run_is_identical_bit_for_bit():
    def make():
        model = Net(torch.float32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        policy = MeanStd(0.5, history_length=4)
        return model, optimizer, UpdateClipper(model, optimizer, policy, scope="unit")

    model, optimizer, clipper = make()
    train(optimizer, model, 6)
    parts = model, optimizer, clipper
    saved = pickled([part.state_dict() for part in parts])
    other, other_optimizer, other_clipper = make()
    for part, state in zip((other, other_optimizer, other_clipper), saved, strict=True):
        part.load_state_dict(state)
    for m, o in ((model, optimizer), (other, other_optimizer)):
        train(o, m, 6, start=6)
    assert all(
        torch.equal(a, b)
        for a, b in zip(*map(Net.parameters, (model, other)), strict=True)
    )
    assert clipper.metrics() == other_clipper.metrics()
    assert clipper.metrics()["clip/update_clip_rate"] > 0


@pytest.mark.parametrize("clone", [copy.deepcopy, pickled])
def test_a_copy_has_the_state_and_no_optimizer(clone):
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    clipper = UpdateClipper(model, optimizer, Quantile(0.5, history_length=4))
    train(optimizer, model, 3)
    twin, twin_optimizer, twin_clipper = clone((model, optimizer, clipper))
    assert twin_clipper.state_dict()["states"][0].keys()
    assert not twin_optimizer._optimizer_step_pre_hooks
    twin_clipper.detach()
    again = UpdateClipper(twin, twin_optimizer, Quantile(0.5, history_length=4))
    again.load_state_dict(twin_clipper.state_dict())
    for m, o in ((model, optimizer), (twin, twin_optimizer)):
        train(o, m, 3, start=3)
    assert all(
        torch.equal(a, b)
        for a, b in zip(*map(Net.parameters, (model, twin)), strict=True)
    )


def test_a_dry_run_decides_and_writes_nothing():
    ours, free = Net(), Net()
    optimizer, reference = (
        torch.optim.SGD(m.parameters(), lr=1.0) for m in (ours, free)
    )
    clipper = UpdateClipper(ours, optimizer, Fixed(0.1), dry_run=True)
    train(optimizer, ours, 2)
    train(reference, free, 2)
    assert all(
        torch.equal(a, b)
        for a, b in zip(*map(Net.parameters, (ours, free)), strict=True)
    )
    assert clipper.metrics()["clip/update_clip_rate"] == 1
    clipper.dry_run = False
    before = snapshot(ours)
    train(optimizer, ours, 1, start=2)
    change = ours.linear.weight.detach() - before["linear.weight"]
    assert float(change.norm()) == pytest.approx(0.1, rel=1e-6)


def test_the_optimizer_keeps_the_clipper_alive_until_it_is_detached():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=100.0)
    UpdateClipper(model, optimizer, ParamRatio(0.1))
    with pytest.raises(ValueError, match="at most one update clipper"):
        UpdateClipper(model, optimizer, ParamRatio(0.1))
    before = snapshot(model)
    train(optimizer, model, 1)
    change = float((model.linear.weight.detach() - before["linear.weight"]).norm())
    assert change == pytest.approx(
        0.1 * float(before["linear.weight"].norm()), rel=1e-6
    )


def test_scale_only_measures_the_rest_and_scales_a_part():
    """The bias belongs to the norm of the row, (12, 0, 3); the weight is scaled."""
    model = nn.Linear(2, 1).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    UpdateClipper(model, optimizer, Fixed(5.0), scope="global", scale_only="weight")
    before = snapshot(model)
    model.weight.grad = torch.tensor([[12.0, 0.0]], dtype=torch.float64)
    model.bias.grad = torch.tensor([3.0], dtype=torch.float64)
    optimizer.step()
    change = {
        k: (p.detach() - before[k]).flatten().tolist()
        for k, p in model.named_parameters()
    }
    assert change["bias"] == [-3.0]
    assert change["weight"] == pytest.approx([-12 * 5 / 153**0.5, 0])
