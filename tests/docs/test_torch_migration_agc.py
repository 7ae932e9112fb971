"""Adaptive gradient clipping of others in PyTorch; test_migration.py lists the rows."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from autoclip_torch import AGC, NormClip, ValueClip, optim

from ..support import other_rules
from ..support.other_rules import series
from ..support.torch_series import (
    compare,
    gradients,
    make_pair,
    set_gradients,
)


@pytest.mark.needs("peers")
def test_whole_tensors_are_those_of_smartclip():
    """Vectors are excluded. A tensor of zeros is limited by the tiny 1e-8 of both."""
    import smartclip

    ours, theirs = make_pair()
    peer = smartclip.AGC(clipping=5.0)
    clipper = AGC(
        ours, clipping=5.0, eps=1e-8, rule="layer", exclude=lambda name, p: p.ndim < 2
    )

    def clip():
        smartclip.apply(theirs, peer)

    given = [g for g in gradients(series(rows=3)) if g[0].isfinite().all()]
    compare(clipper, ours, clip, theirs, given)


def load_from_timm(name):
    """Load a file of timm alone: the package imports torchvision."""
    folder = importlib.util.find_spec("timm").submodule_search_locations[0]
    path = Path(folder, "utils", f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"timm_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


UNITS = [(5, 4), (6,), (3, 2, 5), (4, 3, 3, 2)]


@pytest.mark.needs("peers")
def test_units_are_those_of_timm():
    """The first row of weights is zero, so `eps` limits it."""
    ours, theirs = make_pair(UNITS)
    with torch.no_grad():
        ours[0][0] = theirs[0][0] = 0
    agc = load_from_timm("agc").adaptive_clip_grad
    compare(
        AGC(ours, clipping=4.0, eps=0.2),
        ours,
        lambda: agc(theirs, clip_factor=4.0, eps=0.2),
        theirs,
        gradients(series(level=15.0), UNITS),
    )


@pytest.mark.needs("peers")
def test_timm_leaves_out_the_last_two_parameters():
    def make_model():
        torch.manual_seed(0)
        layers = {"body": nn.Linear(4, 3), "head": nn.Linear(3, 2)}
        return nn.ModuleDict(layers)

    ours, theirs = make_model(), make_model()
    shapes = [p.shape for p in ours.parameters()]
    agc = load_from_timm("agc").adaptive_clip_grad
    mine, others = list(ours.parameters()), list(theirs.parameters())
    given = [g for g in gradients(series(), shapes) if g[0].isfinite().all()]
    compare(
        AGC(ours, clipping=4.0, exclude="head"),
        mine,
        lambda: agc(others[:-2], clip_factor=4.0),
        others,
        given,
    )


@pytest.mark.needs("peers")
@pytest.mark.parametrize("mode", ["norm", "value", "agc"])
def test_the_modes_of_timm(mode, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.utils.agc", load_from_timm("agc"))
    monkeypatch.setitem(sys.modules, "timm.utils", sys.modules["timm.utils.agc"])
    dispatch = load_from_timm("clip_grad").dispatch_clip_grad
    ours, theirs = make_pair()
    kinds = {"norm": NormClip, "value": ValueClip, "agc": AGC}
    compare(
        kinds[mode](ours, 5.0),
        ours,
        lambda: dispatch(theirs, 5.0, mode=mode),
        theirs,
        gradients(series()),
    )


def by_arrays(rule, parameters):
    """Return a step that applies a rule of `other_rules` to each parameter."""

    def clip():
        for p in parameters:
            scaled = rule(p.grad.numpy(), p.detach().numpy())
            p.grad = torch.as_tensor(np.float32(scaled))

    return clip


def test_kernels_are_those_of_jaychanhoi():
    """A matrix differs: one norm for each input there, for each output here."""

    def rule(gradient, weight):
        return other_rules.jaychanhoi_unit(gradient, weight, 2.0, 0.003)

    shapes = [(4, 3, 3, 2), (6,)]
    ours, theirs = make_pair(shapes)
    wrapped = optim.AGC(torch.optim.SGD(ours, lr=0.0), 2.0, 0.003)
    clip = by_arrays(rule, theirs)
    compare(wrapped.clipper, ours, clip, theirs, gradients(series(), shapes))

    ours, theirs = make_pair([(5, 4)])
    grads = next(gradients([1000.0], [(5, 4)]))
    set_gradients(ours, grads)
    set_gradients(theirs, grads)
    optim.AGC(torch.optim.SGD(ours, lr=0.0), 2.0, 0.003).step()
    by_arrays(rule, theirs)()
    sizes = [p.grad.norm(dim=axis) for p, axis in ((ours[0], 1), (theirs[0], 0))]
    limits = [2 * ours[0].detach().norm(dim=axis) for axis in (1, 0)]
    torch.testing.assert_close(sizes, limits)


def test_units_are_those_of_composer():
    """A unit whose weights are zero gets a gradient of zero, or of 1e-29."""
    ours, theirs = make_pair(UNITS)

    def rule(gradient, weight):
        return other_rules.composer_unit(gradient, weight, 4.0)

    clipper = AGC(ours, 4.0, eps=1e-30)
    given = gradients(series(level=15.0), UNITS)
    compare(clipper, ours, by_arrays(rule, theirs), theirs, given)
    with torch.no_grad():
        ours[0][0] = theirs[0][0] = 0
    grads = next(gradients([15.0], UNITS))
    set_gradients(ours, grads)
    set_gradients(theirs, grads)
    clipper.step()
    by_arrays(rule, theirs)()
    assert not theirs[0].grad[0].any()
    assert ours[0].grad[0].abs().max() < 1e-29
    set_gradients(ours, grads)
    AGC(ours, 4.0).step()
    assert float(ours[0].grad[0].norm()) == pytest.approx(4e-3)
