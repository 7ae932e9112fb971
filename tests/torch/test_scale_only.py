"""Tests of `scale_only`: all parameters are measured, and only the named are scaled."""

import copy
import re

import numpy as np
import pytest
import torch
from torch import nn

from autoclip_torch import AGC, Clipper, NormClip, QuantileClip, ValueClip
from autoclip_torch.trainers.create_clipper import create_clipper

from ..support.scale_only import (
    NORMS,
    POLICIES,
    ROWS,
    SCALED,
    SHAPES,
    expect,
    make_series,
)
from ..support.torch_device import (
    give,
    gradients,
    looks_counted,
    model,
    nothing_read,
    unwatched,
    watched,
)
from .test_exclude import EXCLUDED, Tagger


def make_parameters():
    return {name: nn.Parameter(torch.zeros(shape)) for name, shape in SHAPES.items()}


def make_groups(parameters):
    w, v, u = parameters.items()
    return [{"params": [w, v]}, {"params": [u]}]


def give_all(parameters, grads, kind=unwatched):
    """Give the gradients of a step to the parameters."""
    tensors = [g if g is None else torch.tensor(g) for g in grads.values()]
    give(parameters.values(), tensors, kind)


TORCH_SCOPES = ["global", "group", "parameter", "unit"]


@pytest.mark.parametrize("nonfinite", ["zero", "propagate", "skip"])
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("scope", TORCH_SCOPES)
def test_only_these_are_scaled_and_all_are_measured(scope, name, nonfinite):
    """The gradients and `clip/norm_after` follow the rules, on the CPU and a device."""
    policy, norm_kind = POLICIES[name], NORMS[name]
    for kind in (unwatched, watched):
        parameters = make_parameters()
        clipper = Clipper(
            make_groups(parameters),
            policy[0],
            scope=scope,
            nonfinite=nonfinite,
            scale_only=SCALED,
            norm=norm_kind,
        )
        for grads in make_series():
            give_all(parameters, grads, kind)
            with looks_counted():
                clipper.step()
            how = policy, nonfinite, norm_kind
            after, norm, norm_after = expect(grads, ROWS[scope], *how)
            for n, parameter in parameters.items():
                assert (parameter.grad is None) == (after is None or n not in after)
                if parameter.grad is not None:
                    actual = unwatched(parameter.grad).numpy()
                    np.testing.assert_allclose(actual, after[n], rtol=1e-6)
                    if n not in SCALED:  # its bits are kept, or it is 0
                        assert np.array_equal(actual, after[n], equal_nan=True)
            with looks_counted():
                metrics = clipper.metrics()
            numbers = [metrics["clip/norm"], metrics["clip/norm_after"]]
            np.testing.assert_allclose(numbers, [norm, norm_after], rtol=1e-6)


@pytest.mark.parametrize("make", [QuantileClip, AGC], ids=["quantile", "agc"])
@pytest.mark.parametrize("scope", TORCH_SCOPES)
def test_decisions_and_states_are_those_without_scale_only(scope, make):
    """So a run may resume with another `scale_only`; on a device nothing is read."""
    plain, split, device = model(), model(), model()
    clippers = [
        make(net, scope=scope, **keywords)
        for net, keywords in [
            (plain, {}),
            (split, {"scale_only": "*weight"}),
            (device, {"scale_only": "*weight"}),
        ]
    ]
    for step, grads in enumerate(gradients(list(plain.parameters()))):
        if step == 6:
            clippers[1].load_state_dict(clippers[0].state_dict())
        give(plain.parameters(), grads)
        give(split.parameters(), grads)
        give(device.parameters(), grads, watched)
        expected, actual = clippers[0].step(), clippers[1].step()
        with nothing_read():
            on_device = clippers[2].step()
        for decision in (actual, type(actual)(*map(unwatched, on_device))):
            for field in expected._fields:
                if field != "scale":  # what is really scaled
                    one, other = getattr(decision, field), getattr(expected, field)
                    same = {"rtol": 1e-6, "atol": 0, "equal_nan": True}
                    torch.testing.assert_close(one, other, **same)


def test_a_resumed_run_is_the_same_bit_for_bit():
    def make():
        parameters = make_parameters()
        clipper = QuantileClip(
            parameters.items(), 0.5, scope="global", scale_only=SCALED
        )
        return parameters, clipper

    def run(parameters, clipper, grads):
        give_all(parameters, grads)
        clipper.step()
        metrics = clipper.metrics()
        return [p.grad.tolist() for p in parameters.values()], metrics

    series = make_series()[:7]
    parameters, clipper = make()
    states, results = [], []
    for grads in series:
        states.append(copy.deepcopy(clipper.state_dict()))
        results.append(run(parameters, clipper, grads))
    parameters, clipper = make()
    clipper.load_state_dict(states[3])
    assert clipper.metrics()["clip/norm_after"] == 0
    for grads, expected in zip(series[3:], results[3:], strict=True):
        assert str(run(parameters, clipper, grads)) == str(expected)


@pytest.mark.parametrize(("patterns", "scaled"), EXCLUDED)
def test_scale_only_accepts_what_exclude_accepts(patterns, scaled):
    net = Tagger()
    if patterns == []:
        with pytest.raises(ValueError, match="scale_only must be None or hold a patt"):
            NormClip(net, 1e-3, scale_only=patterns)
        return
    clipper = NormClip(net, 1e-3, scale_only=patterns)
    before = [torch.randn_like(p) for p in net.parameters()]
    give(net.parameters(), before)
    clipper.step()
    names = [name for name, _ in net.named_parameters()]
    for name, p, grad in zip(names, net.parameters(), before, strict=True):
        assert torch.equal(p.grad, grad) == (name not in scaled)


@pytest.mark.parametrize(
    ("patterns", "error", "message"),
    [
        ("hed", ValueError, "scale_only must match a parameter's name, got 'hed'"),
        (re.compile("^x"), ValueError, "scale_only must match"),
        ([3], TypeError, "scale_only must hold names, patterns or a function"),
        # An excluded parameter is never scaled.
        ("fc", ValueError, "scale_only must match a parameter's name, got 'fc'"),
    ],
)
def test_a_pattern_that_names_nothing_is_an_error(patterns, error, message):
    with pytest.raises(error, match=message):
        NormClip(Tagger(), 1.0, exclude="fc", scale_only=patterns)


def test_names_need_named_parameters_and_the_repr_shows_them():
    with pytest.raises(ValueError, match="scale_only='fc' needs named parameters"):
        NormClip(Tagger().parameters(), 1.0, scale_only="fc")
    shown = repr(NormClip(Tagger(), 1.0, scale_only="fc"))
    assert shown == "NormClip(max_norm=1.0, scope='global', scale_only=['fc'], rows=1)"


def test_parameters_that_are_added_later_are_scaled_if_they_match():
    parameters = make_parameters()
    w, v, u = parameters.items()
    clipper = NormClip([w, v], 1.0, scale_only="[wu]")
    clipper.add_param_group({"params": [u]})
    give(parameters.values(), [torch.ones(shape) for shape in SHAPES.values()])
    clipper.step()
    norm = 21**0.5
    for name, parameter in parameters.items():
        expected = 1.0 if name == "v" else 1 / norm
        torch.testing.assert_close(parameter.grad, torch.full(SHAPES[name], expected))


def test_a_callback_may_name_a_parameter_that_is_still_frozen():
    net = Tagger()
    optimizer = torch.optim.SGD(net.encoder.parameters())
    clipper = create_clipper(
        NormClip, {"max_norm": 1.0, "scale_only": "fc"}, [optimizer], net
    )
    assert clipper.names == ["global"]
    with pytest.raises(ValueError, match="scale_only must match a parameter's name"):
        create_clipper(NormClip, {"max_norm": 1.0, "scale_only": "f"}, [optimizer], net)


@pytest.mark.parametrize("fused", [False, True])
def test_an_attached_or_fused_optimizer_scales_only_these(fused):
    """The kernel of a fused optimizer has one factor, so it must not scale the rest."""
    parameters = make_parameters()
    optimizer = torch.optim.SGD(parameters.values(), lr=1.0, fused=fused)
    NormClip(parameters.items(), 1.0, scale_only=SCALED).attach(optimizer)
    weights = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for grads in make_series()[:7]:
        give_all(parameters, grads)
        optimizer.step()
        after, _, _ = expect(grads, ROWS["global"], POLICIES["clip"])
        for name, parameter in parameters.items():
            weights[name] -= after[name]
            actual = parameter.detach().numpy()
            np.testing.assert_allclose(actual, weights[name], rtol=1e-5, atol=1e-6)


def test_the_matrices_of_muon_belong_to_the_norm_and_are_not_scaled():
    """Muon normalizes its update: only the norm of AdamW's parameters is limited."""
    net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    grads = [10 * torch.randn_like(p) for p in net.parameters()]
    give(net.parameters(), grads)
    clipper = NormClip(net, 1.0, scale_only=lambda name, p: p.ndim != 2)
    decision = clipper.step()
    total = torch.cat([g.flatten() for g in grads]).double().norm().item()
    assert decision.norm.item() == pytest.approx(total)
    for parameter, grad in zip(net.parameters(), grads, strict=True):
        expected = grad if parameter.ndim == 2 else grad / total
        torch.testing.assert_close(parameter.grad, expected)
    after = torch.cat([p.grad.flatten() for p in net.parameters()]).double().norm()
    metrics = clipper.metrics()
    assert metrics["clip/norm_after"] == pytest.approx(after.item())
    assert metrics["clip/scale"] == pytest.approx(after.item() / total)


@pytest.mark.parametrize("kind", [unwatched, watched], ids=["cpu", "device"])
def test_clipping_by_value_changes_only_these_elements(kind):
    parameters = make_parameters()
    clipper = ValueClip(parameters.items(), 0.5, scope="global", scale_only=SCALED)
    for grads in make_series():
        give_all(parameters, grads, kind)
        with looks_counted():
            clipper.step()
            metrics = clipper.metrics()
        given = {name: grad for name, grad in grads.items() if grad is not None}
        is_finite = all(np.isfinite(grad).all() for grad in given.values())
        norm = 0.0
        for name, grad in given.items():
            limit = 0.5 if name in SCALED else np.inf
            expected = (
                np.clip(grad, -limit, limit) if is_finite else np.zeros_like(grad)
            )
            actual = unwatched(parameters[name].grad).numpy()
            np.testing.assert_array_equal(actual, expected)
            norm = np.hypot(norm, np.linalg.norm(np.float64(expected)))
        if is_finite:
            assert metrics["clip/norm_after"] == pytest.approx(norm, rel=1e-6)
