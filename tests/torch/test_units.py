"""AGC's units in torch are what each output of a layer depends on.

If a layer's output shows its units, autograd shows which weights one output depends
on, and these are the unit. For the other layers the table states the units.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from autoclip_torch import AGC, optim

from ..support.cases import NFNETS


class Case(NamedTuple):
    """A layer, one of its parameters, and how to find that parameter's units."""

    make: Callable[[], nn.Module]
    name: str = "weight"
    inputs: Callable[[], tuple] | None = None
    """The inputs, for autograd; None if the output does not show the units."""
    outputs: int = 1
    """The axis of the output along which the units differ."""
    rows: bool = True
    """Without autograd: whether each index of axis 0 is a unit, or all are one."""


def ones(*shape):
    return lambda: (torch.ones(shape),)


def tokens():
    return (torch.arange(6),)


def pair():
    return torch.ones(2, 3), torch.ones(2, 4)


ATTENTION = {"embed_dim": 4, "num_heads": 2}
CASES = {
    "Linear": Case(lambda: nn.Linear(5, 3), inputs=ones(2, 5)),
    "Linear, one output": Case(lambda: nn.Linear(5, 1), inputs=ones(2, 5)),
    "Linear, one input": Case(lambda: nn.Linear(1, 5), inputs=ones(2, 1)),
    "Conv1d": Case(lambda: nn.Conv1d(4, 6, 3), inputs=ones(1, 4, 9)),
    "Conv2d": Case(lambda: nn.Conv2d(4, 6, 3), inputs=ones(1, 4, 9, 9)),
    "Conv3d": Case(lambda: nn.Conv3d(2, 3, 2), inputs=ones(1, 2, 4, 4, 4)),
    "Conv2d, 1 x 1": Case(lambda: nn.Conv2d(1, 6, 1), inputs=ones(1, 1, 2, 2)),
    "Conv2d, grouped": Case(
        lambda: nn.Conv2d(4, 6, 3, groups=2), inputs=ones(1, 4, 9, 9)
    ),
    "Conv2d, depthwise": Case(
        lambda: nn.Conv2d(6, 6, 3, groups=6), inputs=ones(1, 6, 9, 9)
    ),
    "Conv1d, depthwise, two each": Case(
        lambda: nn.Conv1d(3, 6, 2, groups=3), inputs=ones(1, 3, 9)
    ),
    "ConvTranspose1d": Case(lambda: nn.ConvTranspose1d(4, 6, 3), inputs=ones(1, 4, 5)),
    "ConvTranspose2d": Case(
        lambda: nn.ConvTranspose2d(4, 6, 3), inputs=ones(1, 4, 5, 5)
    ),
    "ConvTranspose3d": Case(
        lambda: nn.ConvTranspose3d(2, 3, 2), inputs=ones(1, 2, 3, 3, 3)
    ),
    "ConvTranspose1d, grouped": Case(
        lambda: nn.ConvTranspose1d(6, 4, 3, groups=2), inputs=ones(1, 6, 5)
    ),
    "ConvTranspose2d, grouped": Case(
        lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), inputs=ones(1, 4, 5, 5)
    ),
    "ConvTranspose3d, grouped": Case(
        lambda: nn.ConvTranspose3d(4, 6, 2, groups=2), inputs=ones(1, 4, 3, 3, 3)
    ),
    "ConvTranspose2d, depthwise": Case(
        lambda: nn.ConvTranspose2d(4, 4, 3, groups=4), inputs=ones(1, 4, 5, 5)
    ),
    "ConvTranspose1d, depthwise, two each": Case(
        lambda: nn.ConvTranspose1d(3, 6, 2, groups=3), inputs=ones(1, 3, 5)
    ),
    "ConvTranspose1d, one output": Case(
        lambda: nn.ConvTranspose1d(4, 1, 3), inputs=ones(1, 4, 5)
    ),
    "Embedding": Case(lambda: nn.Embedding(6, 3), inputs=tokens, outputs=0),
    "EmbeddingBag": Case(
        lambda: nn.EmbeddingBag(6, 3),
        inputs=lambda: (torch.arange(6), torch.arange(6)),
        outputs=0,
    ),
    "Bilinear": Case(lambda: nn.Bilinear(3, 4, 5), inputs=pair),
    "attention, in": Case(lambda: nn.MultiheadAttention(**ATTENTION), "in_proj_weight"),
    "attention, out": Case(
        lambda: nn.MultiheadAttention(**ATTENTION), "out_proj.weight"
    ),
    "attention, keys": Case(
        lambda: nn.MultiheadAttention(**ATTENTION, kdim=3, vdim=5), "k_proj_weight"
    ),
    "attention, bias of keys": Case(
        lambda: nn.MultiheadAttention(**ATTENTION, add_bias_kv=True), "bias_k"
    ),
    "LSTM, input": Case(lambda: nn.LSTM(3, 2), "weight_ih_l0"),
    "LSTM, hidden": Case(lambda: nn.LSTM(3, 2), "weight_hh_l0"),
    "LSTM, projection": Case(lambda: nn.LSTM(3, 4, proj_size=2), "weight_hr_l0"),
    "GRU, input": Case(lambda: nn.GRU(3, 2), "weight_ih_l0"),
    "GRU, back": Case(lambda: nn.GRU(3, 2, bidirectional=True), "weight_hh_l0_reverse"),
    "RNN, second layer": Case(lambda: nn.RNN(3, 2, num_layers=2), "weight_ih_l1"),
    "LSTMCell": Case(lambda: nn.LSTMCell(3, 2), "weight_hh"),
    "LSTM, bias": Case(lambda: nn.LSTM(3, 2), "bias_ih_l0", rows=False),
    "Linear, bias": Case(lambda: nn.Linear(5, 3), "bias", rows=False),
    "ConvTranspose2d, bias": Case(
        lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), "bias", rows=False
    ),
    "LayerNorm": Case(lambda: nn.LayerNorm(5), rows=False),
    "LayerNorm of two axes": Case(lambda: nn.LayerNorm((4, 5)), rows=False),
    "LayerNorm of two axes, bias": Case(
        lambda: nn.LayerNorm((4, 5)), "bias", rows=False
    ),
    "RMSNorm of two axes": Case(lambda: nn.RMSNorm((4, 5)), rows=False),
    "GroupNorm": Case(lambda: nn.GroupNorm(2, 6), rows=False),
    "BatchNorm2d": Case(lambda: nn.BatchNorm2d(6), rows=False),
    "InstanceNorm1d": Case(lambda: nn.InstanceNorm1d(6, affine=True), rows=False),
    "PReLU": Case(lambda: nn.PReLU(7), rows=False),
}

every_case = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


def units_of(case, layer):
    """Return one mask per unit, in order."""
    weight = layer.get_parameter(case.name)
    if case.inputs is None:
        if not case.rows:
            return [np.ones(weight.shape, bool)]
        masks = [np.zeros(weight.shape, bool) for _ in range(len(weight))]
        for index, mask in enumerate(masks):
            mask[index] = True
        return masks
    output = layer(*case.inputs()).movedim(case.outputs, 0)
    masks = []
    for unit in output:
        (gradient,) = torch.autograd.grad(unit.sum(), weight, retain_graph=True)
        masks.append(gradient.to_dense().numpy() != 0)
    return masks


def fill(module, seed=0):
    """Give every parameter random values and a random gradient."""
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.data = torch.randn(p.shape, generator=generator)
        p.grad = torch.randn(p.shape, generator=generator)


def norm(array, mask=True):
    return np.sqrt(np.sum(np.square(array, dtype=np.float64), where=mask))


def rows_of(clipper, decision, name):
    """Return the entries of a decision that belong to a parameter."""
    units = [
        i for i, n in enumerate(clipper.names) if n == name or n.startswith(f"{name}[")
    ]
    return type(decision)(*(field.numpy()[units] for field in decision))


def check_clipped(decision, before, after, weight, masks, clipping, eps):
    """Check norms, thresholds and gradients of each unit by AGC's formula."""
    assert len(decision.norm) == len(masks)
    for unit, mask in enumerate(masks):
        limit = clipping * max(norm(weight, mask), eps)
        n = norm(before, mask)
        np.testing.assert_allclose(decision.norm[unit], n, rtol=1e-6)
        np.testing.assert_allclose(decision.threshold[unit], limit, rtol=1e-6)
        assert decision.clipped[unit] == (n > limit)
        factor = min(1.0, limit / n)
        np.testing.assert_allclose(after[mask], factor * before[mask], rtol=1e-6)


@every_case
def test_a_unit_is_what_one_output_depends_on(case):
    layer = case.make()
    masks = units_of(case, layer)
    assert (np.sum(masks, axis=0) == 1).all(), "the units are a partition"
    model = nn.Sequential(nn.Identity(), layer)
    fill(model)
    weight = layer.get_parameter(case.name)
    before = weight.grad.numpy().copy()
    clipper = AGC(model, clipping=1.0)
    decision = rows_of(clipper, clipper.step(), f"1.{case.name}")
    assert 0 < len(decision.norm)
    check_clipped(
        decision, before, weight.grad.numpy(), weight.detach().numpy(), masks, 1.0, 1e-3
    )


@every_case
def test_without_a_module_each_index_of_axis_0_is_a_unit(case):
    """The same holds through an optimizer, unless it is given the model."""
    layer = case.make()
    fill(layer)
    weight = layer.get_parameter(case.name)
    before = weight.grad.numpy().copy()
    rows = list(before) if before.ndim > 1 else [before]
    clipper = AGC([weight], clipping=1e9)
    expected = [norm(row) for row in rows]
    np.testing.assert_allclose(clipper.step().norm.numpy(), expected, rtol=1e-6)
    sgd = torch.optim.SGD([weight], lr=0.1)
    through = optim.AGC(sgd, 1e9).clipper.step()
    np.testing.assert_allclose(through.norm.numpy(), expected, rtol=1e-6)
    masks = units_of(case, layer)
    knowing = optim.AGC(sgd, 1e9, model=layer).clipper.step()
    expected = [norm(before, mask) for mask in masks]
    np.testing.assert_allclose(knowing.norm.numpy(), expected, rtol=1e-6)


def test_bare_parameters_of_a_transposed_convolution_would_be_cut_by_input():
    """The control: the two rules give different units."""
    layer = nn.ConvTranspose2d(4, 6, 3)
    assert len(AGC([layer.weight]).names) == 4
    assert len(AGC(layer, exclude="bias").names) == 6


def test_a_subclass_of_a_layer_is_that_layer():
    class Upsampling(nn.ConvTranspose1d):
        pass

    assert len(AGC(Upsampling(4, 6, 3, groups=2), exclude="bias").names) == 6


def test_names_contain_the_number_of_the_unit():
    model = nn.Sequential(nn.Linear(2, 3), nn.PReLU())
    names = ["0.weight[0]", "0.weight[1]", "0.weight[2]", "0.bias", "1.weight"]
    assert AGC(model).names == names


@every_case
def test_the_rule_layer_takes_each_parameter_as_a_whole(case):
    layer = case.make()
    fill(layer)
    before = {n: p.grad.numpy().copy() for n, p in layer.named_parameters()}
    clipper = AGC(layer, clipping=0.5, rule="layer")
    assert clipper.names == list(before)
    decision = clipper.step()
    for row, (name, p) in enumerate(layer.named_parameters()):
        one = type(decision)(*(field.numpy()[row : row + 1] for field in decision))
        weight = p.detach().numpy()
        mask = [np.ones(p.shape, bool)]
        check_clipped(one, before[name], p.grad.numpy(), weight, mask, 0.5, 1e-3)


# A training loop.


def train(steps, clipping, eps, exclude=()):
    """Train with SGD, and check each clipped gradient against the formula."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.ReLU(), nn.ConvTranspose1d(4, 2, 3), nn.Flatten(),
        nn.Linear(16, 3),
    )  # fmt: skip
    clipper = AGC(model, clipping=clipping, eps=eps, exclude=exclude)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(8, 2, 8), torch.randint(3, (8,))
    counts = np.zeros(2, int)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        before = {n: p.grad.numpy().copy() for n, p in model.named_parameters()}
        decision = clipper.step()
        counts += [decision.clipped.sum(), (~decision.clipped).sum()]
        for name, p in model.named_parameters():
            if name in exclude:
                np.testing.assert_array_equal(p.grad.numpy(), before[name])
                assert not any(n.startswith(name) for n in clipper.names)
                continue
            axis = 1 if name == "2.weight" else 0
            masks = [np.ones(p.shape, bool)]
            if p.ndim > 1:
                places = np.indices(p.shape)[axis]
                masks = [places == unit for unit in range(p.shape[axis])]
            one = rows_of(clipper, decision, name)
            weight = p.detach().numpy()
            check_clipped(
                one, before[name], p.grad.numpy(), weight, masks, clipping, eps
            )
        optimizer.step()
    assert (counts > 0).all(), "some units were clipped, and some were not"


def test_agc_in_a_training_loop():
    train(steps=10, clipping=0.16, eps=0.003)


def test_agc_without_the_head():
    train(steps=5, clipping=0.3, eps=1e-3, exclude=["4.weight", "4.bias"])


def test_a_layer_that_starts_at_zero_trains():
    """The first step of each unit has length lr * clipping * eps, not 0."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, bias=False)
    nn.init.zeros_(layer.weight)
    clipper = AGC(layer, clipping=0.5, eps=0.1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.2)
    target = torch.randn(3, 4)
    x = torch.randn(64, 4)
    losses = []
    for step in range(300):
        optimizer.zero_grad()
        loss = (layer(x) - x @ target.t()).square().sum(1).mean()
        loss.backward()
        clipper.step()
        optimizer.step()
        if step == 0:
            lengths = layer.weight.detach().norm(dim=1).numpy()
            np.testing.assert_allclose(lengths, 0.2 * 0.5 * 0.1, rtol=1e-5)
        losses.append(loss.item())
    assert losses[-1] < 1e-3 * losses[0]


# The rule of the NFNets, in torch.


def clip_by_formula(grad, weight, axes, clipping=0.1, eps=1e-3):
    """Return a gradient scaled to `clipping * max(norm of weight, eps)` per unit."""
    norm, limit = (
        np.sqrt(np.sum(np.square(x.numpy(), dtype=np.float64), axes, keepdims=True))
        for x in (grad, weight)
    )
    limit = clipping * np.maximum(limit, eps)
    return np.where(norm > limit, grad.numpy() * (limit / norm), grad.numpy())


def test_the_rule_nfnets_takes_norms_over_the_axes_of_optax():
    """`core/test_units.py` compares these axes with optax."""
    torch.manual_seed(0)
    shapes = {shape: axes for shape, axes in NFNETS.items() if len(shape) < 6}
    parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    clipper = AGC(parameters, clipping=0.1, eps=1e-3, rule="nfnets")
    clipped = []
    for size in (1e-5, 0.3, 1e3):
        for p in parameters:
            p.grad = size * torch.randn(p.shape)
        expected = [
            clip_by_formula(p.grad, p.detach(), axes)
            for p, axes in zip(parameters, shapes.values(), strict=True)
        ]
        clipped.append(clipper.step().clipped.float().mean().item())
        for p, want in zip(parameters, expected, strict=True):
            np.testing.assert_allclose(p.grad.numpy(), want, rtol=1e-6)
            with torch.no_grad():
                p -= 0.1 * p.grad
    assert clipped[0] == 0
    assert 0 < clipped[1] < 1
    assert clipped[2] == 1


def test_the_rule_nfnets_refuses_six_axes():
    named = [
        ("good", nn.Parameter(torch.ones(3, 2))),
        ("bad", nn.Parameter(torch.ones([2] * 6))),
    ]
    with pytest.raises(ValueError, match="at most 5 axes"):
        AGC(named, rule="nfnets")
    assert AGC(named, rule="nfnets", exclude="bad").names == ["good[0]", "good[1]"]
    assert len(AGC(named, rule="unit").names) == 3 + 2


# The layer of a parameter.


def test_a_tied_parameter_is_one_parameter():
    """The unit is a token, as in the embedding; each output of the head is a token."""
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    model[1].weight = model[0].weight
    assert AGC(model).names == [f"0.weight[{i}]" for i in range(5)]


def test_a_copied_model_has_the_same_units():
    model = nn.ConvTranspose1d(4, 6, 3, groups=2)
    assert AGC(copy.deepcopy(model)).names == AGC(model).names
