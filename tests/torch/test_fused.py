"""Fused optimizers: the kernel scales, and a cancelled step changes nothing."""

import copy

import pytest
import torch

from autoclip_core import Drop, Fixed, Quantile
from autoclip_torch import AGC, Clipper, NormClip, ValueClip
from autoclip_torch.hooks.clipper_chain import ClipperChain

from ..support.torch_device import nothing_read

FUSED = {
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    "Adam amsgrad": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, fused=True),
}
every_optimizer = pytest.mark.parametrize("name", FUSED)


def parameters():
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(5, 3)), torch.nn.Parameter(torch.randn(3))]


def give(params, step, factor=1.0):
    torch.manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape) * 3.0**step * factor


def quantile(params, **keywords):
    policy = Quantile(0.5, history_length=8)
    return Clipper(params, policy, scope="global", **keywords)


def everything(params, optimizer):
    moments = [v for p in params for v in optimizer.state[p].values()]
    return [t.detach().clone() for t in [*params, *moments]]


def same_bits(actual, wanted):
    return all(torch.equal(a, b) for a, b in zip(actual, wanted, strict=True))


@every_optimizer
def test_a_clip_in_the_kernel_equals_a_clip_by_hand(name):
    params, others = parameters(), parameters()
    optimizer, plain = FUSED[name](params), FUSED[name](others)
    clipper, by_hand = quantile(params), quantile(others)
    clipper.attach(optimizer)
    for step in range(6):
        give(params, step)
        optimizer.step()
        give(others, step)
        by_hand.step()
        plain.step()
        for p, other in zip(
            params, others, strict=True
        ):  # the kernel writes the scaled gradients
            torch.testing.assert_close(p.grad, other.grad, rtol=1e-6, atol=0)
    assert clipper.metrics() == by_hand.metrics()
    assert clipper.metrics()["clip/clip_rate"] > 0.5
    for actual, wanted in zip(
        everything(params, optimizer), everything(others, plain), strict=True
    ):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6)
    assert not {"grad_scale", "found_inf"} & set(vars(optimizer))


@every_optimizer
@pytest.mark.parametrize("settings", ["nan", "inf", "drop"])
@pytest.mark.parametrize("scope", ["global", "parameter"])
def test_a_skipped_step_changes_no_bit(name, settings, scope):
    params = parameters()
    optimizer = FUSED[name](params)
    if settings == "drop":
        clipper = Clipper(params, Drop(Fixed(50.0), action="skip"), scope=scope)
    else:
        clipper = Clipper(params, Fixed(50.0), scope=scope, nonfinite="skip")
    clipper.attach(optimizer)
    for step in range(2):
        give(params, step)
        optimizer.step()
    before = everything(params, optimizer)
    give(params, 6)
    if settings != "drop":
        params[1].grad[0] = float(settings)
    optimizer.step()
    assert same_bits(before, everything(params, optimizer))
    assert clipper.metrics()["clip/skipped_total"] == 1
    give(params, 1)
    optimizer.step()
    assert not same_bits(before, everything(params, optimizer))


def test_no_pass_over_the_gradients_and_nothing_read_in_a_step():
    """The kernel alone writes a gradient, and nothing reads a value."""
    params = parameters()
    optimizer = FUSED["AdamW"](params)
    clipper = quantile(params)
    clipper.attach(optimizer)
    chain = ClipperChain.find(optimizer)
    clipper._policy_states.move_to(torch.device("cpu"))  # like an accelerator
    clipper._stepper.move_states = lambda gradients: None
    grads_at_step = []

    def look(optimizer, args, kwargs):
        grads_at_step.append([p.grad.clone() for p in params])
        assert optimizer.grad_scale.shape == optimizer.found_inf.shape == ()

    optimizer.register_step_pre_hook(look)
    for step in range(4):
        give(params, step)
        raw = [p.grad.clone() for p in params]
        with nothing_read():
            chain._before_step(optimizer, (optimizer,), {})
        chain._after_step(optimizer, (optimizer,), {})
        optimizer.step()
        assert same_bits(raw, grads_at_step[-1])
    assert clipper.metrics()["clip/clipped"] == 1


def test_the_clip_factor_multiplies_the_loss_scale():
    params = parameters()
    optimizer = FUSED["SGD"](params)
    NormClip(params, max_norm=1.0).attach(optimizer)
    factors = []
    optimizer.register_step_pre_hook(
        lambda o, args, kwargs: factors.append(
            (o.grad_scale.item(), o.found_inf.item())
        )
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    give(params, 0)
    norm = torch.cat([p.grad.flatten() for p in params]).norm().item()
    scaler.scale(torch.zeros(1))
    give(params, 0, factor=8.0)
    scaler.step(optimizer)
    assert factors == [(pytest.approx(8.0 * norm, rel=1e-6), 0.0)]


def test_nonfinite_zero_cancels_if_the_kernel_scales():
    params = parameters()
    optimizer = FUSED["AdamW"](params)
    clipper = quantile(params)
    clipper.attach(optimizer)
    give(params, 0)
    optimizer.step()
    before = everything(params, optimizer)
    give(params, 1)
    params[0].grad[0, 0] = float("inf")
    optimizer.step()
    assert same_bits(before, everything(params, optimizer))
    assert clipper.metrics()["clip/nonfinite_total"] == 1


def test_an_excluded_parameter_is_not_scaled():
    params = parameters()
    optimizer = FUSED["SGD"](params)
    Clipper(params[:1], Fixed(1e-3), scope="global").attach(optimizer)
    before = copy.deepcopy([p.detach() for p in params])
    give(params, 0)
    raw = params[1].grad.clone()
    optimizer.step()
    torch.testing.assert_close(params[1].data, before[1] - 0.1 * raw)
    assert (params[0].data - before[0]).norm() == pytest.approx(1e-4, rel=1e-3)


def test_agc_of_a_fused_optimizer_is_that_of_a_plain_one():
    params, others = parameters(), parameters()
    optimizer = FUSED["AdamW"](params)
    plain = torch.optim.AdamW(others, lr=0.1, weight_decay=0.1)
    AGC(params).attach(optimizer)
    AGC(others).attach(plain)
    for step in range(3):
        for group, stepped in ((params, optimizer), (others, plain)):
            give(group, step)
            stepped.step()
    for actual, wanted in zip(params, others, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6)


def test_a_dry_run_sets_no_attribute_of_the_optimizer():
    params, others = parameters(), parameters()
    optimizer, plain = FUSED["AdamW"](params), FUSED["AdamW"](others)
    clipper = quantile(params, dry_run=True)
    clipper.attach(optimizer)
    for step in range(4):
        give(params, step)
        optimizer.step()
        give(others, step)
        plain.step()
    assert same_bits(params, others)
    assert clipper.metrics()["clip/clip_rate"] > 0.5


DRY = {
    "rows": lambda p: Clipper(p, Fixed(1.0), dry_run=True),
    "part": lambda p: NormClip(p[:1], max_norm=1.0, dry_run=True),
    "one row": lambda p: NormClip(p, max_norm=1.0, dry_run=True),
    "value": lambda p: ValueClip(p, clip_value=0.5, dry_run=True),
}


@pytest.mark.parametrize("case", DRY)
def test_a_dry_run_leaves_a_loss_scale_in_the_gradients(case):
    """The dry run still measures unscaled norms, and reports what it would clip."""
    params, others = parameters(), parameters()
    optimizer = FUSED["AdamW"](params)
    clipper, by_hand = DRY[case](params), DRY[case](others)
    clipper.attach(optimizer)
    grads_at_step = []
    optimizer.register_step_pre_hook(
        lambda *_: grads_at_step.append([p.grad.clone() for p in params])
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(3):
        scaler.scale(torch.zeros(1))
        give(params, step, factor=8.0)
        raw = [p.grad.clone() for p in params]
        scaler.step(optimizer)
        scaler.update()
        assert same_bits(raw, grads_at_step[-1])
        give(others, step)
        by_hand.step()
    actual, wanted = clipper.metrics(per_row=True), by_hand.metrics(per_row=True)
    assert actual == pytest.approx(wanted, rel=1e-6)
    assert actual["clip/clip_rate"] > 0


def test_too_many_skips_stop_the_run_and_leave_the_optimizer_clean():
    params = parameters()
    optimizer = FUSED["Adam"](params)
    quantile(params, nonfinite="skip", max_consecutive_skips=2).attach(optimizer)
    for step in range(3):
        give(params, step, float("nan"))
        if step < 2:
            optimizer.step()
        else:
            with pytest.raises(RuntimeError, match="max_consecutive_skips=2"):
                optimizer.step()
    assert not {"grad_scale", "found_inf"} & set(vars(optimizer))


def test_a_closure_of_a_fused_optimizer():
    params, others = parameters(), parameters()
    optimizer, plain = FUSED["AdamW"](params), FUSED["AdamW"](others)
    NormClip(params, max_norm=1.0).attach(optimizer)
    by_hand = NormClip(others, max_norm=1.0)
    for step in range(3):
        optimizer.step(lambda step=step: give(params, step))
        give(others, step)
        by_hand.step()
        plain.step()
    for actual, wanted in zip(params, others, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6)
    assert not {"grad_scale", "found_inf"} & set(vars(optimizer))


@pytest.mark.parametrize("attached", ["exclude", "part", "value"])
def test_gradients_that_are_not_clipped_are_unscaled_too(attached):
    """The kernel has one factor; after clipping in place, it unscales nothing."""
    results = []
    for fused in (True, False):
        a, b = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
        optimizer = torch.optim.SGD([a, b], lr=1.0, fused=fused)
        clipper = {
            "exclude": lambda a=a, b=b: NormClip(
                [("a", a), ("b", b)], max_norm=1.0, exclude="b"
            ),
            "part": lambda a=a: NormClip([a], max_norm=1.0),
            "value": lambda a=a: ValueClip([a], clip_value=0.5),
        }[attached]()
        clipper.attach(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for _ in range(2):
            optimizer.zero_grad()
            scaler.scale(((a + b) * torch.tensor([3.0, 4.0])).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append((a.detach(), b.detach()))
        assert torch.equal(b, torch.tensor([-6.0, -8.0]))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("disjoint", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_two_clippers_on_a_fused_optimizer_act_as_on_a_plain_one(disjoint, scaled):
    series = [[3.0, 4.0], [30.0, 40.0], [0.3, 0.4], [float("nan"), 1.0], [0.6, 0.8]]
    results = []
    for fused in (True, False):
        a, b = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
        optimizer = torch.optim.SGD([a, b], lr=1.0, fused=fused)
        skipping, clipping = ([a], [b]) if disjoint else ([a, b], [a, b])
        Clipper(skipping, Drop(Fixed(20.0), action="skip"), scope="global").attach(
            optimizer
        )
        last = NormClip(clipping, max_norm=1.0)
        last.attach(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=scaled)
        for grad in series:
            optimizer.zero_grad()
            first = torch.tensor(grad)
            second = first if not disjoint else torch.ones(2)
            scaler.scale((a * first + b * second).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        assert not {"grad_scale", "found_inf"} & set(vars(optimizer))
        results.append((a.detach().clone(), b.detach().clone(), last.metrics()))
        results[-1][-1].pop("clip/steps")  # without fusion, an overflow is not a step
    assert not torch.equal(results[0][0], torch.zeros(2))
    torch.testing.assert_close(results[0], results[1])


def test_removing_a_handle_after_a_failed_step_leaves_nothing():
    params = parameters()
    optimizer = FUSED["SGD"](params)
    handle = NormClip(params, max_norm=1.0).attach(optimizer)

    def fail(*_):
        raise RuntimeError("another hook")

    optimizer.register_step_pre_hook(fail)
    give(params, 0)
    with pytest.raises(RuntimeError, match="another hook"):
        optimizer.step()
    handle.remove()
    assert not {"grad_scale", "found_inf"} & set(vars(optimizer))


def fails_at(step, optimizer):
    """Make one step of the optimizer fail, after the clipper's hook."""
    steps = iter(range(100))

    def fail(*_):
        if next(steps) == step:
            raise RuntimeError("out of memory")

    optimizer.register_step_pre_hook(fail)


@pytest.mark.parametrize("unscaled", [True, False])
@pytest.mark.parametrize("scope", ["global", "parameter"])
def test_after_a_failed_step_the_next_has_its_own_loss_scale(unscaled, scope):
    """The run equals one without the failed step."""
    results = []
    for failing in (None, 2):
        params = parameters()
        optimizer = FUSED["SGD"](params)
        Clipper(params, Fixed(1.0), scope=scope).attach(optimizer)
        if failing:
            fails_at(failing, optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for step in (0, 1, 2, 3, 4) if failing else (0, 1, 3, 4):
            optimizer.zero_grad()
            torch.manual_seed(step)
            loss = sum((p * torch.randn(p.shape)).sum() for p in params)
            scaler.scale(loss).backward()
            if unscaled:
                scaler.unscale_(optimizer)
            if step == failing:
                with pytest.raises(RuntimeError, match="out of memory"):
                    scaler.step(optimizer)
            else:
                scaler.step(optimizer)
            scaler.update(2.0 ** (10 - 3 * step))
        assert not {"grad_scale", "found_inf"} & set(vars(optimizer))
        results.append([p.detach().clone() for p in params])
    for actual, wanted in zip(*results, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [100.0, 0.1])
def test_a_failed_step_that_dropped_leaves_no_nan(size):
    params = parameters()
    optimizer = FUSED["SGD"](params)
    policy = Drop(Fixed(10.0))
    Clipper(params, policy, scope="global", nonfinite="propagate").attach(optimizer)
    fails_at(0, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(3):
        optimizer.zero_grad()
        factor = 100.0 if step == 0 else size
        scaler.scale(sum(p.sum() for p in params) * factor).backward()
        if step == 0:
            with pytest.raises(RuntimeError, match="out of memory"):
                scaler.step(optimizer)
        else:
            scaler.step(optimizer)
            scaler.update()
        assert all(bool(p.isfinite().all()) for p in params)


def test_an_error_of_the_clipper_leaves_no_loss_scale_behind():
    params = parameters()
    optimizer = FUSED["SGD"](params)
    quantile(params, nonfinite="raise").attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    give(params, 0, float("nan"))
    optimizer.grad_scale = scaler.scale(torch.ones(()))  # as in scaler.step
    with pytest.raises(FloatingPointError):
        optimizer.step()
    assert not {"grad_scale", "found_inf"} & set(vars(optimizer))


def test_an_error_of_the_second_clipper_leaves_nothing_of_the_first():
    """The next step equals that of an optimizer without the error."""
    params, others = parameters(), parameters()
    for bad, group in ((True, params), (False, others)):
        optimizer = FUSED["SGD"](group)
        NormClip(group, max_norm=0.5, nonfinite="propagate").attach(optimizer)
        NormClip(group, max_norm=0.1, nonfinite="raise").attach(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for step in (0, 1) if bad else (1,):
            optimizer.zero_grad()
            size = float("nan") if step == 0 else 1.0
            loss = sum((p * p).sum() for p in group) * size
            scaler.scale(loss).backward()
            if step == 0:
                optimizer.grad_scale = torch.tensor(8.0)  # as scaler.step does
                with pytest.raises(FloatingPointError):
                    optimizer.step()
                assert not {"grad_scale", "found_inf"} & set(vars(optimizer))
            else:
                scaler.step(optimizer)
                scaler.update()
    assert same_bits(params, others)


def test_a_dry_run_after_a_failed_step_has_the_current_loss_scale():
    params = parameters()
    optimizer = FUSED["SGD"](params)
    clipper = NormClip(params, max_norm=1.0, dry_run=True)
    clipper.attach(optimizer)
    fails_at(0, optimizer)
    for scaled in (False, True):
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=scaled)
        for step in range(2):
            optimizer.zero_grad()
            scaler.scale(sum(p.sum() for p in params)).backward()
            if step == 0 and not scaled:
                with pytest.raises(RuntimeError, match="out of memory"):
                    scaler.step(optimizer)
            else:
                scaler.step(optimizer)
                scaler.update()
            assert clipper.metrics()["clip/norm"] == pytest.approx(18**0.5)


def test_without_a_scaler_the_step_after_a_failed_one_is_normal():
    params, others = parameters(), parameters()
    optimizer, plain = FUSED["SGD"](params), FUSED["SGD"](others)
    NormClip(params, max_norm=1.0).attach(optimizer)
    NormClip(others, max_norm=1.0).attach(plain)
    fails_at(0, optimizer)
    give(params, 5)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    for step in range(2):
        give(params, step)
        optimizer.step()
        give(others, step)
        plain.step()
    assert same_bits(params, others)
    assert not {"grad_scale", "found_inf"} & set(vars(optimizer))


def test_a_scaler_without_any_gradient_changes_nothing():
    params = parameters()
    optimizer = FUSED["SGD"](params)
    clipper = quantile(params)
    clipper.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = everything(params, optimizer)
    scaler.scale(torch.ones(()))
    with pytest.warns(UserWarning, match="has not received a gradient"):
        scaler.step(optimizer)
    assert same_bits(before, everything(params, optimizer))
    assert clipper.metrics()["clip/steps"] == 1


def junk():
    """Leave large numbers in free memory, which a new empty tensor then holds."""
    [torch.full((4096,), 7e30) for _ in range(64)].clear()


SGD_SETTINGS = {
    "momentum": {},
    "nesterov": {"nesterov": True},
    "dampening": {"dampening": 0.5},
    "weight decay": {"weight_decay": 0.1},
}


@pytest.mark.parametrize("first", [float("nan"), 1e6], ids=["nan", "dropped"])
@pytest.mark.parametrize("settings", SGD_SETTINGS)
@pytest.mark.parametrize("scope", ["global", "parameter"])
def test_a_momentum_does_not_start_in_a_cancelled_step(settings, first, scope):
    """The kernel leaves it uninitialized. The run equals one without the step."""
    weights = []
    for fused in (True, False):
        weight = torch.nn.Parameter(torch.ones(4096))
        keywords = {"lr": 0.1, "momentum": 0.9, "fused": fused}
        optimizer = torch.optim.SGD([weight], **keywords | SGD_SETTINGS[settings])
        policy = Drop(Fixed(1e4), action="skip")
        clipper = Clipper([weight], policy, scope=scope, nonfinite="skip")
        clipper.attach(optimizer)
        for size in (first, first, 1.0, 2.0):
            weight.grad = torch.full((4096,), size)
            junk()
            optimizer.step()
            if not (size < 3):
                assert not optimizer.state_dict()["state"]
        assert clipper.metrics()["clip/skipped_total"] == 2
        weights.append(weight.detach())
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("way", ["attached", "by hand"])
def test_a_momentum_begins_after_the_overflows_of_a_loss_scale(way, nesterov):
    weights = []
    for fused in (True, False):
        weight = torch.nn.Parameter(torch.zeros(4096))
        optimizer = torch.optim.SGD(
            [weight], lr=0.1, momentum=0.9, nesterov=nesterov, fused=fused
        )
        clipper = NormClip([weight], max_norm=1.0)
        if way == "attached":
            clipper.attach(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for size in (float("inf"), float("inf"), 1.0, 2.0):
            optimizer.zero_grad()
            scaler.scale(weight.sum() * size).backward()
            junk()
            if way == "by hand":
                clipper.step(scaler=scaler, optimizer=optimizer)
            scaler.step(optimizer)
            scaler.update()
        weights.append(weight.detach())
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-6, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("first", [float("nan"), 1.0])
def test_on_a_device_a_cancelled_first_step_leaves_a_momentum_of_zero(first):
    weights = []
    for steps in ((first, 1.0, 2.0), (1.0, 2.0) if first != first else (1.0, 1.0, 2.0)):
        weight = torch.nn.Parameter(torch.ones(4096, device="cuda"))
        optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, fused=True)
        NormClip([weight], max_norm=1e4, nonfinite="skip").attach(optimizer)
        for size in steps:
            weight.grad = torch.full((4096,), size, device="cuda")
            torch.full((4096,), 7e30, device="cuda")
            optimizer.step()
        weights.append(weight.detach())
    assert torch.equal(*weights)
