"""An optimizer in the backward pass: one clipper and one optimizer per parameter."""

import pytest
import torch

from autoclip_torch import AGC, QuantileClip


def model_and_data():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)
    )
    return model, [torch.randn(6, 3) * 3**i for i in range(5)]


def in_backward(make):
    """Clip, use and free each gradient as soon as it is computed."""
    model, data = model_and_data()
    clippers = {}
    for name, p in model.named_parameters():
        optimizer = torch.optim.SGD([p], lr=0.1)
        clippers[name] = make([(name, p)])
        clippers[name].attach(optimizer)

        def step(p, optimizer=optimizer):
            optimizer.step()
            optimizer.zero_grad()

        p.register_post_accumulate_grad_hook(step)
    for x in data:
        model(x).square().mean().backward()
    return model, clippers


def after_backward(make):
    model, data = model_and_data()
    optimizer, clipper = torch.optim.SGD(model.parameters(), lr=0.1), make(model)
    for x in data:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        clipper.step()
        optimizer.step()
    return model, clipper


def quantile(parameters):
    return QuantileClip(parameters, quantile=0.5, history_length=8)


def agc(parameters):
    return AGC(parameters, clipping=0.02)


def assert_the_same(make):
    model, clippers = in_backward(make)
    expected, clipper = after_backward(make)
    for actual, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(actual, wanted)
        assert actual.grad is None
    assert clipper.metrics()["clip/clip_rate"] > 0
    assert {c.metrics()["clip/steps"] for c in clippers.values()} == {5.0}


def test_a_quantile_of_each_parameter():
    assert_the_same(quantile)


def test_agc_by_units():
    assert_the_same(agc)


@pytest.mark.parametrize("scope", ["global", "group"])
def test_a_norm_of_all_is_refused_with_the_reason(scope):
    model, _ = model_and_data()
    clipper = QuantileClip(model, scope=scope)
    for p in model.parameters():
        with pytest.raises(ValueError, match=r"got 1 of the 4: .* no gradient yet"):
            clipper.attach(torch.optim.SGD([p], lr=0.1))


def hooked(model, clipper):
    def step(p):
        clipper.step()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)


@pytest.mark.parametrize("scope", ["global", "group"])
def test_steps_with_missing_gradients_in_the_backward_warn(scope):
    model, data = model_and_data()
    clipper = QuantileClip(model, scope=scope)
    hooked(model, clipper)
    with pytest.warns(UserWarning, match="before 3 gradients .* were computed"):
        model(data[0]).square().mean().backward()
    assert clipper.metrics()["clip/steps"] == 4


def test_steps_with_complete_rows_in_the_backward_do_not_warn():
    model, data = model_and_data()
    hooked(model, QuantileClip(model))
    model(data[0]).square().mean().backward()


def test_an_unused_parameter_does_not_warn_after_the_backward():
    model, data = model_and_data()
    unused = torch.nn.Parameter(torch.ones(2))
    clipper = QuantileClip([*model.parameters(), unused], scope="global")
    model(data[0]).square().mean().backward()
    assert clipper.step().finite.all()


def test_frozen_parameters_need_no_optimizer():
    model, _ = model_and_data()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    assert QuantileClip(model, scope="global").attach(optimizer).active
