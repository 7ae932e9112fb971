"""A saved and resumed run has the same bits: states, copies, and moves to a device."""

import copy
import io
import pathlib
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from autoclip_core import Cap, Drop, MeanStd, Quantile, StreamingQuantile, Warmup
from autoclip_torch import (
    Clipper,
    QuantileClip,
    ValueClip,
)
from autoclip_torch.state.namespace import TorchNamespace

from ..support.cases import POLICIES, policy_of
from ..support.torch_models import (
    CLIPPERS,
    SCOPES,
    backward,
    batches,
    check_same,
    every_clipper,
    small_model,
)

N = 20


def start(make, dtype=torch.float32, seed=0):
    """Return a model, its optimizer, and the clipper `make(model)`."""
    model = small_model(seed).to(dtype)
    return model, torch.optim.Adam(model.parameters(), lr=0.02), make(model)


def go_on(run, data):
    """Train on the batches; return the thresholds and scales of all steps."""
    model, optimizer, clipper = run
    decisions = []
    for batch in data:
        backward(model, batch)
        decision = clipper.step()
        optimizer.step()
        decisions.append((decision.threshold, decision.scale))
    return decisions


def states_of(run):
    return [dict(part.state_dict()) for part in run]


def through_a_file(state):
    """Save a state, and load it with `weights_only=True`."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def load(run, states):
    for part, state in zip(run, states, strict=True):
        part.load_state_dict(state)


def check_resumed(make, dtype):
    """N steps, saved and loaded into another run, plus N steps equal 2N steps."""
    data = list(batches(2 * N))
    run = start(make, dtype)
    go_on(run, data[:N])
    saved = through_a_file(states_of(run))
    whole = go_on(run, data[N:])

    resumed = start(make, dtype, seed=7)
    go_on(resumed, data[3:5])
    load(resumed, saved)
    assert resumed[2].metrics()["clip/steps"] == N
    check_same(go_on(resumed, data[N:]), whole)
    check_same(states_of(resumed), states_of(run))
    assert resumed[2].metrics() == run[2].metrics()


@pytest.mark.parametrize("code", POLICIES)
def test_a_resumed_run_of_bfloat16_has_the_same_bits(code):
    """Parameters, moments, thresholds, scales and counts; one scope per policy.

    `test_resume.py` has the formats and a new process.
    """
    policy, scope = policy_of(code), SCOPES[list(POLICIES).index(code) % len(SCOPES)]
    check_resumed(lambda m: Clipper(m, policy, scope=scope), torch.bfloat16)


@every_clipper
def test_a_resumed_run_of_a_named_clipper_has_the_same_bits(case):
    check_resumed(lambda model: case(model), torch.float32)


def test_a_resumed_run_of_several_policies_has_the_same_bits():
    def make(model):
        return Clipper(
            [
                {"params": model[0], "policy": Quantile(0.7, history_length=9)},
                {"params": model[2], "policy": MeanStd(1.0, history_length=None)},
                {"params": model[3]},
            ],
            Warmup(Quantile(0.5), steps=5, threshold=0.1),
            nonfinite="skip",
        )

    check_resumed(make, torch.float32)


def test_without_loading_the_bits_would_differ():
    """The control of the tests above."""
    data = list(batches(2 * N))
    run = start(QuantileClip)
    go_on(run, data[:N])
    states = states_of(run)
    whole = go_on(run, data[N:])
    forgetful = start(QuantileClip)
    load(forgetful[:2], states[:2])
    with pytest.raises(AssertionError):
        check_same(go_on(forgetful, data[N:]), whole)


# The contents of a state.

PLAIN = (dict, list, str, int, float, bool, type(None), torch.Tensor)


def check_plain(node, path="state"):
    """Check that a state is plain Python and tensors with storage of their own size."""
    assert type(node) in PLAIN, f"{path} is a {type(node)}"
    if isinstance(node, dict):
        for key, value in node.items():
            assert type(key) is str
            check_plain(value, f"{path}.{key}")
    elif isinstance(node, list):
        for index, value in enumerate(node):
            check_plain(value, f"{path}[{index}]")
    elif isinstance(node, torch.Tensor):
        assert not node.requires_grad
        assert node.untyped_storage().nbytes() == node.nbytes


MADE_WITH_NUMPY = {
    "numbers of NumPy": lambda m: QuantileClip(
        m,
        quantile=np.float32(0.5),
        history_length=np.int64(5),
        warmup_steps=np.int32(3),
        warmup_threshold=np.float64(2),
        max_threshold=np.float32(9),
    ),
    "a value of NumPy": lambda m: ValueClip(m, clip_value=np.float32(0.1)),
}


@pytest.mark.parametrize(
    "make",
    [*CLIPPERS.values(), *MADE_WITH_NUMPY.values()],
    ids=[*CLIPPERS, *MADE_WITH_NUMPY],
)
def test_a_state_is_tensors_and_plain_python(make):
    run = start(make)
    check_plain(run[2].state_dict())
    go_on(run, batches(5))
    state = run[2].state_dict()
    check_plain(state)
    check_same(through_a_file(state), state)


def test_a_state_holds_no_identity():
    """Two clippers of equal models with equal gradients have equal states."""
    runs = [start(CLIPPERS["QuantileClip"]) for _ in range(2)]
    for run in runs:
        go_on(run, batches(5))
    one, other = (run[2].state_dict() for run in runs)
    check_same(one, other)


def tensors_of(node):
    if isinstance(node, torch.Tensor):
        return [node]
    parts = node.values() if isinstance(node, dict) else node
    nested = isinstance(node, dict | list)
    return [tensor for part in parts for tensor in tensors_of(part)] if nested else []


@every_clipper
def test_a_state_is_a_copy_in_both_directions(case):
    """Later steps do not change a state, and writing to a state changes no clipper."""
    data = list(batches(30))
    run, untouched = start(case), start(case)
    for one in (run, untouched):
        go_on(one, data[:15])
    state = run[2].state_dict()
    kept = copy.deepcopy(state)
    check_same(go_on(run, data[15:20]), go_on(untouched, data[15:20]))
    check_same(state, kept)

    state = run[2].state_dict()
    run[2].load_state_dict(state)
    untouched[2].load_state_dict(copy.deepcopy(state))
    for tensor in tensors_of(state):
        tensor.fill_(3)
    check_same(run[2].state_dict(), untouched[2].state_dict())
    kept = copy.deepcopy(run[2].state_dict())
    for tensor in tensors_of(run[2].state_dict()):
        tensor.fill_(3)
    check_same(run[2].state_dict(), kept)
    check_same(go_on(run, data[20:]), go_on(untouched, data[20:]))


# Copies of a clipper.


def by_pickle(run):
    return pickle.loads(pickle.dumps(run))


@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle])
@every_clipper
def test_a_copy_of_a_run_continues_like_the_run(case, copied):
    """The original and the copy do not affect each other."""
    data = list(batches(30))
    run = start(case)
    go_on(run, data[:15])
    other = copied(run)
    expected = go_on(other, data[15:])
    check_same(go_on(run, data[15:]), expected)
    check_same(states_of(other), states_of(run))
    pairs = zip(run[0].parameters(), other[0].parameters(), strict=True)
    assert not any(one is two for one, two in pairs)


def test_a_namespace_is_copied_without_its_tables():
    xp = TorchNamespace(torch.device("cpu"))
    (table,) = xp.get_tables(halves, 10_000)
    assert xp.get_tables(halves, 10_000)[0] is table
    assert len(pickle.dumps(xp)) < 1000
    for other in (copy.deepcopy(xp), by_pickle(xp)):
        assert other.device == xp.device
        (again,) = other.get_tables(halves, 10_000)
        assert again is not table
        assert torch.equal(again, table)
        assert again[-1] == 5000


def halves(n):
    return (n / 2,)


# The state of a clipper on a device, for which a tensor subclass stands.


class Elsewhere(torch.Tensor):
    """A tensor that NumPy must not view; it stands for a tensor on a device."""


def test_a_state_moves_from_a_device_to_the_cpu_and_back():
    weight = nn.Parameter(torch.ones(2))
    host, device = (
        Clipper([weight], Cap(Quantile(0.5, history_length=6), max_norm=50.0))
        for _ in range(2)
    )

    def step(clipper, value, on_device):
        weight.grad = torch.tensor([value, 0.0])
        if on_device:
            weight.grad = weight.grad.as_subclass(Elsewhere)
        return clipper.step().threshold.item()

    for value in (5.0, 1.0, 4.0):
        assert step(device, value, True) == step(host, value, False)
    check_plain(device.state_dict())
    check_same(device.state_dict(), host.state_dict())
    host.reset()
    host.load_state_dict(device.state_dict())
    assert step(host, 9.0, False) == 4.0
    device.load_state_dict(host.state_dict())
    assert step(device, 8.0, True) == 4.5
    assert device.threshold().item() == 5.0


def test_a_file_of_format_1_loads():
    """The file was saved when the format was new. Later formats must load it, too."""
    parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
    clipper = QuantileClip(parameters, quantile=0.75, history_length=8)
    path = (
        pathlib.Path(__file__).parents[1] / "support" / "states" / "torch-format-1.pt"
    )
    clipper.load_state_dict(torch.load(path, weights_only=True))
    norms = [step * 7 % 11 + 1 for step in range(1, 13)]  # the recorded norms
    expected = np.quantile(norms[-8:], 0.75) * np.array([1, 2])
    np.testing.assert_allclose(clipper.threshold(), expected, rtol=1e-6)
    assert clipper.metrics()["clip/steps"] == 12
    assert clipper.metrics()["clip/dropped_total"] == 0  # not counted at that time


STATES = pathlib.Path(__file__).parents[1] / "support" / "states"
DROPPING = Drop(MeanStd(1.0, history_length=8), clip=Quantile(0.5, history_length=4))


def save_a_file_with_dropped_steps():
    """Write the file below; it is kept as later versions must read it."""
    clipper = Clipper([nn.Parameter(torch.ones(2))], DROPPING)
    clipper.observe([float(norm) for norm in range(1, 12)])
    torch.save(clipper.state_dict(), STATES / "torch-format-1-dropped.pt")


def test_a_file_that_counts_dropped_steps_loads():
    clipper = Clipper([nn.Parameter(torch.ones(2))], DROPPING)
    saved = torch.load(STATES / "torch-format-1-dropped.pt", weights_only=True)
    clipper.load_state_dict(saved)
    assert clipper.threshold().tolist() == [9.5]  # of 8, 9, 10 and 11
    dropped = int(saved["tally"]["dropped"])
    assert dropped > 3
    assert clipper.observe(100.0).dropped.all()
    assert clipper.metrics()["clip/dropped_total"] == dropped + 1


@pytest.mark.parametrize("count", ["dropped", "clipped"])
def test_only_the_count_of_dropped_steps_may_be_missing(count):
    clipper = Clipper([nn.Parameter(torch.ones(2))], DROPPING)
    clipper.observe([1.0, 2.0, 3.0, 99.0])
    saved = clipper.state_dict()
    del saved["tally"][count]
    if count == "dropped":
        clipper.load_state_dict(saved)
        assert clipper.metrics()["clip/dropped_total"] == 0
    else:
        with pytest.raises(ValueError, match="tally is"):
            clipper.load_state_dict(saved)


def test_the_clip_policy_of_a_drop_gives_a_history_its_meaning():
    saved = Clipper([nn.Parameter(torch.ones(2))], DROPPING).state_dict()
    other = Drop(DROPPING.policy, clip=StreamingQuantile(0.5))
    clipper = Clipper([nn.Parameter(torch.ones(2))], other)
    with pytest.raises(ValueError, match=r"\[1\] is 'Quantile' .*'StreamingQuantile'"):
        clipper.load_state_dict(saved, strict=False)


def test_a_state_loads_by_the_keyword_of_torch():
    weight = nn.Parameter(torch.ones(2))
    saved = QuantileClip([weight], quantile=0.5)
    saved.observe([1.0, 3.0])
    loaded = QuantileClip([weight], quantile=0.5)
    loaded.load_state_dict(state_dict=saved.state_dict())
    assert loaded.threshold().tolist() == [2.0]
