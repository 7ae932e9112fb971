"""Tests of what `exclude` leaves out: names, modules, patterns and functions."""

import math
import re

import pytest
import torch
from torch import nn

from autoclip_torch import (
    AGC,
    NormClip,
    QuantileClip,
)

from ..support.torch_models import (
    backward,
    batches,
    bits,
)


class Tagger(nn.Module):
    """Names with a common prefix, and a head without a bias."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
        self.encoder2 = nn.Linear(3, 3)
        self.fc = nn.Linear(3, 2, bias=False)

    def forward(self, x):
        return self.fc(self.encoder2(self.encoder(x)))


NAMES = [name for name, _ in Tagger().named_parameters()]
ENCODER, BIASES = NAMES[:4], [name for name in NAMES if name.endswith("bias")]

EXCLUDED = [
    ("fc.weight", ["fc.weight"]),
    ("fc", ["fc.weight"]),
    ("encoder", ENCODER),
    ("encoder.1", ENCODER[2:]),
    ("encoder2", NAMES[4:6]),
    ("*.bias", BIASES),
    ("encoder*", NAMES[:6]),
    ("encoder.[01].weight", [ENCODER[0], ENCODER[2]]),
    (re.compile(r"\.bias$"), BIASES),
    (re.compile("encoder2"), NAMES[4:6]),
    (
        lambda name, parameter: parameter.ndim == 1,
        [*BIASES[:1], *ENCODER[2:], BIASES[2]],
    ),
    (lambda name, parameter: name.startswith("fc"), ["fc.weight"]),
    (lambda name, parameter: False, []),
    (["fc", "*.bias"], [*BIASES, "fc.weight"]),
    (("fc", re.compile("^encoder2")), [*NAMES[4:6], "fc.weight"]),
    ({"fc.weight"}, ["fc.weight"]),
    ([], []),
]


@pytest.mark.parametrize(("patterns", "excluded"), EXCLUDED)
def test_what_is_excluded_is_neither_measured_nor_scaled(patterns, excluded):
    """`exclude` takes a parameter name, module name, pattern, function, or several."""
    model = Tagger()
    named = dict(model.named_parameters())
    clipper = NormClip(model, max_norm=1e-3, scope="parameter", exclude=patterns)
    together = NormClip(model, max_norm=1e9, exclude=patterns)
    left = [name for name in NAMES if name not in excluded]
    assert clipper.names == left
    backward(model, next(batches(1)))
    norm = math.sqrt(sum(named[n].grad.double().square().sum().item() for n in left))
    assert together.step().norm.item() == pytest.approx(norm)
    before = {name: parameter.grad.clone() for name, parameter in named.items()}
    assert clipper.step().clipped.all()
    for name, parameter in named.items():
        same = torch.equal(bits(parameter.grad), bits(before[name]))
        assert same == (name in excluded)


def test_patterns_may_come_from_a_generator():
    clipper = QuantileClip(Tagger(), exclude=(name for name in ["fc", "encoder"]))
    assert clipper.names == NAMES[4:6]
    clipper.add_param_group({"params": [("fc.late", nn.Parameter(torch.ones(1)))]})
    assert clipper.names == NAMES[4:6]


def test_excluding_the_head_by_name_spares_no_other_tensor():
    """Other packages exclude the last two tensors, which is wrong without a bias."""
    model = Tagger()
    clipper = AGC(model, exclude="fc")
    assert [name for name in NAMES if name.split(".")[0] == "fc"] == ["fc.weight"]
    assert {name.partition("[")[0] for name in clipper.names} == set(NAMES[:-1])


def test_the_root_module_cannot_be_excluded():
    """The root module's name is "", which other packages take for all or nothing."""
    with pytest.raises(ValueError, match="exclude must match"):
        AGC(Tagger(), exclude=[""])
    inside = nn.ModuleDict({"fc": nn.Linear(2, 2), "other": nn.Linear(2, 2)})
    assert QuantileClip(inside, exclude="fc").names == ["other.weight", "other.bias"]


@pytest.mark.parametrize("pattern", ["enc", "weight", "bias", "fc.", "FC", "*.weights"])
def test_a_pattern_that_names_nothing_is_an_error(pattern):
    """It is misspelled: the message lists the names."""
    words = re.escape(
        f"got {pattern!r}; the names are encoder.0.weight, encoder.0.bias, "
    )
    with pytest.raises(ValueError, match=words):
        QuantileClip(Tagger(), exclude=["fc", pattern])
    with pytest.raises(ValueError, match="exclude must match"):
        QuantileClip(Tagger(), exclude=re.compile("^weight"))


@pytest.mark.parametrize("pattern", ["fc", "*", re.compile("fc")])
def test_names_need_named_parameters(pattern):
    with pytest.raises(ValueError, match="needs named parameters, got unnamed ones"):
        QuantileClip(Tagger().parameters(), exclude=pattern)


def test_a_function_needs_no_names():
    names = []

    def vectors(name, parameter):
        names.append(name)
        return parameter.ndim == 1

    clipper = QuantileClip(Tagger().parameters(), exclude=vectors)
    assert len(clipper.names) == 3
    assert names == [None] * 7


@pytest.mark.parametrize("pattern", ["*", ["encoder*", "fc"], re.compile("")])
def test_excluding_everything_is_refused(pattern):
    with pytest.raises(ValueError, match="exclude must leave a parameter to clip"):
        QuantileClip(Tagger(), exclude=pattern)


@pytest.mark.parametrize("pattern", [3, b"fc", [None], ["fc", 3]])
def test_a_pattern_of_another_type_is_an_error(pattern):
    with pytest.raises(TypeError, match="exclude must hold names, patterns or a func"):
        QuantileClip(Tagger(), exclude=pattern)


def test_exclusions_hold_in_every_group():
    model = Tagger()
    groups = [{"params": model.encoder}, {"params": model.encoder2, "quantile": 0.5}]
    clipper = QuantileClip(groups, exclude="*bias")
    assert clipper.names == ["0.weight", "1.weight", "weight"]
    assert len(clipper.state_dict()["policies"]) == 2


def test_replicated_needs_a_group_of_processes():
    with pytest.raises(ValueError, match="replicated must be given together with proc"):
        QuantileClip(torch.nn.Linear(2, 2), replicated="weight")
