"""A real `torch.amp.GradScaler("cpu")` with the clippers, in every order of calls."""

import pytest
import torch

from autoclip_core import Drop, Fixed, Quantile
from autoclip_torch import Clipper, NormClip, QuantileClip, TrustClip, ValueClip

OVERFLOWS = [2, 3, 8]
"""The steps whose scaled gradient overflows."""


def make(fused=False, scope="global", **keywords):
    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = torch.optim.Adam([weight], lr=0.1, fused=fused)
    clipper = Clipper(
        [weight], Quantile(0.5, history_length=8), scope=scope, **keywords
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    return weight, optimizer, clipper, scaler


def backward(weight, optimizer, scaler, step, bad=OVERFLOWS):
    """Compute a gradient of norm `step + 1`, or an infinite one."""
    optimizer.zero_grad()
    size = float("inf") if step in bad else step + 1.0
    scaler.scale(weight @ torch.tensor([0.6, 0.8]) * size).backward()


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_scaler_that_unscales_the_optimizer_inside_is_refused(by_hand):
    """It would unscale the gradients again when it steps the wrapper."""
    weight, inner, clipper, scaler = make()
    optimizer = NormClip.as_optimizer(inner, max_norm=1.0)
    backward(weight, optimizer, scaler, 0)
    if by_hand:
        clipper.step(scaler=scaler, optimizer=inner)
    else:
        scaler.unscale_(inner)
    with pytest.raises(RuntimeError, match="give both the optimizer of as_optimizer"):
        scaler.step(optimizer)
    torch.amp.GradScaler("cpu", enabled=False).step(optimizer)


def window(clipper):
    state = clipper.state_dict()["states"][0]
    return state["ring"][0, : state["count"][0]].tolist()


@pytest.mark.parametrize("nonfinite", ["zero", "skip", "raise", "propagate"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("who", ["clipper", "user", "hook", "hook, user"])
def test_a_run_with_overflows_is_the_run_without_those_steps(who, fused, nonfinite):
    weight, optimizer, clipper, scaler = make(fused, nonfinite=nonfinite)
    if "hook" in who:
        clipper.attach(optimizer)
    for step in range(8 + len(OVERFLOWS)):
        backward(weight, optimizer, scaler, step)
        if "user" in who:
            scaler.unscale_(optimizer)
        if "hook" not in who:
            clipper.step(scaler=scaler, optimizer=optimizer)
        scaler.step(optimizer)
        scaler.update()
    good = [step for step in range(8 + len(OVERFLOWS)) if step not in OVERFLOWS]
    assert window(clipper) == pytest.approx([step + 1.0 for step in good], rel=1e-6)
    assert clipper.metrics()["clip/nonfinite_total"] == 0
    assert clipper.metrics()["clip/skipped_total"] == 0
    assert scaler.get_scale() == 2.0 ** (10 - len(OVERFLOWS))

    other, plain, by_hand, _ = make(fused)
    for step in good:
        backward(other, plain, torch.amp.GradScaler("cpu", enabled=False), step, ())
        by_hand.step()
        plain.step()
    torch.testing.assert_close(weight.data, other.data, rtol=1e-6, atol=0)


@pytest.mark.parametrize("nonfinite", ["zero", "skip"])
@pytest.mark.parametrize("by", ["unscale_ by hand", "the scaler"])
def test_a_start_of_overflows_ends_with_finite_weights_and_a_clean_history(
    by, nonfinite
):
    weight, optimizer, clipper, scaler = make(nonfinite=nonfinite)
    for step in range(8):
        backward(weight, optimizer, scaler, step, bad=(0, 1))
        if by == "the scaler":
            clipper.step(scaler=scaler, optimizer=optimizer)
        else:
            scaler.unscale_(optimizer)
            clipper.step()
        scaler.step(optimizer)
        scaler.update()
    assert bool(weight.isfinite().all())
    assert window(clipper) == pytest.approx([3, 4, 5, 6, 7, 8], rel=1e-6)
    assert scaler.get_scale() == 2.0**8
    assert optimizer.state[weight]["step"] == 6


@pytest.mark.parametrize("scope", ["parameter", "unit"])
@pytest.mark.parametrize("unscaled", [False, True], ids=["scaled", "unscaled"])
def test_at_other_scopes_a_fused_optimizer_receives_unscaled_gradients(unscaled, scope):
    weight, optimizer, clipper, scaler = make(True, scope)
    clipper.attach(optimizer)
    for step in range(6):
        backward(weight, optimizer, scaler, step, bad=(1,))
        if unscaled:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert window(clipper) == pytest.approx([1, 3, 4, 5, 6], rel=1e-6)
    assert bool(weight.isfinite().all())


def test_a_value_clip_of_a_fused_optimizer_clamps_true_gradients():
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    ValueClip([weight], clip_value=1.0).attach(optimizer)
    scaler.scale(weight @ torch.tensor([0.5, -4.0])).backward()
    scaler.step(optimizer)
    torch.testing.assert_close(weight.data, torch.tensor([-0.5, 1.0]))


def test_a_skip_never_lowers_the_loss_scale():
    for fused in (False, True):
        weight, optimizer, _, scaler = make(fused)
        clipper = Clipper([weight], Drop(Fixed(2.0), action="skip"), scope="global")
        clipper.attach(optimizer)
        for step in range(4):
            backward(weight, optimizer, scaler, step, bad=())
            scaler.step(optimizer)
            scaler.update()
        assert clipper.metrics()["clip/skipped_total"] == 2
        assert optimizer.state[weight]["step"] == 2
        assert scaler.get_scale() == 2.0**10


def test_two_optimizers_are_unscaled_each_once():
    weights = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    optimizers = [torch.optim.SGD([w], lr=0.0) for w in weights]
    clippers = [NormClip([w], max_norm=1.0) for w in weights]
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for _ in range(2):
        scaler.scale(sum(3 * w for w in weights)).backward()
        for clipper, optimizer in zip(clippers, optimizers, strict=True):
            norm = clipper.step(scaler=scaler, optimizer=optimizer).norm
            assert norm.tolist() == [3.0]
            scaler.step(optimizer)
            optimizer.zero_grad()
        scaler.update()


def test_a_disabled_scaler_changes_nothing():
    weight, optimizer, clipper, _ = make()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    backward(weight, optimizer, scaler, 4, ())
    assert clipper.step(
        scaler=scaler, optimizer=optimizer
    ).norm.item() == pytest.approx(5)


def test_a_scaler_without_an_optimizer_is_refused():
    _, optimizer, clipper, scaler = make()
    with pytest.raises(TypeError, match="got no optimizer"):
        clipper.step(scaler=scaler)
    with pytest.raises(TypeError, match="got no scaler"):
        clipper.step(optimizer=optimizer)


def test_a_clip_after_the_scaler_s_step_is_refused():
    weight, optimizer, clipper, scaler = make()
    backward(weight, optimizer, scaler, 0)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="must be called before"):
        clipper.step(scaler=scaler, optimizer=optimizer)


def test_zeroing_infinities_before_unscale_warns():
    """The scaler does not notice the overflow, so its scale stays too high."""
    weight, optimizer, clipper, scaler = make()

    def wrong_order(step):
        backward(weight, optimizer, scaler, step, bad=range(5, 40))
        clipper.step()
        scaler.step(optimizer)
        scaler.update()

    wrong_order(0)
    with pytest.warns(UserWarning, match="multiplied by the loss scale"):
        wrong_order(1)
    for step in range(2, 14):  # after a growth of the scale, gradients overflow
        wrong_order(step)
    assert scaler.get_scale() == 2.0**10
    with pytest.warns(UserWarning, match="10 of the last 15 steps were not finite"):
        wrong_order(14)


def every_second(clipper, weight, steps, first=0):
    for step in range(first, first + steps):
        weight.grad = torch.full((2,), float("inf") if step % 2 else 1.0)
        clipper.step()


def test_frequent_infinities_warn_once():
    """A loss scale that overflows, no longer grows and never falls looks like this."""
    weight = torch.nn.Parameter(torch.ones(2))
    clipper = NormClip([weight], max_norm=1.0)
    every_second(clipper, weight, 19)
    with pytest.warns(UserWarning, match="10 of the last 20 steps were not finite"):
        every_second(clipper, weight, 1, 19)
    every_second(clipper, weight, 180, 20)


@pytest.mark.parametrize("use", ["a disabled scaler", "attached", "TrustClip"])
def test_the_warning_of_infinities_names_no_scaler_where_none_scales(use):
    weight, optimizer, clipper, _ = make()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    if use == "attached":
        clipper.attach(optimizer)
    if use == "TrustClip":
        clipper = TrustClip(None, optimizer)

    def train(steps):
        for step in range(steps):
            backward(weight, optimizer, scaler, step, bad=range(steps))
            if use == "a disabled scaler":
                clipper.step(scaler=scaler, optimizer=optimizer)
            scaler.step(optimizer)

    with pytest.warns(UserWarning, match="were not finite") as warned:
        train(12)
    assert "scaler" not in str(warned[0].message).lower()


def test_a_rare_infinity_does_not_warn():
    weight = torch.nn.Parameter(torch.ones(2))
    clipper = NormClip([weight], max_norm=1.0)
    for step in range(600):
        weight.grad = torch.full((2,), float("nan") if step % 12 == 0 else 1.0)
        clipper.step()
    assert clipper.metrics()["clip/nonfinite_total"] == 50


@pytest.mark.parametrize("every", [10, 400])
def test_on_a_device_metrics_warns_of_infinities(every):
    weight = torch.nn.Parameter(torch.ones(2))
    clipper = NormClip([weight], max_norm=1.0)
    clipper._stepper.move_states = lambda gradients: None
    clipper._policy_states.move_to(torch.device("cpu"))  # like an accelerator
    every_second(clipper, weight, every)
    if every == 10:
        clipper.metrics()  # 5 of 10
        every_second(clipper, weight, every)
    with pytest.warns(UserWarning, match="of the last (20|400) steps were not finite"):
        clipper.metrics()
    every_second(clipper, weight, 200)
    clipper.metrics()


@pytest.mark.parametrize("what", ["observed", "loaded"])
def test_counts_that_were_observed_or_loaded_do_not_warn(what):
    weight = torch.nn.Parameter(torch.ones(2))
    clipper = NormClip([weight], max_norm=1.0)
    clipper.observe([float("inf")] * 20 + [1.0])
    clipper.metrics()
    if what == "loaded":
        clipper, state = NormClip([weight], max_norm=1.0), clipper.state_dict()
        clipper.load_state_dict(state)
    every_second(clipper, weight, 18)
    assert clipper.metrics()["clip/nonfinite_total"] == 29
    clipper.reset()
    every_second(clipper, weight, 19)
    with pytest.warns(UserWarning, match="10 of the last 20 steps"):
        every_second(clipper, weight, 1, 19)


def test_a_dry_run_does_not_warn_of_infinities():
    weight = torch.nn.Parameter(torch.ones(2))
    clipper = NormClip([weight], max_norm=1.0, dry_run=True)
    for _ in range(20):
        weight.grad = torch.full((2,), float("nan"))
        clipper.step()
    assert clipper.metrics()["clip/nonfinite_total"] == 20


def test_an_optimizer_of_some_parameters_is_refused_with_its_scaler():
    """The other gradients are still multiplied by the loss scale."""
    a, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    optimizer, other = (torch.optim.SGD([p], lr=0.1) for p in (a, b))
    clipper = NormClip([a, b], max_norm=5.0, scope="parameter")
    scaler.scale((a + b).sum()).backward()
    with pytest.raises(ValueError, match="leaves out 1 with a gradient"):
        clipper.step(scaler=scaler, optimizer=optimizer)
    scaler.unscale_(other)  # as for Muon and AdamW with a common norm
    decision = clipper.step(scaler=scaler, optimizer=optimizer)
    torch.testing.assert_close(decision.norm, torch.tensor([2**0.5, 2**0.5]))
    scaler.update()
    off = torch.amp.GradScaler("cpu", enabled=False)
    clipper.step(scaler=off, optimizer=optimizer)


@pytest.mark.parametrize(
    "make_clipper", [QuantileClip, NormClip], ids=["quantile", "norm"]
)
def test_bfloat16_needs_no_scaler(make_clipper):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    keywords = {"max_norm": 1.0} if make_clipper is NormClip else {"scope": "global"}
    clipper = make_clipper(model, **keywords)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(100 * torch.randn(8, 4)).square().mean()
    loss.backward()
    true = torch.cat([p.grad.double().flatten() for p in model.parameters()]).norm()
    assert clipper.step().norm.item() == pytest.approx(true.item(), rel=1e-6)


def take_twice(clipper, weight, optimizer, scaler):
    """Clip each of two micro-batches, as if they were two steps."""
    for _ in range(2):
        backward(weight, optimizer, scaler, 0, bad=())
        clipper.step(scaler=scaler, optimizer=optimizer)


def leave_out_a_batch(clipper, weight, optimizer, scaler):
    """Clip a batch, leave it out, and clip the next one."""
    backward(weight, optimizer, scaler, 0, bad=())
    clipper.step(scaler=scaler, optimizer=optimizer)
    optimizer.zero_grad()
    backward(weight, optimizer, scaler, 1, bad=())
    clipper.step(scaler=scaler, optimizer=optimizer)


def clip_for_two_optimizers(clipper, weight, optimizer, scaler):
    """The second call would scale all gradients again."""
    other = torch.optim.SGD([weight])
    backward(weight, optimizer, scaler, 0, bad=())
    for each in (optimizer, other):
        clipper.step(scaler=scaler, optimizer=each)


@pytest.mark.parametrize(
    "use", [take_twice, leave_out_a_batch, clip_for_two_optimizers]
)
@pytest.mark.parametrize("fused", [False, True])
def test_a_second_step_before_the_update_is_refused(use, fused):
    """It would measure gradients that are still multiplied by the loss scale."""
    weight, optimizer, clipper, scaler = make(fused)
    with pytest.raises(RuntimeError, match=r"once before scaler.update\(\), got a sec"):
        use(clipper, weight, optimizer, scaler)
    scaler.update()
    backward(weight, optimizer, scaler, 2, bad=())
    decision = clipper.step(scaler=scaler, optimizer=optimizer)
    assert decision.norm.item() == pytest.approx(3.0)


def test_two_clippers_of_one_accumulated_step_are_allowed():
    weight, optimizer, clipper, scaler = make()
    first = NormClip([weight], max_norm=2.0)
    for _ in range(2):
        optimizer.zero_grad()
        for _ in range(3):
            scaler.scale(weight @ torch.tensor([0.6, 0.8])).backward()
        norms = [
            each.step(scaler=scaler, optimizer=optimizer).norm.item()
            for each in (first, clipper)
        ]
        scaler.step(optimizer)
        scaler.update()
        assert norms == pytest.approx([3.0, 2.0], rel=1e-5)
