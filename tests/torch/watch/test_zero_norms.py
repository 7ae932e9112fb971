"""A clipper that measures norms of 0 only, because something sets gradients to 0."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD

from autoclip_core import Fixed
from autoclip_torch import Clipper, NormClip, QuantileClip, TrustClip, UpdateClipper

STEPS = 20


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))


def sgd(model, lr=1e-3):
    return SGD(model.parameters(), lr=lr)


def train(model, optimizer, *functions, loss_of=None, none=False, steps=STEPS):
    """Take steps: a backward pass, the functions, and the step of the optimizer."""
    for step in range(steps):
        optimizer.zero_grad(set_to_none=none)
        loss = model(torch.randn(8, 3)).square().mean()
        (loss_of(step, loss) if loss_of else loss).backward()
        for function in functions:
            function()
        optimizer.step()


def zero(model):
    return lambda: model.zero_grad(set_to_none=False)


# One warning.


def zeroed_by_hand(make=lambda model: NormClip(model, 1.0)):
    model = network()
    train(model, sgd(model), zero(model), make(model).step)


def zeroed_with_a_norm_for_each_parameter():
    zeroed_by_hand(lambda model: QuantileClip(model, 0.5))


def zeroed_attached():
    model = network()
    NormClip(model, 1.0).attach(optimizer := sgd(model))
    train(model, optimizer, zero(model))


def stepped_in_the_backward_pass():
    model = network()
    for parameter in model.parameters():
        optimizer = SGD([parameter], lr=1e-3)

        def step(_, optimizer=optimizer):
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)

        parameter.register_post_accumulate_grad_hook(step)
    clipper = NormClip(model, 1.0)
    for _ in range(STEPS):
        model(torch.randn(8, 3)).square().mean().backward()
        clipper.step()


WARN = (
    zeroed_by_hand,
    zeroed_with_a_norm_for_each_parameter,
    zeroed_attached,
    stepped_in_the_backward_pass,
)


@pytest.mark.parametrize("scenario", WARN)
def test_gradients_that_are_set_to_0_before_the_clip_warn_once(scenario):
    words = r"have been 0 since its first step, although backward\(\)"
    with pytest.warns(UserWarning, match=words) as warned:
        scenario()
    assert len(warned) == 1


# No warning.


def rare_rewards(none):
    model = network()
    clipper = NormClip(model, 1.0)
    train(
        *(model, sgd(model), clipper.step),
        loss_of=lambda step, loss: loss * (step > 15),
        none=none,
    )
    assert clipper.metrics()["clip/norm"] > 0


def gradients_below_the_smallest_float32():
    model = network()
    train(model, sgd(model), NormClip(model, 1.0).step, loss_of=lambda _, x: x * 1e-40)


def low_rank_update():
    """The second factor starts at 0, and the first one has a clipper of its own."""
    model = network()
    nn.init.zeros_(model[1].weight)
    clippers = [NormClip(layer, 1.0) for layer in model]
    train(model, sgd(model), *(clipper.step for clipper in clippers))


def frozen_by_a_hook():
    model = network()
    for parameter in model.parameters():
        parameter.register_hook(torch.zeros_like)
    train(model, sgd(model), NormClip(model, 1.0).step)


def dry_run():
    model = network()
    clipper = NormClip(model, 1.0, dry_run=True)
    train(model, sgd(model), zero(model), clipper.step)


def updates_of_0():
    for make in (TrustClip, lambda m, o: UpdateClipper(m, o, Fixed(1.0))):
        model = network()
        optimizer = sgd(model, lr=0.0)
        clipper = make(model, optimizer)
        train(model, optimizer)
        assert clipper.metrics()["clip/update_norm"] == 0


def zeroed_after_some_norms():
    """Something else is trained for a while."""
    model = network()
    clipper, optimizer = NormClip(model, 1.0), sgd(model)
    train(model, optimizer, clipper.step, steps=2)
    train(model, optimizer, zero(model), clipper.step)


def another_loss_in_between():
    """A discriminator's loss reaches a generator, which trains in its own step."""
    model = network()
    clipper, optimizer = Clipper(model, Fixed(1.0)), sgd(model)
    for _ in range(STEPS):
        model(torch.randn(8, 3)).mean().backward()
        train(model, optimizer, clipper.step, steps=1)


SILENT = (
    lambda: rare_rewards(none=True),
    lambda: rare_rewards(none=False),
    gradients_below_the_smallest_float32,
    low_rank_update,
    frozen_by_a_hook,
    dry_run,
    updates_of_0,
    zeroed_after_some_norms,
    another_loss_in_between,
)


@pytest.mark.parametrize("scenario", SILENT)
def test_norms_of_0_that_backward_computes_do_not_warn(scenario):
    scenario()


def test_on_a_device_metrics_warns_and_a_step_reads_nothing():
    model = network()
    clipper, optimizer = NormClip(model, 1.0), sgd(model)
    clipper._stepper.move_states = lambda gradients: None
    clipper._policy_states.move_to(torch.device("cpu"))  # like an accelerator
    train(model, optimizer, zero(model), clipper.step)
    for _ in range(5):
        clipper.metrics()
    train(model, optimizer, zero(model), clipper.step, steps=2)
    with pytest.warns(UserWarning, match="have been 0 since its first step"):
        clipper.metrics()
    train(model, optimizer, zero(model), clipper.step, clipper.metrics)


def test_the_hooks_of_a_clipper_are_removed_and_not_copied():
    model = network()
    clipper = NormClip(model, 1.0)
    train(
        *(model, sgd(model), clipper.step),
        loss_of=lambda step, loss: loss * 0,
        steps=5,
    )
    assert all(p._backward_hooks for p in model.parameters())
    copy.deepcopy(clipper)
    train(model, sgd(model), clipper.step, steps=1)
    assert not any(p._backward_hooks for p in model.parameters())
