"""`remove_params` and `replace_param`, units that change, and frozen integers."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from autoclip_torch import AGC, NormClip, QuantileClip, TrustClip

GROUPS = {"quantile": 0.5}
NAMES = ("a", "b", "c")


def parameters(*lengths):
    return [nn.Parameter(torch.ones(length, 2)) for length in lengths]


def clipper_of(three, scope, **keywords):
    """Return a clipper of three parameters under two policies, after three steps."""
    pairs = list(zip(NAMES, three, strict=True))
    groups = [{"params": pairs[:2]}, {"params": pairs[2:], "quantile": 0.25}]
    clipper = QuantileClip(groups, scope=scope, **GROUPS, **keywords)
    rows = len(clipper.names)
    clipper.observe(np.arange(1.0, 3 * rows + 1).reshape(3, rows))
    return clipper


@pytest.mark.parametrize(
    ("history_length", "device"), [(8, None), (None, None), (8, torch.device("cpu"))]
)
@pytest.mark.parametrize(
    ("scope", "before", "after"),
    [
        ("parameter", ["a", "b", "c"], ["a", "c"]),
        ("group", ["group 0", "group 1"], ["group 0", "group 1"]),
        ("unit", [*"ab", "c[0]", "c[1]"], ["a", "c[0]", "c[1]"]),
    ],
)
def test_removed_parameters_leave_no_row(scope, before, after, history_length, device):
    three = parameters(1, 1, 2)
    clipper = clipper_of(three, scope, history_length=history_length)
    assert clipper.names == before
    clipper._policy_states.move_to(device)
    old = dict(zip(before, clipper.threshold().tolist(), strict=True))
    counts = clipper.state_dict()["tally"]["observed"].tolist()
    clipper.remove_params(three[1])
    assert clipper.names == after
    assert clipper.threshold().tolist() == [old[name] for name in after]
    assert clipper.state_dict()["tally"]["observed"].tolist() == counts[: len(after)]
    assert clipper.metrics()["clip/steps"] == 3
    for parameter in three:
        parameter.grad = torch.full_like(parameter, 1e4)
    clipper.step()
    assert three[1].grad.min() == 1e4
    assert max(three[0].grad.norm(), three[2].grad.norm()) < 100
    left = [("a", three[0]), ("c", three[2])]
    again = QuantileClip(
        [{"params": left[:1]}, {"params": left[1:], "quantile": 0.25}],
        scope=scope,
        history_length=history_length,
        **GROUPS,
    )
    again.load_state_dict(clipper.state_dict())
    assert torch.equal(again.threshold(), clipper.threshold())


@pytest.mark.parametrize("scope", ["global", "group", "parameter", "unit"])
def test_a_replaced_parameter_continues_the_history(scope):
    three = parameters(1, 1, 2)
    pairs = list(zip(NAMES, three, strict=True))
    clipper = QuantileClip(pairs, scope=scope, **GROUPS)
    rows = len(clipper.names)
    clipper.observe(np.arange(1.0, 3 * rows + 1).reshape(3, rows))
    before, names = clipper.threshold(), clipper.names
    (other,) = [nn.Parameter(torch.ones(2, 5 if scope == "unit" else 7))]
    clipper.replace_param(three[2], other)
    assert (clipper.names, clipper.parameters[2] is other) == (names, True)
    assert torch.equal(clipper.threshold(), before)
    for parameter in (*three, other):
        parameter.grad = torch.full_like(parameter, 1e4)
    clipper.step()
    assert three[2].grad.min() == 1e4
    assert other.grad.norm() < 1e3


def test_a_parameter_with_other_units_is_refused():
    three = parameters(1, 1, 2)
    clipper = clipper_of(three, "unit")
    state = clipper.state_dict()
    (other,) = parameters(3)
    with pytest.raises(ValueError, match=r"must have 2 units .* got 3; call remove_p"):
        clipper.replace_param(three[2], other)
    assert clipper.parameters[2] is three[2]
    assert clipper.state_dict()["names"] == state["names"]
    clipper.remove_params([three[2]])
    clipper.add_param_group({"params": [("c", other)], "quantile": 0.25})
    assert clipper.threshold()[2:].tolist() == [math.inf] * 3


def test_what_was_removed_stays_out_until_it_is_added_again():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    clipper = NormClip(model, max_norm=1.0, scope="parameter")
    clipper.remove_params(model[1])
    for change in (0, 1):
        model[0].weight = nn.Parameter(torch.ones(2, 2))
        twin = copy.deepcopy((model, clipper))
        for net, its_clipper in ((model, clipper), twin):
            for parameter in net.parameters():
                parameter.grad = torch.ones_like(parameter)
            its_clipper.step()
            norms = [p.grad.norm().item() for p in net[1].parameters()]
            assert norms == pytest.approx([2.0, 2**0.5]), change
    clipper.add_param_group({"params": model[1]})
    clipper.step()
    norms = [p.grad.norm().item() for p in model[1].parameters()]
    assert norms == pytest.approx([1.0, 1.0])


def test_both_halves_of_a_trust_clip_remove_a_parameter():
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=100.0)
    clipper = TrustClip(layer, optimizer)
    clipper.remove_params([layer.bias])
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert clipper.metrics()["clip/norm"] == 2.0  # of the weight alone
    assert (layer.bias < -90).all()


# A parameter whose `data` has another shape, at scope "unit".


@pytest.mark.parametrize("way", ["by hand", "attached", "as optimizer"])
@pytest.mark.parametrize(
    ("shape", "restarts"), [((3, 5), False), ((4, 2), True), ((1, 2), True)]
)
def test_data_of_another_shape_is_cut_again(way, shape, restarts):
    weight = nn.Parameter(torch.ones(3, 2))
    optimizer = torch.optim.SGD([("w", weight)], lr=0.0)
    if way == "as optimizer":
        optimizer = AGC.as_optimizer(optimizer, 0.5, eps=1e-3)
        clipper = optimizer.clipper
    else:
        clipper = AGC([("w", weight)], 0.5, eps=1e-3)
    if way == "attached":
        clipper.attach(optimizer)
    step = clipper.step if way == "by hand" else optimizer.step
    weight.grad = torch.ones(3, 2)
    step()
    weight.grad = None
    weight.data = torch.ones(shape)
    weight.grad = torch.ones(shape)
    if restarts:
        with pytest.warns(UserWarning, match=f"w has {shape[0]} units in place of 3"):
            step()
    else:
        step()
    torch.testing.assert_close(weight.grad, torch.full(shape, 0.5))
    observed = clipper.state_dict()["tally"]["observed"]
    assert observed.tolist() == [2 - restarts] * shape[0]


def test_a_replaced_parameter_with_other_units_warns_and_is_clipped():
    model = nn.Sequential(nn.Linear(2, 3, bias=False))
    clipper = AGC(model, clipping=0.5)
    for units in (3, 4):
        model[0] = nn.Linear(2, units, bias=False)
        nn.init.ones_(model[0].weight)
        model[0].weight.grad = torch.ones(units, 2)
        if units == 4:
            with pytest.warns(UserWarning, match=r"0.weight has 4 units .* choose"):
                clipper.step()
        else:
            clipper.step()
        torch.testing.assert_close(model[0].weight.grad, torch.full((units, 2), 0.5))


# Integer weights of a quantized model, which can have no gradient.


class Quantized(nn.Module):
    def __init__(self):
        super().__init__()
        packed = torch.zeros(8, dtype=torch.uint8)
        self.packed = nn.Parameter(packed, requires_grad=False)
        self.lora = nn.Linear(2, 2, bias=False)


@pytest.mark.parametrize(
    "given",
    [
        lambda m: m,
        lambda m: m.parameters(),
        lambda m: m.named_parameters(),
        lambda m: [{"params": m}],
        lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
    ],
    ids=["model", "list", "names", "group", "optimizer"],
)
def test_frozen_integers_are_left_out(given):
    model = Quantized()
    clipper = NormClip(given(model), max_norm=1.0)
    model.lora.weight.grad = torch.full((2, 2), 3.0)
    assert clipper.step().norm.tolist() == [6.0]
    assert len(clipper.parameters) == 1
    with pytest.raises(ValueError, match=r"complex type, got torch\.uint8"):
        NormClip([model.packed], max_norm=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert TrustClip(model, optimizer).names == ["lora.weight"]


def test_a_state_loads_by_keyword():
    """The name of the argument is the one of torch."""
    (weight,) = parameters(2)
    for make in (NormClip.as_optimizer, TrustClip.as_optimizer):
        optimizer = make(torch.optim.SGD([weight], lr=0.1), **MAX[make])
        optimizer.clipper.load_state_dict(state_dict=optimizer.clipper.state_dict())
        optimizer.load_state_dict(state_dict=optimizer.state_dict())


MAX = {NormClip.as_optimizer: {"max_norm": 1.0}, TrustClip.as_optimizer: {}}
