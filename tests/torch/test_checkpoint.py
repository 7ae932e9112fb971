"""A saved and resumed run has the same bits; a state that does not fit is refused."""

import copy
import io
import math
import pathlib
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from autoclip_core import Cap, MeanStd, Quantile, Warmup
from autoclip_core.history import full as history
from autoclip_torch import (
    AGC,
    Clipper,
    NormClip,
    QuantileClip,
    StandardClip,
    ValueClip,
    ZClip,
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


# States that do not fit.


def norm(*shape):
    return nn.Parameter(torch.ones(*shape))


def pair(first=(3, 2), second=(2,)):
    return [("w", norm(*first)), ("b", norm(*second))]


def groups(cut, **override):
    """Return two groups of three parameters with the same shape."""
    parameters = [norm(2) for _ in range(3)]
    return [{"params": parameters[:cut]}, {"params": parameters[cut:], **override}]


Q10 = {"quantile": 0.5, "history_length": 10}

# Each: the clipper that saves, the one that loads, and how the message names the
# difference.
STRUCTURE = [
    (
        lambda: QuantileClip(pair(), **Q10),
        lambda: StandardClip(pair(), history_length=10),
        "class is 'QuantileClip' in the state and 'StandardClip' in the clipper",
    ),
    (
        lambda: Clipper(pair(), Quantile(0.5, history_length=10)),
        lambda: QuantileClip(pair(), **Q10),
        "class is 'Clipper' in the state and 'QuantileClip' in the clipper",
    ),
    (
        lambda: QuantileClip(pair(), **Q10, global_clipping=True),
        lambda: QuantileClip(pair(), **Q10),
        "scope is 'global' in the state and 'parameter' in the clipper",
    ),
    (
        lambda: QuantileClip(pair(), **Q10),
        lambda: QuantileClip(pair(), quantile=0.5, history_length=20),
        r"(policies\[0\].history_length is 10 in the state and 20 in the clipper"
        r"|the shape of states\[0\].ring is \(2, 10\) in the state and \(2, 20\))",
    ),
    (
        lambda: QuantileClip(pair(), quantile=0.5, history_length=None),
        lambda: QuantileClip(pair(), **Q10),
        r"(policies\[0\].history_length is None in the state and 10 in the clipper"
        r"|states\[0\] is \['count', 'old', .*'settled'\] in the state and .*'ring'\])",
    ),
    (
        lambda: QuantileClip(pair((3, 2), (2,)), **Q10),
        lambda: QuantileClip(pair((3, 4), (2,)), **Q10),
        r"parameters\[0\]\[1\] is 2 in the state and 4 in the clipper",
    ),
    (
        lambda: QuantileClip(pair(), **Q10, global_clipping=True),
        lambda: QuantileClip(pair((3, 3)), **Q10, global_clipping=True),
        r"parameters\[0\]\[1\] is 2 in the state and 3 in the clipper",
    ),
    (
        lambda: QuantileClip(pair(), **Q10),
        lambda: QuantileClip(pair()[:1], **Q10),
        r"parameters is \[\[3, 2\], \[2\]\] in the state and \[\[3, 2\]\]",
    ),
    (
        lambda: Clipper(pair(), Quantile(0.5, history_length=10)),
        lambda: Clipper(pair(), MeanStd(history_length=10)),
        r"policies\[0\] is 'Quantile' in the state and 'MeanStd' in the clipper",
    ),
    (
        lambda: Clipper(pair(), Cap(Quantile(0.5, history_length=10), max_norm=1.0)),
        lambda: Clipper(pair(), Cap(MeanStd(history_length=10), max_norm=1.0)),
        r"policies\[0\] is 'Quantile' in the state and 'MeanStd' in the clipper",
    ),
    (
        lambda: QuantileClip(groups(1), **Q10, scope="group"),
        lambda: QuantileClip(groups(2), **Q10, scope="group"),
        r"rows\[1\]\[0\] is 1 in the state and 0 in the clipper",
    ),
    (
        lambda: QuantileClip(groups(1), **Q10),
        lambda: QuantileClip(groups(1, quantile=0.9), **Q10),
        r"policies is \['Quantile'\] in the state and \['Quantile', 'Quantile'\]",
    ),
    (
        lambda: QuantileClip(groups(1, quantile=0.9), **Q10),
        lambda: QuantileClip(groups(2, quantile=0.9), **Q10),
        r"the shape of states\[0\].ring is \(1, 10\) in the state and \(2, 10\)",
    ),
    (
        lambda: AGC(pair(), rule="nfnets"),
        lambda: AGC(pair()),
        r"rows\[0\]\[1\] is 2 in the state and 3 in the clipper",
    ),
]

# These fit with strict=False.
SETTINGS = [
    (
        lambda: QuantileClip(pair(), **Q10),
        lambda: QuantileClip(pair(), quantile=0.9, history_length=10),
        r"policies\[0\].quantile is 0.5 in the state and 0.9 in the clipper",
    ),
    (
        lambda: QuantileClip(pair(), **Q10),
        lambda: QuantileClip(pair(), **Q10, include_current=True),
        r"policies\[0\].include_current is False in the state and True in the clipper",
    ),
    (
        lambda: QuantileClip(pair(), **Q10),
        lambda: QuantileClip(pair(), **Q10, max_threshold=2.0),
        r"policies\[0\].type is 'Quantile' in the state and 'Cap' in the clipper",
    ),
    (
        lambda: QuantileClip(pair(), **Q10, max_threshold=2.0),
        lambda: QuantileClip(pair(), **Q10, max_threshold=3.0),
        r"policies\[0\].max_norm is 2.0 in the state and 3.0 in the clipper",
    ),
    (
        lambda: StandardClip(pair()),
        lambda: StandardClip(pair(), deviations=1.0),
        r"policies\[0\].deviations is 2.0 in the state and 1.0 in the clipper",
    ),
    (
        lambda: ZClip(pair()),
        lambda: ZClip(pair(), alpha=0.9),
        r"policies\[0\].alpha is 0.97 in the state and 0.9 in the clipper",
    ),
    (
        lambda: NormClip(pair(), max_norm=1.0),
        lambda: NormClip(pair(), max_norm=2.0),
        r"policies\[0\].max_norm is 1.0 in the state and 2.0 in the clipper",
    ),
    (
        lambda: ValueClip(pair(), clip_value=1.0),
        lambda: ValueClip(pair(), clip_value=2.0),
        r"policies\[0\].max_norm is 1.0 in the state and 2.0 in the clipper",
    ),
    (
        lambda: QuantileClip(pair(), **Q10),
        lambda: QuantileClip(pair(), **Q10, nonfinite="skip"),
        "settings.nonfinite is 'zero' in the state and 'skip' in the clipper",
    ),
    (
        lambda: AGC([("w", norm(4, 1))], rule="nfnets"),
        lambda: AGC([("w", norm(4, 1))], rule="layer"),
        "settings.rule is 'nfnets' in the state and 'layer' in the clipper",
    ),
    (
        lambda: QuantileClip([("a", norm(2)), ("b", norm(2))], **Q10),
        lambda: QuantileClip([("b", norm(2)), ("a", norm(2))], **Q10),
        r"names\[0\] is 'a' in the state and 'b' in the clipper",
    ),
]


def used(clipper, seed=0):
    """Return the clipper after six steps of random gradients."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(6):
        for entry in clipper._policy_states.rows.by_parameter:
            shape = entry.parameter.shape
            entry.parameter.grad = torch.randn(shape, generator=generator)
        clipper.step()
    return clipper


@pytest.mark.parametrize(
    ("saves", "loads", "words", "strict"),
    [(*row, strict) for row in STRUCTURE for strict in (True, False)]
    + [(*row, True) for row in SETTINGS],
)
def test_a_state_that_does_not_fit_is_refused(saves, loads, words, strict):
    """The message names the difference and both values. Nothing is changed."""
    saved, clipper = used(saves()).state_dict(), used(loads(), seed=1)
    before, metrics = clipper.state_dict(), clipper.metrics()
    with pytest.raises(ValueError, match=f"does not fit this clipper: .*{words}"):
        clipper.load_state_dict(saved, strict=strict)
    check_same(clipper.state_dict(), before)
    assert clipper.metrics() == metrics


@pytest.mark.parametrize(("saves", "loads", "words"), SETTINGS)
def test_other_settings_are_accepted_if_asked(saves, loads, words):
    """With `strict=False` the history is loaded, and the clipper keeps its settings."""
    saved, clipper = used(saves()).state_dict(), used(loads(), seed=1)
    before = clipper.state_dict()
    clipper.load_state_dict(saved, strict=False)
    now = clipper.state_dict()
    check_same([now["states"], now["tally"]], [saved["states"], saved["tally"]])
    for name in ("policies", "settings", "names"):
        check_same(now[name], before[name])
    used(clipper, seed=2)


def test_the_constructor_s_quantile_is_kept():
    """The threshold is the constructor's quantile of the loaded norms."""
    weight = nn.Parameter(torch.ones(1))
    saved = QuantileClip([weight], quantile=0.5, history_length=8)
    saved.observe([1.0, 2.0, 3.0, 4.0, 5.0])
    other = QuantileClip([weight], quantile=0.75, history_length=8)
    other.load_state_dict(saved.state_dict(), strict=False)
    assert (saved.threshold().item(), other.threshold().item()) == (3.0, 4.0)


@pytest.mark.parametrize("strict", [True, False])
def test_names_are_compared_if_both_have_them(strict):
    """Without names, the order and shapes of the parameters decide."""
    named, unnamed = (
        QuantileClip(pair(), **Q10),
        used(QuantileClip([parameter for _, parameter in pair()], **Q10)),
    )
    named.load_state_dict(unnamed.state_dict(), strict=strict)
    check_same(named.state_dict()["states"], unnamed.state_dict()["states"])


def test_a_full_history_of_any_length_loads():
    weight = nn.Parameter(torch.ones(1))
    long, short = (
        QuantileClip([weight], quantile=0.5, history_length=None) for _ in range(2)
    )
    long.observe(np.arange(1.0, 3000.0))
    short.observe(np.arange(1.0, 4.0))
    short.load_state_dict(long.state_dict())
    assert short.threshold().item() == 1500
    short.observe(np.arange(3000.0, 6000.0))
    assert short.threshold().item() == 3000


@pytest.fixture
def merged_often(monkeypatch):
    """Keep fewer than 16 recent norms and fewer than 256 settled ones."""
    monkeypatch.setattr(history, "RECENT", 16)


@pytest.mark.parametrize("steps", [1, 15, 16, 255, 256, 300, 555])
def test_a_full_history_resumes_at_any_step_with_the_same_bits(steps, merged_often):
    """The state holds which norms are merged, too."""
    weight, norms = nn.Parameter(torch.ones(1)), np.random.default_rng(0).random(600)
    saved, resumed = (
        QuantileClip([weight], quantile=0.9, history_length=None) for _ in range(2)
    )
    saved.observe(norms[:steps])
    file = io.BytesIO()
    torch.save(saved.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    saved.observe(norms[steps:])
    resumed.observe(norms[steps:])
    check_same(resumed.state_dict(), saved.state_dict())
    [state] = saved.state_dict()["states"]
    counts = {
        name: state[name].isfinite().sum() for name in ("old", "settled", "recent")
    }
    assert counts == {"old": 512, "settled": 80, "recent": 8}


def test_a_later_parameter_has_its_own_history(merged_often):
    weights = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    clipper = QuantileClip(weights[:1], quantile=0.5, history_length=None)
    clipper.observe(np.arange(1.0, 400.0))
    clipper.add_param_group({"params": weights[1:]})
    assert clipper.threshold().tolist() == [200, math.inf]
    clipper.observe(np.arange(1.0, 300.0)[:, None] * [1.0, 2.0])
    assert clipper.threshold().tolist() == [175, 300]
    clipper.load_state_dict(clipper.state_dict())


# Corrupt states.

FOREIGN = [
    None,
    3,
    [],
    "state",
    torch.ones(3),
    {},
    {"state": {}, "param_groups": []},
    nn.Linear(2, 2).state_dict(),
]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("state", FOREIGN)
def test_a_value_that_is_not_a_state_is_refused(state, strict):
    clipper = used(QuantileClip(pair(), **Q10))
    before = clipper.state_dict()
    with pytest.raises(ValueError, match="state_dict must be a result of clipper"):
        clipper.load_state_dict(state, strict=strict)
    check_same(clipper.state_dict(), before)


@pytest.mark.parametrize("number", [0, 2, "1", None, True, 1.0, torch.ones(2)])
def test_another_format_is_refused(number):
    clipper = used(QuantileClip(pair(), **Q10))
    state = clipper.state_dict() | {"format": number}
    with pytest.raises(ValueError, match=r"must have format 1, got .*another version"):
        clipper.load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int32])
def test_another_type_is_refused(dtype):
    clipper = used(QuantileClip(pair(), **Q10))
    state = clipper.state_dict()
    state["states"][0]["ordered"] = state["states"][0]["ordered"].to(dtype)
    words = rf"the type of states\[0\].ordered is '{dtype}' in the state and 'float32'"
    with pytest.raises(ValueError, match=words.replace("torch.", "")):
        clipper.load_state_dict(state)


BROKEN_HISTORIES = {
    "old norms cut off": lambda s: s.update(old=s["old"][:, :7]),
    "no old norms": lambda s: s.update(old=s["old"][:, :0]),
    "one row without end": lambda s: s.update(old=s["old"][0]),
    "old norms out of order": lambda s: s["old"][0, 5].fill_(1000),
    "nothing old": lambda s: s.pop("old"),
    "settled that are old": lambda s: s.update(old=s["settled"], settled=s["old"]),
    "settled norms cut off": lambda s: s.update(settled=s["settled"][:, :7]),
    "no settled norms": lambda s: s.update(settled=s["settled"][:, :0]),
    "recent norms cut off": lambda s: s.update(recent=s["recent"][:, :7]),
    "a count too large": lambda s: s["count"].add_(1),
    "a negative count": lambda s: s["count"].fill_(-1),
    "settled norms out of order": lambda s: s["settled"][0, 5].fill_(1000),
    "NaN": lambda s: s["recent"][0, 1].fill_(math.nan),
}
BROKEN_MOMENTS = {
    "a negative count": lambda s: s["count"].fill_(-1),
    "NaN": lambda s: s["mean"].fill_(math.nan),
    "negative squares": lambda s: s["squares"].fill_(-1),
}


@pytest.mark.parametrize(
    ("policy", "breaking"),
    [
        pytest.param(policy(history_length=None), breaking, id=f"{code}: {name}")
        for code, policy, cases in [
            ("Quantile", Quantile, BROKEN_HISTORIES),
            ("MeanStd", MeanStd, BROKEN_MOMENTS),
        ]
        for name, breaking in cases.items()
    ],
)
def test_a_corrupt_full_history_is_refused(policy, breaking, merged_often):
    clipper = Clipper([nn.Parameter(torch.ones(1))], policy)
    clipper.observe(np.arange(1.0, 1100.0))
    state = clipper.state_dict()
    before = copy.deepcopy(state)
    breaking(state["states"][0])
    with pytest.raises(ValueError, match=r"states\[0\]"):
        clipper.load_state_dict(state)
    check_same(clipper.state_dict(), before)


def test_moments_of_all_norms_fit_either_choice_of_logarithms():
    """The moments do not depend on `log`; only the threshold does."""
    weight, norms = nn.Parameter(torch.ones(1)), np.arange(1.0, 50.0)
    saved, other = (
        Clipper([weight], MeanStd(1.0, history_length=None, log=log))
        for log in (False, True)
    )
    saved.observe(norms)
    other.load_state_dict(saved.state_dict(), strict=False)
    logs = np.log(norms)
    expected = math.exp(logs.mean() + logs.std(ddof=1))
    assert other.threshold().item() == pytest.approx(expected, rel=1e-6)


MISSING = object()
JUNK = [
    *[MISSING, None, 5, 2.5, "x", b"x", True, [], [5], {}, {"a": 1}, (), object],
    *[torch.zeros(()), torch.zeros(3), torch.zeros(2, 0), [None], {"policy": None}],
]


def places(node, path=()):
    """Yield the path to every part of a state."""
    inside = []
    if isinstance(node, dict):
        inside = node.items()
    elif isinstance(node, list):
        inside = enumerate(node)
    for key, part in inside:
        yield (*path, key)
        yield from places(part, (*path, key))


def at(node, path):
    for key in path:
        node = node[key]
    return node


def several_policies():
    parameters = [("a", norm(3, 2)), ("b", norm(2)), ("c", norm(4))]
    return Clipper(
        [
            {"params": parameters[:2]},
            {"params": parameters[2:], "policy": MeanStd(history_length=None)},
        ],
        Warmup(Cap(Quantile(0.5, history_length=4), max_norm=2.0), steps=2),
    )


PATHS = list(places(several_policies().state_dict()))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: ".".join(map(str, path)))
def test_a_broken_part_is_refused(path):
    """Any other value, or none, raises ValueError and changes nothing.

    Settings are the exception: `strict=False` does not compare them.
    """
    good, clipper = used(several_policies()).state_dict(), several_policies()
    before = clipper.state_dict()
    refused = 0
    others = [junk for junk in JUNK if junk is not at(good, path)]
    for junk in others:
        for strict in (True, False):
            state = copy.deepcopy(good)
            if junk is MISSING:
                del at(state, path[:-1])[path[-1]]
            else:
                at(state, path[:-1])[path[-1]] = junk
            try:
                clipper.load_state_dict(state, strict=strict)
            except ValueError:
                check_same(clipper.state_dict(), before)
                refused += 1
            else:
                names = path == ("names",) and junk is None
                setting = path[0] in ("policies", "settings", "names") and not strict
                assert names or setting, (junk, strict)
                clipper.load_state_dict(before)
    assert refused >= len(others) - 1


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


def test_a_state_loads_by_the_keyword_of_torch():
    weight = nn.Parameter(torch.ones(2))
    saved = QuantileClip([weight], quantile=0.5)
    saved.observe([1.0, 3.0])
    loaded = QuantileClip([weight], quantile=0.5)
    loaded.load_state_dict(state_dict=saved.state_dict())
    assert loaded.threshold().tolist() == [2.0]
