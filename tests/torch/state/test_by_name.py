"""A state is loaded by the names of parameters, without the prefixes of wrappers."""

import warnings

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    checkpoint_wrapper,
)
from torch.optim.swa_utils import AveragedModel

from autoclip_core import MeanStd, Quantile, Warmup
from autoclip_torch import AGC, Clipper, NormClip, QuantileClip
from autoclip_torch.state.by_name import strip_wrappers

from ...support.torch_models import check_same


def parameters(names):
    """Return (name, parameter) pairs of one shape, which alone shows no swap."""
    return [(name, nn.Parameter(torch.ones(3, 2))) for name in names]


def quantile(names, **keywords):
    return QuantileClip(parameters(names), quantile=0.5, history_length=4, **keywords)


def two_policies(names):
    """`a` and `b` have a quantile, `c` a mean; the first name has the first policy."""
    groups = [
        {"params": [pair], "policy": MeanStd(history_length=None)}
        if pair[0] == "c"
        else {"params": [pair]}
        for pair in parameters(names)
    ]
    return Clipper(groups, Warmup(Quantile(0.5, history_length=4), steps=1))


def two_groups(names):
    """`a` and `c` share a row, the second one if `b` comes first."""
    pairs = dict(parameters(names))
    groups = {"b": [("b", pairs.pop("b"))]} | {"a": list(pairs.items())}
    order = "ba" if names[0] == "b" else "ab"
    return QuantileClip(
        [{"params": groups[name]} for name in order],
        quantile=0.5,
        history_length=None,
        scope="group",
    )


MAKERS = {
    "parameter": quantile,
    "unit": lambda names: AGC(parameters(names), clipping=0.1),
    "global": lambda names: quantile(names, scope="global"),
    "group": two_groups,
    "policies": two_policies,
}


def step(clipper, seed=0):
    """Take four steps; the gradients depend on the names and not on the order."""
    for number in range(4):
        for entry in clipper._policy_states.rows.by_parameter:
            seed_of = seed + 10 * number + ord(entry.name[-1])
            generator = torch.Generator().manual_seed(seed_of)
            shape = entry.parameter.shape
            entry.parameter.grad = torch.randn(shape, generator=generator)
        clipper.step()
    return clipper


def by_parameter(clipper):
    """Return the threshold and the counts of each parameter's rows, by its name."""
    thresholds, tally = clipper.threshold(), clipper._policy_states.tally
    return {
        entry.name[-1]: [
            part[entry.start : entry.stop].tolist()
            for part in (thresholds, tally.observed, tally.clipped)
        ]
        for entry in clipper._policy_states.rows.by_parameter
    }


@pytest.mark.parametrize("order", ["bca", "cba"])
@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
def test_parameters_in_another_order_keep_their_history(maker, order):
    """It is that of a clipper that was made in this order."""
    saved, loaded = step(maker("abc")), maker(order)
    loaded.load_state_dict(saved.state_dict())
    assert by_parameter(loaded) == by_parameter(saved)
    check_same(loaded.state_dict()["states"], step(maker(order)).state_dict()["states"])
    assert by_parameter(step(loaded, seed=5)) == by_parameter(step(saved, seed=5))


class Net(nn.Module):
    """Two layers of the same shape."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)


def compiled(model):
    return torch.compile(model, backend="eager")  # imports no Inductor


def wrap_a_layer(model):
    model.second = checkpoint_wrapper(compiled(model.second))
    return model


WRAPPERS = {
    "module.": AveragedModel,
    "_orig_mod.": compiled,
    "second._checkpoint_wrapped_module._orig_mod.": wrap_a_layer,
    "module._orig_mod.": lambda model: nn.DataParallel(compiled(model)),
}


@pytest.mark.parametrize("scope", ["global", "parameter", "unit"])
@pytest.mark.parametrize("prefix", WRAPPERS)
def test_prefixes_of_wrappers_do_not_count(prefix, scope):
    """Also strictly: the other settings are compared."""

    def make(model, quantile=0.5):
        return QuantileClip(model, quantile, history_length=4, scope=scope)

    wrapped, plain = make(WRAPPERS[prefix](Net())), make(Net())
    names = [entry.name for entry in wrapped._policy_states.rows.by_parameter]
    assert any(name.startswith(prefix) for name in names)
    for saved, loaded in ((wrapped, plain), (plain, wrapped)):
        step(saved, seed=len(prefix))
        loaded.load_state_dict(saved.state_dict())
        assert loaded.threshold().tolist() == saved.threshold().tolist()
    other = make(Net(), quantile=0.9)
    with pytest.raises(ValueError, match=r"quantile is 0.5 in the state and 0.9"):
        other.load_state_dict(wrapped.state_dict())


def test_the_prefix_of_fsdp1_does_not_count():
    """Its flat parameters are refused, but a state may be saved before wrapping."""
    name = "_fsdp_wrapped_module.second._fsdp_wrapped_module.weight"
    assert strip_wrappers([name]) == ["second.weight"]


def test_a_prefix_that_tells_two_names_apart_counts():
    pairs = ["module.a", "a"]
    saved, loaded = step(quantile(pairs)), quantile(pairs[::-1])
    loaded.load_state_dict(saved.state_dict())
    assert loaded.threshold().tolist() == saved.threshold().tolist()[::-1]


@pytest.mark.parametrize("strict", [True, False])
def test_other_names_are_not_loaded_by_position(strict):
    """Without names in the state, the order decides, as the message says."""
    saved, loaded = step(quantile("ab")).state_dict(), quantile("cd")
    before = loaded.state_dict()
    with pytest.raises(
        ValueError,
        match=r"only the state has a, b, only the clipper .*"
        "or set it to None to load by position",
    ) as caught:
        loaded.load_state_dict(saved, strict=strict)
    assert "strict=False" not in str(caught.value)  # nothing is in common
    check_same(loaded.state_dict(), before)
    loaded.load_state_dict(saved | {"names": None}, strict=strict)
    check_same(loaded.state_dict()["states"], saved["states"])


@pytest.mark.parametrize("strict", [True, False])
def test_rows_that_cannot_follow_the_names_are_refused(strict):
    def grouped(first, second):
        groups = [{"params": parameters(names)} for names in (first, second)]
        return QuantileClip(groups, 0.5, scope="group")

    with pytest.raises(ValueError, match=r"rows is .* in the state and"):
        grouped("cb", "a").load_state_dict(
            step(grouped("ab", "c")).state_dict(), strict=strict
        )

    def fixed(names):
        pairs = parameters(names)
        groups = [{"params": [p], "max_norm": i + 1.0} for i, p in enumerate(pairs)]
        return NormClip(groups, max_norm=1.0, scope="parameter")

    with pytest.raises(ValueError, match="give the parameters in the order of"):
        fixed("bac").load_state_dict(step(fixed("abc")).state_dict(), strict=strict)


@pytest.mark.parametrize(
    ("scope", "lengths", "is_ambiguous"),
    [("parameter", (2, 2), True), ("parameter", (2, 3), False), ("global", (2, 2), 0)],
)
def test_a_clipper_without_names_warns_if_only_the_order_decides(
    scope, lengths, is_ambiguous
):
    pairs = [
        (n, nn.Parameter(torch.ones(length)))
        for n, length in zip("ab", lengths, strict=True)
    ]
    saved, loaded = (
        QuantileClip(given, 0.5, scope=scope) for given in (pairs, dict(pairs).values())
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded.load_state_dict(step(saved).state_dict())
    texts = [str(each.message) for each in caught]
    assert len(texts) == is_ambiguous
    assert all("the state has names, such as a and b, and" in text for text in texts)
    assert loaded.threshold().tolist() == saved.threshold().tolist()
