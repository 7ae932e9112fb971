"""The norms "rms" and "max" of a torch clipper: rows, metrics, states, any sizes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from autoclip_core import Fixed
from autoclip_torch import (
    Clipper,
    NormClip,
    QuantileClip,
    ValueClip,
    find_clipping_threshold,
)

from ..support.account import norm_of
from ..support.torch_device import looks_counted, unwatched, watched
from ..support.torch_gradients import normal, parameter

other_norms = pytest.mark.parametrize("norm", ["rms", "max"])
every_path = pytest.mark.parametrize(
    "kind", [lambda gradient: gradient, watched], ids=["cpu", "device"]
)


@every_path
@other_norms
def test_a_parameter_without_a_gradient_does_not_count(norm, kind):
    """Neither in its row nor in the metrics; a frozen one never does."""
    parameters = [nn.Parameter(torch.zeros(n)) for n in (3, 50, 7, 1)]
    groups = [{"params": parameters[:2]}, {"params": parameters[2:]}]
    clipper = Clipper(groups, Fixed(0.5), scope="group", norm=norm)
    for absent in ([1], [], [3], [2, 3]):
        for place, p in enumerate(parameters):
            gradient = normal(len(p), seed=place) * (place + 1)
            p.grad = None if place in absent else kind(gradient)
        before = [[p.grad for p in g["params"]] for g in groups]
        before = [
            [unwatched(g).numpy().copy() for g in row if g is not None]
            for row in before
        ]
        decision = clipper.step()
        expected = [norm_of(row, norm) for row in before]
        np.testing.assert_allclose(unwatched(decision.norm), expected, rtol=1e-6)
        grads = [unwatched(p.grad).numpy() for p in parameters if p.grad is not None]
        with looks_counted():
            metrics = clipper.metrics()
        assert metrics["clip/norm"] == pytest.approx(
            norm_of([*before[0], *before[1]], norm)
        )
        assert metrics["clip/norm_after"] == pytest.approx(norm_of(grads, norm))


@other_norms
def test_a_norm_that_is_observed_is_that_of_all_parameters(norm):
    parameters = [nn.Parameter(torch.zeros(n)) for n in (3, 5)]
    clipper = QuantileClip(parameters, norm=norm)
    parameters[0].grad = torch.ones(3)
    clipper.step()
    clipper.observe([[2.0, 4.0]])
    expected = {"max": 4.0, "rms": ((3 * 4.0 + 5 * 16.0) / 8) ** 0.5}[norm]
    assert clipper.metrics()["clip/norm"] == pytest.approx(expected)


def test_a_state_of_another_norm_is_refused():
    """Its history means something else; `strict=False` does not change that."""
    weight = nn.Parameter(torch.zeros(2))
    states = {n: QuantileClip([weight], norm=n).state_dict() for n in ("l2", "rms")}
    assert "norm" not in states["l2"]
    for norm, other in (("l2", "rms"), ("rms", "l2"), ("max", "l2"), ("max", "rms")):
        clipper = QuantileClip([weight], norm=norm)
        clipper.load_state_dict(clipper.state_dict())
        for strict in (True, False):
            with pytest.raises(
                ValueError, match=f"norm is '{other}' in the .*'{norm}'"
            ):
                clipper.load_state_dict(states[other], strict=strict)


def test_a_clipper_shows_its_norm_and_refuses_an_unknown_one():
    weight = nn.Parameter(torch.zeros(2))
    clipper = NormClip([weight], 1.0, norm="max")
    assert repr(clipper) == "NormClip(max_norm=1.0, scope='global', norm='max', rows=1)"
    assert clipper.norm == "max"
    clipper.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    assert clipper.norm == "max"
    for make in (NormClip, QuantileClip, ValueClip):
        with pytest.raises(ValueError, match="norm must be one of 'l2', 'rms', 'max'"):
            make([weight], 0.5, norm=2.0)


@other_norms
@given(
    exponents=st.lists(st.floats(-37, 38.2), min_size=1, max_size=6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    scope=st.sampled_from(["parameter", "unit"]),
)
def test_elements_of_any_size_have_a_norm_and_are_clipped_to_the_limit(
    norm, exponents, dtype, scope
):
    """The l2 norm of some of these exceeds float32, although the rms norm does not."""
    elements = (10.0 ** torch.tensor(exponents, dtype=torch.float64)).to(dtype)
    gradient = torch.stack([elements, -elements])
    p = parameter(gradient.clone())
    expected = norm_of([gradient[:1].double().numpy()], norm)
    limit = expected / 4
    decision = Clipper([p], Fixed(limit), scope=scope, norm=norm).step()
    np.testing.assert_allclose(decision.norm.numpy(), expected, rtol=1e-6)
    assert decision.finite.all()
    after = norm_of([p.grad.double().numpy()], norm)
    assert after == pytest.approx(limit, rel=1e-2 if dtype == torch.bfloat16 else 2e-6)


@other_norms
def test_a_threshold_is_found_for_the_norm(norm):
    model, data = nn.Linear(3, 1), [(torch.ones(4, 3), torch.zeros(4, 1))]
    model(torch.ones(4, 3)).square().mean().backward()
    expected = norm_of([p.grad.numpy() for p in model.parameters()], norm)
    found = find_clipping_threshold(model, data, nn.functional.mse_loss, norm=norm)
    assert found.median == pytest.approx(expected, rel=1e-6)
