"""Groups with settings, groups that are added later, and the first argument."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from autoclip_core import Cap, Drop, Fixed, MeanStd, ParamRatio, Quantile
from autoclip_torch import (
    AGC,
    AdaGC,
    Clipper,
    NormClip,
    QuantileClip,
    StandardClip,
    ValueClip,
    ZClip,
)

from ..support.cases import policy_of
from ..support.torch_models import (
    SCOPES,
    Case,
    backward,
    batches,
    check_same,
    clippers_and_scopes,
    gradients_of,
    small_model,
)
from ..support.torch_reference import Reference, arrays, check_decision, check_gradients

SEVERAL = [scope for scope in SCOPES if scope != "global"]
with_several_rows = pytest.mark.parametrize("scope", SEVERAL)

# Each: a clipper, the overrides of its second group, and the policy of that group.
OVERRIDES = {
    "QuantileClip": (
        Case(QuantileClip, {"history_length": 20}, "Quantile(0.9, history_length=20)"),
        {"quantile": 0.5},
        "Quantile(0.5, history_length=20)",
    ),
    "QuantileClip, all": (
        Case(QuantileClip, {"quantile": 0.8}, "Quantile(0.8)"),
        {"quantile": 0.4, "history_length": 7, "include_current": True},
        "Quantile(0.4, history_length=7, include_current=True)",
    ),
    "StandardClip": (
        Case(StandardClip, {"deviations": 1.0}, "MeanStd(1.0)"),
        {"log": True, "ddof": 0},
        "MeanStd(1.0, log=True, ddof=0)",
    ),
    "AGC": (
        Case(AGC, {"clipping": 0.5}, "ParamRatio(0.5)"),
        {"clipping": 0.1, "eps": 0.5},
        "ParamRatio(0.1, eps=0.5)",
    ),
    "ZClip": (
        Case(ZClip, {"z": 1.0, "warmup_steps": 5}, "ZScore(1.0, warmup_steps=5)"),
        {"record": "raw", "target": "mean", "warmup_steps": 9, "log": True},
        "ZScore(1.0, record='raw', target='mean', warmup_steps=9, log=True)",
    ),
    "AdaGC": (
        Case(AdaGC, {"warmup_steps": 5}, "EmaRatio(warmup_steps=5)"),
        {"ratio": 1.5, "beta": 0.9},
        "EmaRatio(1.5, beta=0.9, warmup_steps=5)",
    ),
    "NormClip": (
        Case(NormClip, {"max_norm": 0.5}, "Fixed(0.5)"),
        {"max_norm": 0.1},
        "Fixed(0.1)",
    ),
    "Clipper": (
        Case(Clipper, {"policy": Quantile(0.8)}, "Quantile(0.8)"),
        {"policy": MeanStd(1.0, history_length=10)},
        "MeanStd(1.0, history_length=10)",
    ),
    "around": (
        Case(
            QuantileClip,
            {"max_threshold": 0.6, "warmup_steps": 4},
            "Cap(Warmup(Quantile(0.9), steps=4), max_norm=0.6)",
        ),
        {"quantile": 0.5},
        "Cap(Warmup(Quantile(0.5), steps=4), max_norm=0.6)",
    ),
}


def three_groups(model, override, other=None):
    """Return Linear, norm and head of the small model; the second has its settings."""
    return [
        {"params": model[0].named_parameters("0")},
        {"params": model[2].parameters(), **override},
        {"params": model[3], **(other or {})},
    ]


# The parameters of each group, numbered as in `model.parameters()`.
PLACES = [range(2), range(2, 4), range(4, 6)]


def check_run(clipper, reference, model, steps=60, seed=1):
    """Check a run against the reference, whose rows are in the clipper's order."""
    parameters = list(model.parameters())
    clipped = 0
    for batch in batches(steps, seed):
        backward(model, batch)
        before = arrays(gradients_of(parameters))
        decision = clipper.step()
        expected = reference.step(before, arrays(parameters))
        check_decision(decision, expected)
        check_gradients(parameters, expected)
        clipped += int(expected.clipped.sum())
    assert clipped > 5


def shapes_of(parameters):
    return [tuple(parameter.shape) for parameter in parameters]


# The overrides take turns at the scopes, and the first runs at each.
OVERRIDE_RUNS = [
    (name, scope)
    for number, name in enumerate(OVERRIDES)
    for place, scope in enumerate(SEVERAL)
    if number == 0 or place == number % len(SEVERAL)
]


@pytest.mark.parametrize(("name", "scope"), OVERRIDE_RUNS)
def test_a_group_may_have_settings_of_its_own(name, scope):
    """The third group has the settings of the first, so its rows follow those."""
    model, (case, override, code) = small_model(), OVERRIDES[name]
    clipper = case(three_groups(model, override), scope=scope)
    codes = [case.code, code, case.code]
    reference = Reference(shapes_of(model.parameters()), codes, scope, PLACES)
    check_run(clipper, reference, model)
    assert len(clipper.state_dict()["policies"]) == 2


@with_several_rows
def test_every_group_may_have_another_policy(scope):
    model = small_model()
    codes = [
        "Quantile(0.8, history_length=10)",
        "Drop(MeanStd(1.0, history_length=20))",
        "Cap(ParamRatio(0.4), max_norm=0.5)",
    ]
    first, second, third = map(policy_of, codes)
    groups = three_groups(model, {"policy": second}, {"policy": third})
    clipper = Clipper(groups, first, scope=scope)
    reference = Reference(shapes_of(model.parameters()), codes, scope, PLACES)
    check_run(clipper, reference, model)


@pytest.mark.parametrize(
    ("scope", "names"),
    [
        ("group", ["group 0", "group 2", "group 1"]),
        (
            "parameter",
            ["0.weight", "0.bias", "weight", "bias", "parameter 4", "parameter 5"],
        ),
        (
            "unit",
            [f"0.weight[{i}]" for i in range(3)]
            + ["0.bias", "weight[0]", "weight[1]", "bias", "parameter 4"]
            + ["parameter 5"],
        ),
    ],
)
def test_the_rows_of_one_policy_stand_side_by_side(scope, names):
    """The names are as given: pairs, bare parameters and a module."""
    model = small_model()
    clipper = QuantileClip(three_groups(model, {"quantile": 0.5}), scope=scope)
    assert clipper.names == names
    backward(model, next(batches(1)))
    assert clipper.step().norm.shape == (len(names),)


def test_a_value_clip_takes_a_value_for_each_group():
    model = small_model()
    clipper = ValueClip(three_groups(model, {"clip_value": 0.01}), clip_value=0.1)
    backward(model, next(batches(1)))
    before = [p.grad.clone() for p in model.parameters()]
    threshold = dict(zip(clipper.names, clipper.step().threshold.tolist(), strict=True))
    limits = [0.1, 0.1, 0.01, 0.01, 0.1, 0.1]
    assert list(threshold.values()) == pytest.approx([0.1] * 4 + [0.01] * 2)
    for parameter, gradient, limit in zip(
        model.parameters(), before, limits, strict=True
    ):
        assert torch.equal(parameter.grad, gradient.clamp(-limit, limit))


GENERIC = Case(Clipper, {"policy": Fixed(1.0)}, "Fixed(1.0)")


def test_the_groups_of_an_optimizer_are_no_reason_for_a_norm_of_each():
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    way_out = 'for one norm, give the model, or groups with only "params"; scope='
    with pytest.raises(ValueError, match=way_out):
        NormClip(optimizer.param_groups, 1.0)
    only_params = [{"params": group["params"]} for group in optimizer.param_groups]
    assert NormClip(only_params, 1.0).names == ["global"]


@pytest.mark.parametrize(
    ("case", "override"), [(case, over) for case, over, _ in OVERRIDES.values()]
)
def test_group_settings_are_refused_at_scope_global(case, override):
    """This holds even if the settings equal the clipper's, and for later groups."""
    model = small_model()
    for keywords in ({"scope": "global"}, {"global_clipping": True}):
        with pytest.raises(ValueError, match="a group must be without settings"):
            case(three_groups(model, override), **keywords)
    clipper = case(model[0], scope="global")
    state = clipper.state_dict()
    with pytest.raises(ValueError, match='at scope="global", which is one row'):
        clipper.add_param_group({"params": model[2], **override})
    check_same(clipper.state_dict(), state)
    with_own = {"params": model[0], **case.keywords}
    if set(with_own) <= {"params", *override}:
        with pytest.raises(ValueError, match="without settings"):
            case([with_own], scope="global")


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (make, key)
        for make in (
            lambda groups: QuantileClip(groups),
            lambda groups: StandardClip(groups),
            lambda groups: AdaGC(groups),
            lambda groups: ZClip(groups, scope="group"),
            lambda groups: NormClip(groups, max_norm=1.0, scope="group"),
            lambda groups: ValueClip(groups, clip_value=1.0),
            lambda groups: Clipper(groups, Fixed(1.0)),
        )
        for key in ("lr", "eps", "betas", "weight_decay", "names", "scope")
    ]
    + [
        (lambda groups: AGC(groups), "lr"),
        (lambda groups: QuantileClip(groups), "policy"),
        (lambda groups: QuantileClip(groups), "max_norm"),
        (lambda groups: QuantileClip(groups), "warmup_steps"),
        (lambda groups: Clipper(groups, Fixed(1.0)), "quantile"),
    ],
)
def test_an_unknown_key_of_a_group_is_refused(make, key):
    """The message names the key and lists the valid ones."""
    weight = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=f"the keys params, .*, got '{key}'"):
        make([{"params": [weight], key: 0.5}])


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.SGD])
def test_the_group_dicts_of_an_optimizer_are_refused(make):
    """The groups hold `lr` and `eps`; the optimizer itself is accepted."""
    optimizer = make(small_model().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="an optimizer's own settings have no place"):
        AGC(optimizer.param_groups)


@pytest.mark.parametrize(
    ("make", "optimizer", "policy"),
    [
        (AGC, lambda p: torch.optim.Adam(p, lr=0.5, eps=0.7), ParamRatio()),
        (ZClip, lambda p: torch.optim.RMSprop(p, lr=0.5, alpha=0.3), None),
        (AdaGC, lambda p: torch.optim.Adam(p, betas=(0.1, 0.2)), None),
    ],
)
def test_an_optimizer_s_own_settings_are_never_read(make, optimizer, policy):
    """`eps` of Adam and `alpha` of RMSprop have the names of our arguments."""
    model = small_model()
    groups = [{"params": model[0].parameters()}, {"params": model[3].parameters()}]
    clipper = make(optimizer(groups), scope="group")
    default = make(model, scope="group")
    assert clipper.policy == default.policy
    assert policy in (None, clipper.policy)
    assert clipper.names == ["group 0", "group 1"]


def test_an_optimizer_gives_the_names_of_its_parameters():
    model = small_model()
    optimizer = torch.optim.Adam(model.named_parameters())
    assert QuantileClip(optimizer).names == [
        name for name, _ in model.named_parameters()
    ]
    assert QuantileClip(torch.optim.Adam(model.parameters())).names[0] == "parameter 0"


# Groups that are added later.


def rows_of(plain):
    """Return the arrays of a state; their first axis is the rows."""
    if isinstance(plain, dict):
        return [leaf for part in plain.values() for leaf in rows_of(part)]
    return [plain]


@clippers_and_scopes()
def test_a_group_may_come_later(case, scope):
    """Existing rows keep their history bit for bit, and new rows start empty.

    The run equals that of a clipper with all groups, one without gradients at first.
    """
    model = small_model()
    parameters = list(model.parameters())
    clipper = case([{"params": model[0]}, {"params": model[2]}], scope=scope)
    reference = Reference(shapes_of(parameters), case.code, scope, PLACES)
    for step, batch in enumerate(batches(60)):
        if step == 25:
            add_head(clipper, model, scope)
        backward(model, batch)
        before = arrays(gradients_of(parameters))
        if step < 25:
            before[4:] = None, None
            for parameter in parameters[4:]:
                parameter.grad = None
        weights = arrays(parameters)
        if step < 25:  # a missing group adds nothing to the norm of the parameters
            weights[4:] = [0 * weight for weight in weights[4:]]
        decision = clipper.step()
        expected = reference.step(before, weights)
        check_gradients(parameters, expected)
        present = slice(len(decision.norm))
        check_decision(decision, type(expected)(*(f[present] for f in expected)))
        torch.optim.SGD(parameters, lr=0.02).step()
    metrics = clipper.metrics()
    assert metrics["clip/steps"] == 60
    assert metrics["clip/clip_rate"] > 0


def add_head(clipper, model, scope):
    """Add the third group, and compare the states before and after."""
    old, names, metrics = clipper.state_dict(), clipper.names, clipper.metrics()
    clipper.add_param_group({"params": model[3]})
    new = clipper.state_dict()
    count = len(names)
    added = {"parameter": 2, "unit": 3, "group": 1, "global": 0}[scope]
    assert len(clipper.names) == count + added
    if scope == "group":
        assert clipper.names == [*names, "group 2"]
    pairs = zip(rows_of(new["states"][0]), rows_of(old["states"][0]), strict=True)
    for after, before in pairs:
        check_same(after[:count], before)
    clipper.reset()
    empty = rows_of(clipper.state_dict()["states"][0])
    for after, fresh in zip(rows_of(new["states"][0]), empty, strict=True):
        if after.shape[1:] == fresh.shape[1:]:  # a full history has grown
            check_same(after[count:], fresh[count:])
    clipper.load_state_dict(new)
    for name in ("observed", "clipped"):
        check_same(new["tally"][name][:count], old["tally"][name])
        assert not new["tally"][name][count:].any()
    assert clipper.metrics()["clip/clip_rate"] == metrics["clip/clip_rate"]


@with_several_rows
@pytest.mark.parametrize("override", [{}, {"quantile": 0.5}, {"quantile": 0.3}])
def test_a_later_group_may_have_the_policy_of_an_earlier_one(override, scope):
    """Its rows are inserted after the rows of that policy, and the others move."""
    model = small_model()
    parameters = list(model.parameters())
    codes = [f"Quantile({q}, history_length=9)" for q in (0.8, 0.5)]
    codes.append(f"Quantile({override.get('quantile', 0.8)}, history_length=9)")
    groups = three_groups(model, {"quantile": 0.5}, override)
    clipper = QuantileClip(groups[:2], quantile=0.8, history_length=9, scope=scope)
    whole = QuantileClip(
        three_groups(model, {"quantile": 0.5}, override),
        quantile=0.8,
        history_length=9,
        scope=scope,
    )
    old = Reference(shapes_of(parameters), codes[:2], scope, PLACES[:2])
    reference = Reference(shapes_of(parameters), codes, scope, PLACES)
    for batch in batches(25):
        backward(model, batch)
        before = arrays(gradients_of(parameters))
        reference.step([*before[:4], None, None], arrays(parameters))
        check_decision(clipper.step(), old.step(before, arrays(parameters)))
    clipper.add_param_group(groups[2])
    assert clipper.names == whole.names
    check_run(clipper, reference, model, steps=40, seed=2)


def test_a_history_of_all_norms_takes_on_more_rows():
    """The history has already grown."""
    weight, late = (nn.Parameter(torch.ones(1)) for _ in range(2))
    clipper = QuantileClip([weight], quantile=0.5, history_length=None)
    clipper.observe(np.arange(1.0, 2001.0))
    clipper.add_param_group({"params": [late]})
    assert clipper.threshold().tolist() == [1000.5, math.inf]
    for norm in (3.0, 5.0):
        weight.grad, late.grad = torch.tensor([3000.0]), torch.tensor([norm])
        clipper.step()
    assert clipper.threshold().tolist() == [1001.5, 4.0]


@pytest.mark.parametrize(
    ("group", "error", "words"),
    [
        (lambda m: {"params": m[0]}, ValueError, "got weight in groups 0 and 1; list"),
        (lambda m: {"params": [m[2].weight, m[0].bias]}, ValueError, "in one group"),
        (lambda m: {"params": [m[3].weight]}, ValueError, "2, 3. in groups 0 and 1"),
        (lambda m: {"params": []}, ValueError, "at least one parameter"),
        (lambda m: {"quantile": 0.5}, ValueError, 'must have the key "params"'),
        (lambda m: {"params": m[2], "lr": 0.1}, ValueError, "got 'lr'"),
        (lambda m: {"params": m[2], "quantile": 90}, ValueError, "quantile must be in"),
        (lambda m: {"params": m[2], "quantile": None}, TypeError, "quantile must be"),
        (lambda m: {"params": [3]}, TypeError, "parameter 0 must be a tensor"),
        (lambda m: {"params": "x"}, TypeError, "parameters must be a module"),
        (
            lambda m: {"params": m[2], "history_length": 10**9},
            ValueError,
            "takes .* GiB, more than 1 GiB",
        ),
    ],
)
def test_a_group_that_is_refused_changes_nothing(group, error, words):
    """A parameter that is listed twice may be an excluded one."""
    model = small_model()
    named = [pair for pair in model.named_parameters() if not pair[0].startswith("2")]
    clipper = QuantileClip(named, quantile=0.5, exclude="3.weight")
    for batch in batches(5):
        backward(model, batch)
        clipper.step()
    state, names, metrics = clipper.state_dict(), clipper.names, clipper.metrics()
    with pytest.raises(error, match=words):
        clipper.add_param_group(group(model))
    check_same(clipper.state_dict(), state)
    assert (clipper.names, clipper.metrics()) == (names, metrics)
    clipper.add_param_group({"params": model[2]})
    assert clipper.names == [*names, "weight", "bias"]


def test_rows_that_would_not_fit_are_refused_before_anything_changes():
    """The history length is too long for so many rows."""
    weight = nn.Parameter(torch.ones(2))
    clipper = QuantileClip([weight], history_length=10**6)
    others = [nn.Parameter(torch.ones(2)) for _ in range(150)]
    with pytest.raises(ValueError, match="GiB"):
        clipper.add_param_group({"params": others})
    assert clipper.names == ["parameter 0"]
    weight.grad = torch.tensor([3.0, 4.0])
    assert clipper.step().norm.tolist() == [5]


def test_a_later_group_is_skipped_with_the_others():
    model = small_model()
    clipper = Clipper(model[0], Drop(Fixed(1e-9), action="skip"))
    clipper.add_param_group({"params": model[3]})
    backward(model, next(batches(1)))
    assert clipper.step().skipped.all()
    assert all(parameter.grad is None for parameter in model[3].parameters())


def test_a_later_group_may_be_excluded_as_a_whole():
    """A group may have nothing to clip, as in the constructor."""
    model = small_model()
    clipper = QuantileClip(model[0], exclude="*bias")
    clipper.add_param_group({"params": [("late.bias", model[3].bias)]})
    assert clipper.names == ["weight"]


# The first argument.


def test_a_generator_lasts_for_the_whole_run():
    """It is read once. Other packages have no parameters left after the first step."""
    model = small_model()
    for given in (
        model.parameters(),
        model.named_parameters(),
        iter(list(model.parameters())),
        [{"params": model.parameters()}],
        ({"params": layer.parameters()} for layer in (model[0], model[2], model[3])),
    ):
        clipper = NormClip(given, max_norm=1e-3, scope="parameter")
        for batch in batches(5):
            backward(model, batch)
            assert clipper.step().clipped.tolist() == [True] * 6
            assert all(p.grad.norm() < 1.001e-3 for p in model.parameters())


def test_one_parameter_or_one_group_needs_no_list():
    weight = nn.Parameter(torch.zeros(2))
    for given in (weight, {"params": weight}, {"params": [weight], "max_norm": 1.0}):
        weight.grad = torch.tensor([3.0, 4.0])
        NormClip(given, max_norm=1.0, scope="group").step()
        assert weight.grad.tolist() == pytest.approx([0.6, 0.8])


@pytest.mark.parametrize("scope", ["parameter", "global"])
def test_tied_parameters_are_one_row(scope):
    """Their shared gradient is measured and scaled once, however they are given."""
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    weight = model[0].weight
    given = [
        model,
        model.parameters(),
        [weight, weight],
        [("one", weight), ("two", weight)],
        [{"params": [weight, weight]}],
        model.named_parameters(remove_duplicate=False),
    ]
    for parameters in given:
        clipper = NormClip(parameters, max_norm=2.0, scope=scope)
        assert len(clipper.names) == 1
        weight.grad = torch.full((3, 3), 2.0)
        decision = clipper.step()
        assert decision.norm.item() == pytest.approx(6)
        torch.testing.assert_close(weight.grad, torch.full((3, 3), 2 / 3))


def test_tied_parameters_in_two_groups_are_refused():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="weight in groups 0 and 1; list it once"):
        QuantileClip([{"params": model[0]}, {"params": model[1]}])


def test_a_clipper_s_policy_is_not_changed_by_a_group():
    model = small_model()
    policy = Cap(Quantile(0.9), max_norm=1.0)
    clipper = Clipper(three_groups(model, {"policy": Fixed(1.0)}), policy)
    assert clipper.policy is policy
