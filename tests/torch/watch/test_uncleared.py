"""A loop in which nothing clears the gradients: backward adds to clipped ones."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

from autoclip_torch import NormClip, QuantileClip, TrustClip

STEPS = 12


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def compute(model, passes=1):
    for _ in range(passes):
        (model(torch.randn(8, 3)) - 1.0).square().mean().backward()


def by_hand(model, optimizer):
    return NormClip(model, 0.1).step


def of_each_parameter(model, optimizer):
    return QuantileClip(model, quantile=0.5).step


def attached(model, optimizer):
    QuantileClip(model, quantile=0.9, scope="global").attach(optimizer)


def trust(model, optimizer):
    TrustClip(model, optimizer)


def measured(model, optimizer):
    return NormClip(model, 0.1, dry_run=True).step


def nothing():
    pass


def never(optimizer):
    return nothing, nothing


def before(optimizer):
    return optimizer.zero_grad, nothing


def after(optimizer):
    return nothing, optimizer.zero_grad


def in_place(optimizer):
    return lambda: optimizer.zero_grad(set_to_none=False), nothing


def in_data(optimizer):
    """As older code does; it changes no version number."""
    parameters = optimizer.param_groups[0]["params"]

    def clear():
        for parameter in parameters:
            parameter.grad.data.zero_()

    return nothing, clear


def decayed(optimizer):
    """The gradient is a momentum on purpose."""
    parameters = optimizer.param_groups[0]["params"]
    return nothing, lambda: [p.grad.mul_(0.5) for p in parameters]


def texts_of(make, clear_of, optimizer_class=SGD, passes=1):
    """Return the texts of the warnings in some steps."""
    model = network()
    optimizer = optimizer_class(model.parameters(), lr=1e-3)
    clip = make(model, optimizer) or nothing
    clear_before, clear_after = clear_of(optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(STEPS):
            clear_before()
            compute(model, passes=passes)
            clip()
            optimizer.step()
            clear_after()
    return [str(each.message) for each in caught]


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("optimizer_class", [SGD, Adam])
@pytest.mark.parametrize("make", [by_hand, of_each_parameter, attached, trust])
def test_gradients_that_nothing_clears_warn_once(make, optimizer_class, passes):
    [text] = texts_of(make, never, optimizer_class, passes)
    assert "adds new gradients to those that were clipped" in text
    assert "call optimizer.zero_grad() once per update" in text


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("clear_of", [before, after, in_place, in_data, decayed])
@pytest.mark.parametrize("make", [by_hand, of_each_parameter, attached, trust])
def test_cleared_gradients_do_not_warn(make, clear_of, passes):
    assert texts_of(make, clear_of, passes=passes) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("clears", [True, False])
def test_other_types_round_more(dtype, clears):
    model = network().to(dtype)
    optimizer = SGD(model.parameters(), lr=1e-3)
    TrustClip(model, optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(STEPS):
            if clears:
                optimizer.zero_grad()
            (model(torch.randn(8, 3, dtype=dtype)) - 1).square().mean().backward()
            optimizer.step()
    assert len(caught) == (not clears)


def test_a_dry_run_clips_nothing_that_could_be_added_to():
    assert texts_of(measured, never) == []


def test_gradients_of_another_loss_that_are_cleared_later_do_not_warn():
    """The loss of a generator also computes gradients of the discriminator."""
    critic = network()
    optimizer, clipper = SGD(critic.parameters(), lr=1e-3), NormClip(critic, 0.1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        compute(critic)
        clipper.step()
        optimizer.step()
        compute(critic)  # of the generator's loss


def test_micro_batches_that_are_clipped_one_by_one_are_another_warning():
    model = network()
    optimizer, clipper = SGD(model.parameters(), lr=1e-3), NormClip(model, 0.1)

    def train():
        for step in range(STEPS):
            compute(model)
            clipper.step()
            if step % 2:
                optimizer.step()
                optimizer.zero_grad()

    with pytest.warns(UserWarning, match="several times before each optimizer.step"):
        train()


def test_a_clipped_gradient_that_rounding_loses_does_not_warn():
    """A norm of 1e-9 changes no float32 sum: nothing tells whether it was cleared."""
    assert texts_of(lambda model, _: NormClip(model, 1e-9).step, before) == []


def test_a_parameter_that_gets_another_shape_is_not_compared():
    model = nn.Sequential(nn.Linear(3, 4))
    clipper = NormClip(model, 0.1)
    for width in (4, 6, 8, 10):
        model[0].weight.data = torch.ones(width, 3)
        model[0].bias.data = torch.ones(width)
        model.zero_grad()
        compute(model)
        clipper.step()
    assert clipper.metrics()["clip/steps"] == 4


def test_clippers_that_take_one_step_leave_few_hooks():
    model = network()
    for _ in range(STEPS):
        compute(model)
        NormClip(model, 0.1).step()
        model.zero_grad()
    parameters = list(model.parameters())
    assert sum(len(p._backward_hooks or ()) for p in parameters) == 1
    hooks = [p._post_accumulate_grad_hooks or () for p in parameters]
    assert sum(map(len, hooks)) <= 3


@pytest.mark.parametrize("clears", [True, False])
def test_gradients_that_the_loop_computes_for_itself_are_not_accumulated(clears):
    """As a penalty on the gradient, or a log of its norm."""
    model = network()
    parameters = list(model.parameters())
    optimizer, clipper = SGD(parameters, lr=1e-3), NormClip(model, 0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(STEPS):
            if clears:
                optimizer.zero_grad()
            loss = (model(torch.randn(8, 3)) - 1.0).square().mean()
            torch.autograd.grad(loss, parameters, retain_graph=True)
            loss.backward()
            clipper.step()
            optimizer.step()
    assert len(caught) == (not clears)


def test_a_local_model_whose_gradients_are_not_cleared_warns():
    """As in A3C: the optimizer clears and steps a shared model."""
    local, shared = network(), network()
    optimizer, clipper = SGD(shared.parameters(), lr=1e-3), NormClip(local, 0.1)

    def train():
        for _ in range(STEPS):
            optimizer.zero_grad()
            compute(local)
            clipper.step()
            for mine, other in zip(
                local.parameters(), shared.parameters(), strict=True
            ):
                other.grad = mine.grad
            optimizer.step()
            local.load_state_dict(shared.state_dict())

    with pytest.warns(UserWarning, match="another model than the clipper has"):
        train()


def test_a_model_can_be_copied_and_saved_between_two_steps(tmp_path):
    """A warning is an error in this test."""
    model = network()
    clipper = NormClip(model, 0.1)
    compute(model)
    clipper.step()
    torch.save(model, tmp_path / "model.pt")
    copied, _ = copy.deepcopy((model, clipper))
    assert not any(parameter._backward_hooks for parameter in copied.parameters())
