"""Which states a clipper loads; other states are refused, and nothing changes."""

import copy
import io
import math

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

from ..support.torch_models import (
    check_same,
)


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
        lambda: ZClip(pair()),
        lambda: ZClip(pair(), log=True),
        r"policies\[0\] is 'ZScore' in the state and 'ZScore\(log=True\)' in the",
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
    (
        lambda: QuantileClip([norm(2), norm(3)], **Q10),
        lambda: QuantileClip([norm(2)], **Q10),
        "the number of parameters is 2 in the state and 1 in the clipper; make both",
    ),
]


def named(count, first=0):
    """Return parameters with numbers as names."""
    return [(f"p{number}", norm(2)) for number in range(first, first + count)]


def split(names, step=1):
    """Return a clipper with a policy for the first parameter, and one for the rest."""
    first, *others = ((name, norm(2)) for name in names)
    given = [{"params": [first]}, {"params": others, "quantile": 0.9}]
    return QuantileClip(given[::step], **Q10)


# With strict=False the parameters in common continue: the clipper that saves, the one
# that loads, and how the message names the others.
PARAMETERS = {
    "another shape": (
        lambda: QuantileClip(pair(), **Q10),
        lambda: QuantileClip(pair((3, 4)), **Q10),
        "another shape has w; pass strict=False",
    ),
    "fewer": (
        lambda: QuantileClip(pair(), **Q10),
        lambda: QuantileClip(pair()[:1], **Q10),
        "only the state has b; pass strict=False",
    ),
    "more, and all norms": (
        lambda: QuantileClip(named(100), quantile=0.5, history_length=None),
        lambda: QuantileClip(named(105), quantile=0.5, history_length=None),
        "only the clipper has p100, p101, p102 and 2 more; pass strict=False",
    ),
    "renamed": (
        lambda: QuantileClip(named(2), **Q10),
        lambda: QuantileClip(named(2, first=1), **Q10),
        "only the state has p0, only the clipper has p2; .* correct state",
    ),
    "units": (
        lambda: QuantileClip(pair(), **Q10, scope="unit"),
        lambda: QuantileClip([*pair()[::-1], ("c", norm(5))], **Q10, scope="unit"),
        "only the clipper has c; pass strict=False",
    ),
    "policies": (
        lambda: split("abc"),
        lambda: split("adcb"),
        "only the clipper has d; pass strict=False",
    ),
    "policies in another order": (
        lambda: split("abc"),
        lambda: split("adcb", step=-1),
        "only the clipper has d; pass strict=False",
    ),
    "global": (
        lambda: QuantileClip(pair(), **Q10, scope="global"),
        lambda: QuantileClip([*pair((3, 3)), ("c", norm(2))], **Q10, scope="global"),
        "only the clipper has c, another shape has w; pass strict=False",
    ),
    "global without names": (
        lambda: QuantileClip([norm(2)], **Q10, scope="global"),
        lambda: QuantileClip([norm(2), norm(3)], **Q10, scope="global"),
        "the number of parameters is 1 in the state and 2 in the clipper; pass strict",
    ),
}

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
    + [(*row, True) for row in (*SETTINGS, *PARAMETERS.values())],
)
def test_a_state_that_does_not_fit_is_refused(saves, loads, words, strict):
    """The message names the difference and both values. Nothing is changed."""
    saved, clipper = used(saves()).state_dict(), used(loads(), seed=1)
    before, metrics = clipper.state_dict(), clipper.metrics()
    with pytest.raises(ValueError, match=f"does not fit this clipper: .*{words}") as e:
        clipper.load_state_dict(saved, strict=strict)
    assert len(str(e.value)) < 400
    check_same(clipper.state_dict(), before)
    assert clipper.metrics() == metrics


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_in_common_continue_if_asked(name):
    saves, loads, _ = PARAMETERS[name]
    saved, clipper = used(saves()), used(loads(), seed=1)
    rows = dict(zip(saved.names, saved.threshold().tolist(), strict=True))
    clipper.load_state_dict(saved.state_dict(), strict=False)
    expected = [rows.get(row, math.inf) for row in clipper.names]
    assert min(expected) < math.inf
    assert clipper.threshold().tolist() == expected
    observed = clipper.state_dict()["tally"]["observed"].tolist()
    assert observed == [6 if row in rows else 0 for row in clipper.names]
    assert used(clipper, seed=2).metrics()["clip/steps"] == 12


@pytest.mark.parametrize(("saves", "loads", "words"), SETTINGS)
def test_other_settings_are_accepted_if_asked(saves, loads, words):
    """With `strict=False` the history is loaded, and the clipper keeps its settings."""
    saved, clipper = used(saves()).state_dict(), used(loads(), seed=1)
    before = clipper.state_dict()
    clipper.load_state_dict(saved, strict=False)
    now = clipper.state_dict()
    check_same([now["states"], now["tally"]], [saved["states"], saved["tally"]])
    for name in ("policies", "settings"):
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


def several_policies(*more):
    parameters = [("a", norm(3, 2)), ("b", norm(2)), ("c", norm(4))]
    policy = MeanStd(history_length=None)
    return Clipper(
        [
            {"params": parameters[:2]},
            {"params": [*parameters[2:], *more], "policy": policy},
        ],
        Warmup(Cap(Quantile(0.5, history_length=4), max_norm=2.0), steps=2),
    )


PATHS = list(places(several_policies().state_dict()))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: ".".join(map(str, path)))
def test_a_broken_part_is_refused(path):
    """Any other value, or none, raises ValueError and changes nothing.

    Settings are an exception: `strict=False` does not compare them, nor names and
    shapes, if they are valid. The count of dropped steps is another one: an earlier
    version did not save it.
    """
    good, clipper = used(several_policies()).state_dict(), several_policies()
    grown = several_policies(("d", norm(2)))
    pairs = [(True, clipper), (False, clipper), (False, grown)]
    refused = 0
    others = [junk for junk in JUNK if junk is not at(good, path)]
    for junk in others:
        for strict, clipper in pairs:
            state, before = copy.deepcopy(good), clipper.state_dict()
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
                setting = path[0] in ("policies", "settings") and not strict
                earlier = path == ("tally", "dropped") and junk is MISSING
                valid = {"parameters": ("5", "[]", "[5]"), "names": ("'x'",)}
                is_valid = repr(junk) in valid.get(path[0], ())
                is_shorter = path[:-2] == ("parameters",) and junk is MISSING
                other = not strict and (is_valid or is_shorter)
                assert names or setting or earlier or other, (junk, strict)
                clipper.load_state_dict(before)
    assert refused >= len(others) - 1
