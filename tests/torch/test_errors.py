"""Bad input: the error names the argument, the rule, the value and the way out."""

import inspect
import pickle
from copy import deepcopy
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from autoclip_core import Drop, Fixed, MeanStd, Quantile
from autoclip_torch import (
    AGC,
    AdaGC,
    Clipper,
    NormClip,
    QuantileClip,
    StandardClip,
    TrustClip,
    UpdateClipper,
    ValueClip,
    ZClip,
)

from ..support.torch_models import backward, batches, check_same, small_model

NAN, INF = float("nan"), float("inf")


class Bad(NamedTuple):
    """A call that must fail, and the parts of its message, in this order."""

    make: object
    error: type
    argument: str
    rule: str
    value: str = ""
    way_out: str = ""


def weights():
    return [nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(2))]


def quantile(**keywords):
    return lambda: QuantileClip(weights(), **keywords)


def with_policy(policy, **keywords):
    return lambda: Clipper(weights(), policy, **keywords)


def of(given):
    """Return a call that makes a clipper of what `given()` returns."""
    return lambda: QuantileClip(given())


def partly_read():
    parameters = nn.Linear(2, 2).parameters()
    next(parameters)  # such as for its device
    return parameters


def used_up():
    parameters = small_model().parameters()
    QuantileClip(parameters)
    return parameters


def in_two_groups():
    first, second = weights()
    return [{"params": [first, second]}, {"params": [second]}]


def non_leaf():
    return [weights()[0] * 2]


def lazy():
    return nn.LazyLinear(3).parameters()


MODULE = "must be a module, an optimizer, or an iterable of parameters"
LEAST = "must hold at least one parameter"
NUMBERS = {
    # keyword: (its clipper, the rule, values outside it)
    "quantile": (QuantileClip, r"in \[0, 1\]", [90, 1.5, -0.1, NAN, INF]),
    "deviations": (StandardClip, ">= 0 and finite", [-1, NAN, INF]),
    "clipping": (AGC, "> 0 and finite", [0, -1.0, NAN, INF]),
    "eps": (AGC, "> 0 and finite", [0, -1e-3, NAN]),
    "z": (ZClip, "> 0 and finite", [0, -2.5, NAN]),
    "alpha": (ZClip, r"in \[0, 1\)", [1, 1.5, -0.1, NAN]),
    "ratio": (AdaGC, "> 1 and finite", [1, 0.5, NAN, INF]),
    "beta": (AdaGC, r"in \[0, 1\)", [1, -0.1, NAN]),
    "max_norm": (NormClip, "> 0", [0, -1, NAN, -INF]),
    "clip_value": (ValueClip, "> 0 and finite", [0, -1, NAN, INF]),
    "min_threshold": (QuantileClip, "> 0 and finite", [0, -1, NAN, INF]),
    "max_threshold": (ZClip, "> 0 and finite", [0, -1, NAN, INF]),
    "warmup_threshold": (AdaGC, "> 0", [0, -1, NAN]),
}
COUNTS = {
    # keyword: (its clipper, the smallest value)
    "history_length": (QuantileClip, 1),
    "ddof": (StandardClip, 0),
    "warmup_steps": (ZClip, 0),
    "max_consecutive_skips": (QuantileClip, 1),
}
FLAGS = {
    "include_current": QuantileClip,
    "log": StandardClip,
    "dry_run": NormClip,
    "global_clipping": QuantileClip,
}
CHOICES = {
    "scope": (QuantileClip, ["layer", "Parameter", "", 3, True]),
    "nonfinite": (QuantileClip, ["ignore", None, True, 0]),
    "target": (ZClip, ["max", None]),
    "record": (ZClip, ["clipped", None]),
    "rule": (AGC, ["optax", None, True]),
}
NEEDED = {NormClip: {"max_norm": 1.0}}


def with_keyword(make, keyword, value):
    keywords = {**NEEDED.get(make, {}), keyword: value}
    return lambda: make(weights(), **keywords)


def number_rows():
    """Yield each number outside its range, and values that are not numbers."""
    for keyword, (make, rule, values) in NUMBERS.items():
        for value in values:
            call = with_keyword(make, keyword, value)
            yield Bad(call, ValueError, keyword, f"must be {rule}", f"got {value}")
        for value in ("0.5", True, [1], 1j):
            call = with_keyword(make, keyword, value)
            rule = f"must be a number {NUMBERS[keyword][1]}"
            yield Bad(call, TypeError, keyword, rule, "got ")


def count_rows():
    for keyword, (make, least) in COUNTS.items():
        rule = f"must be a whole number >= {least}"
        more = {"nonfinite": "skip"} if keyword == "max_consecutive_skips" else {}
        for value in (least - 1, -10):
            yield Bad(
                lambda m=make, v=value, k=keyword, o=more: m(weights(), **o, **{k: v}),
                ValueError,
                keyword,
                rule,
                f"got {value}",
            )
        for value in (1.5, "7", True):
            yield Bad(
                lambda m=make, v=value, k=keyword, o=more: m(weights(), **o, **{k: v}),
                TypeError,
                keyword,
                rule,
                "got ",
            )


def word_rows():
    for keyword, make in FLAGS.items():
        for value in (1, 0, "yes"):
            call = with_keyword(make, keyword, value)
            rule = "must be True or False"
            yield Bad(call, TypeError, keyword, rule, f"got {value!r}")
    for keyword, (make, values) in CHOICES.items():
        for value in values:
            call = with_keyword(make, keyword, value)
            yield Bad(call, ValueError, keyword, "must be one of '", f"got {value!r}")


ROWS = {
    # The parameters.
    "percentile": Bad(
        quantile(quantile=90),
        ValueError,
        "quantile",
        r"must be in \[0, 1\]",
        "got 90",
        "did you mean 0.9",
    ),
    "negative history": Bad(
        quantile(history_length=-5),
        ValueError,
        "history_length",
        "must be a whole number >= 1",
        "got -5",
        "use None to keep the norms of all steps",
    ),
    "no parameters": Bad(
        of(list),
        ValueError,
        "parameters",
        LEAST,
        "got none",
        "pass a list or the model",
    ),
    "an empty module": Bad(of(nn.ReLU), ValueError, "parameters", LEAST, "got none"),
    "an empty group": Bad(
        of(lambda: [{"params": []}]), ValueError, "parameters", LEAST, "got none"
    ),
    "a generator after next()": Bad(
        of(partly_read),
        ValueError,
        "parameters",
        "must be a generator that was not read before",
        "got one whose first parameters are gone",
        "pass the model or a list",
    ),
    "a generator twice": Bad(
        of(used_up),
        ValueError,
        "parameters",
        LEAST,
        "got none",
        "can be read only once",
    ),
    "a non-leaf tensor": Bad(
        of(non_leaf),
        ValueError,
        "parameter 0",
        "must be a leaf tensor",
        "got the result of an operation",
        "pass the parameters themselves",
    ),
    "two groups": Bad(
        of(in_two_groups),
        ValueError,
        "a parameter",
        "must be in one group",
        r"got one of shape \(2,\) in groups 0 and 1",
        "list it once",
    ),
    "an int tensor": Bad(
        of(lambda: [*weights(), torch.ones(2, dtype=torch.int64)]),
        ValueError,
        "parameter 2",
        "must be of a floating-point or complex type",
        "got torch.int64",
        "leave it out",
    ),
    "a named int tensor": Bad(
        of(lambda: [("steps", torch.ones(2, dtype=torch.int32))]),
        ValueError,
        "parameter 'steps'",
        "must be of a floating-point",
        "got torch.int32",
    ),
    "a lazy parameter": Bad(
        of(lazy),
        ValueError,
        "parameter 0",
        "must be initialized",
        "got a lazy parameter",
        "run one batch through the model first",
    ),
    "a string": Bad(
        of(lambda: "model.parameters"),
        TypeError,
        "parameters",
        MODULE,
        "got str",
        r"pass model.parameters\(\)",
    ),
    "nothing": Bad(of(lambda: None), TypeError, "parameters", MODULE, "got NoneType"),
    "a number": Bad(of(lambda: 3), TypeError, "parameters", MODULE, "got int"),
    "arrays": Bad(
        of(lambda: [np.ones(3)]),
        TypeError,
        "parameter 0",
        "must be a tensor",
        "ndarray",
    ),
    "names alone": Bad(
        of(lambda: ["weight"]), TypeError, "parameter 0", "must be a tensor", "got str"
    ),
    "modules": Bad(
        of(lambda: [nn.Linear(2, 2)]),
        TypeError,
        "parameter 0",
        "must be a tensor",
        "got Linear",
    ),
    "groups among parameters": Bad(
        of(lambda: [*weights(), {"params": weights()}]),
        TypeError,
        "parameter 2",
        "must be a tensor",
        "got dict",
        "groups cannot be mixed with parameters",
    ),
    "a pair the wrong way round": Bad(
        of(lambda: [(weights()[1], "bias")]),
        TypeError,
        "a pair",
        r"must be \(name, parameter\)",
        r"got \(Parameter, str\)",
        "swap the two",
    ),
    "three in a pair": Bad(
        of(lambda: [("bias", weights()[1], 3)]),
        TypeError,
        "a pair",
        r"must be \(name, parameter\)",
        "got 3 items",
    ),
    "a group without params": Bad(
        of(lambda: [{"parameters": weights()}]),
        ValueError,
        "a group",
        'must have the key "params"',
        r"got the keys \['parameters'\]",
        'write {"params"',
    ),
    # Policies.
    "the class of a policy": Bad(
        with_policy(Quantile), TypeError, "policy", "must be a policy", "got <class"
    ),
    "the name of a policy": Bad(
        with_policy("quantile"),
        TypeError,
        "policy",
        "must be a policy",
        "got 'quantile'",
        r"such as Quantile\(0.9\)",
    ),
    "no policy": Bad(
        with_policy(None), TypeError, "policy", "must be a policy", "got None"
    ),
    "a clipper for a policy": Bad(
        with_policy(QuantileClip),
        TypeError,
        "policy",
        "must be a policy",
        "got <class",
    ),
    "the class of a group's policy": Bad(
        lambda: Clipper([{"params": weights(), "policy": MeanStd}], Fixed(1.0)),
        TypeError,
        "policy",
        "must be a policy",
        "got <class",
    ),
    "a group's percentile": Bad(
        lambda: QuantileClip([{"params": weights(), "quantile": 90}]),
        ValueError,
        "quantile",
        r"must be in \[0, 1\]",
        "got 90",
        "did you mean 0.9",
    ),
    "a group's clip value": Bad(
        lambda: ValueClip([{"params": weights(), "clip_value": 0}], clip_value=1.0),
        ValueError,
        "clip_value",
        "must be > 0 and finite",
        "got 0",
    ),
    # Arguments that contradict each other or have no effect.
    "warm-up threshold alone": Bad(
        quantile(warmup_threshold=1.0),
        ValueError,
        "warmup_threshold",
        "must be given together with warmup_steps",
        "got 1.0",
        "set warmup_steps",
    ),
    "floor above cap": Bad(
        quantile(min_threshold=2.0, max_threshold=1.0),
        ValueError,
        "min_threshold",
        "must be at most max_threshold=1.0",
        "got 2.0",
        "swap the two",
    ),
    "two scopes": Bad(
        quantile(scope="unit", global_clipping=True),
        ValueError,
        "global_clipping",
        "must be in agreement with scope='unit'",
        "got True",
        "pass only scope",
    ),
    "a rule and a scope": Bad(
        lambda: AGC(weights(), rule="nfnets", scope="parameter"),
        ValueError,
        "rule",
        "must be \"unit\" with scope='parameter'",
        "got 'nfnets'",
        "leave it out, or the scope",
    ),
    "a rule and the global scope": Bad(
        lambda: AGC(weights(), rule="layer", global_clipping=True),
        ValueError,
        "rule",
        'must be "unit" with scope="global"',
        "got 'layer'",
        "leave it out, or the scope",
    ),
    "a rule without axes": Bad(
        lambda: AGC([nn.Parameter(torch.ones(2, 2, 2, 2, 2, 2))], rule="nfnets"),
        ValueError,
        'rule="nfnets"',
        "must have parameters of at most 5 axes",
        r"got shape \(2, 2, 2, 2, 2, 2\)",
        'use rule="unit", or exclude',
    ),
    "skips that cannot happen": Bad(
        quantile(max_consecutive_skips=3),
        ValueError,
        "max_consecutive_skips",
        'must be given with nonfinite="skip"',
        "got 3",
        "leave it out",
    ),
    "a window that is too large": Bad(
        quantile(history_length=10**9),
        ValueError,
        "history_length=1000000000 for 2 rows",
        "more than 1 GiB",
        "",
        "StreamingQuantile",
    ),
    # Arguments that other clippers have.
    "a second positional argument": Bad(
        lambda: QuantileClip(weights(), 0.9, 1000), TypeError, "positional", ""
    ),
    "swapped positional arguments": Bad(
        lambda: QuantileClip(0.9, small_model()),
        TypeError,
        "quantile",
        r"must be a number in \[0, 1\]",
        r"got Sequential\([^\n]{66}\.\.\.$",
    ),
    "a misspelt keyword": Bad(
        quantile(quantil=0.9),
        TypeError,
        "quantil",
        "is no argument of QuantileClip",
        "it takes parameters, quantile, history_length, include_current, dry_run,",
    ),
    "no threshold": Bad(lambda: NormClip(weights()), TypeError, "max_norm", ""),
    "no clip value": Bad(lambda: ValueClip(weights()), TypeError, "clip_value", ""),
    "a cap on values": Bad(
        lambda: ValueClip(weights(), clip_value=1.0, max_threshold=1.0),
        TypeError,
        "max_threshold",
        "is no argument of ValueClip",
    ),
    "a warm-up of values": Bad(
        lambda: ValueClip(weights(), clip_value=1.0, warmup_steps=5),
        TypeError,
        "warmup_steps",
        "is no argument of ValueClip",
    ),
    "a threshold for a warm-up that clips nothing": Bad(
        lambda: ZClip(weights(), warmup_steps=5, warmup_threshold=1.0),
        TypeError,
        "warmup_threshold",
        "is no argument of ZClip",
        "",
        "max_threshold",
    ),
    "a policy for a clipper that has one": Bad(
        lambda: QuantileClip(weights(), policy=Quantile(0.5)),
        TypeError,
        "policy",
        "is no argument of QuantileClip",
        "",
        "max_threshold",
    ),
    "a policy for an optimizer of a clipper that has one": Bad(
        lambda: QuantileClip.as_optimizer(
            torch.optim.SGD(weights(), lr=0.1), policy=Quantile(0.5)
        ),
        TypeError,
        "policy",
        "is no argument of QuantileClip",
    ),
    "a misspelt keyword of AdaGC": Bad(
        lambda: AdaGC(weights(), betas=0.9),
        TypeError,
        "betas",
        "is no argument of AdaGC",
    ),
}


def every_row():
    named = [pytest.param(row, id=name) for name, row in ROWS.items()]
    made = [*number_rows(), *count_rows(), *word_rows()]
    return named + [
        pytest.param(row, id=f"{row.argument} {row.value} {place}")
        for place, row in enumerate(made)
    ]


@pytest.mark.parametrize("row", every_row())
def test_the_message_says_what_is_wrong_and_what_to_do(row):
    """The message has argument, rule, value and way out, in this order."""
    words = [row.argument, row.rule, row.value, row.way_out]
    with pytest.raises(row.error, match=".*".join(word for word in words if word)):
        row.make()


@pytest.mark.parametrize(
    "make",
    [QuantileClip, StandardClip, AGC, ZClip, AdaGC, NormClip, ValueClip, Clipper],
)
def test_all_arguments_but_the_first_two_are_keywords(make):
    """A later version can therefore add an argument without a change of order."""
    kinds = [p.kind for p in inspect.signature(make).parameters.values()]
    free = {inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD}
    assert kinds[:2] == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * 2
    assert set(kinds[2:]) <= free


FIRST_ARGUMENTS = [
    (QuantileClip, "quantile", 0.7),
    (StandardClip, "deviations", 3.0),
    (AGC, "clipping", 0.05),
    (ZClip, "z", 3.5),
    (AdaGC, "ratio", 1.5),
    (NormClip, "max_norm", 0.5),
    (ValueClip, "clip_value", 0.1),
    (Clipper, "policy", Fixed(0.5)),
]


@pytest.mark.parametrize(("make", "name", "value"), FIRST_ARGUMENTS)
def test_the_first_policy_argument_may_follow_the_parameters(make, name, value):
    """The same argument may follow the optimizer in `as_optimizer`."""
    expected = make(weights(), **{name: value}).policy
    assert make(weights(), value).policy == expected
    sgd = torch.optim.SGD(weights())
    assert make.as_optimizer(sgd, value).clipper.policy == expected


def test_every_error_is_one_short_line():
    for row in ROWS.values():
        with pytest.raises(row.error) as caught:
            row.make()
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 320


# A failed call on a used clipper changes nothing.


def used(make=QuantileClip, **keywords):
    """Return a model and its clipper of six rows, after eight steps."""
    model = small_model()
    clipper = make(model, **keywords)
    for batch in batches(8):
        backward(model, batch)
        clipper.step()
    return model, clipper


SIX = r"norms must be of shape \(6,\), or a series of shape \(steps, 6\), got "
ONE = r"norms must be a number, or a series of shape \(steps, 1\), got "
FAILED = {
    "observe a number": (lambda c, m: c.observe(1.0), ValueError, SIX + r"\(\)"),
    "observe too few": (lambda c, m: c.observe([1.0] * 5), ValueError, SIX + r"\(5,\)"),
    "observe nothing": (lambda c, m: c.observe([]), ValueError, SIX + r"\(0,\)"),
    "observe no steps": (
        lambda c, m: c.observe(np.ones((0, 6))),
        ValueError,
        SIX + r"\(0, 6\); clipper.names lists the rows",
    ),
    "observe a column": (
        lambda c, m: c.observe(np.ones((6, 1))),
        ValueError,
        SIX + r"\(6, 1\)",
    ),
    "observe a cube": (
        lambda c, m: c.observe(torch.ones(2, 1, 6)),
        ValueError,
        SIX + r"\(2, 1, 6\)",
    ),
    "observe words": (lambda c, m: c.observe("norm"), TypeError, "'str'"),
    "load nothing": (lambda c, m: c.load_state_dict(None), ValueError, "got NoneType"),
    "add no group": (lambda c, m: c.add_param_group(3), TypeError, "must be a dict"),
    "add parameters": (
        lambda c, m: c.add_param_group(m.parameters()),
        TypeError,
        r"got generator; write add_param_group.{\"params\": module.parameters",
    ),
    "remove another": (
        lambda c, m: c.remove_params([torch.nn.Parameter(torch.ones(2))]),
        ValueError,
        r"parameters must be of this clipper, got Parameter of shape \(2,\); clipper",
    ),
    "remove all": (lambda c, m: c.remove_params(m), ValueError, "only a part of the"),
    "replace another": (
        lambda c, m: c.replace_param(m.parameters(), m[0].bias),
        ValueError,
        "old must be of this clipper, got generator; clipper.parameters lists",
    ),
    "replace by one of the clipper": (
        lambda c, m: c.replace_param(m[0].weight, m[0].bias),
        ValueError,
        "new must be one that the clipper does not have",
    ),
    "replace by no parameter": (
        lambda c, m: c.replace_param(m[0].weight, 3),
        TypeError,
        "new must be a tensor, got int",
    ),
    "add an empty group": (
        lambda c, m: c.add_param_group({"params": []}),
        ValueError,
        LEAST,
    ),
    "add what is there": (
        lambda c, m: c.add_param_group({"params": [m[0].bias]}),
        ValueError,
        "must be in one group",
    ),
}


@pytest.mark.parametrize("name", FAILED)
def test_a_call_that_fails_changes_nothing(name):
    call, error, words = FAILED[name]
    model, clipper = used()
    state, metrics, names = clipper.state_dict(), clipper.metrics(), clipper.names
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    with pytest.raises(error, match=words):
        call(clipper, model)
    check_same(clipper.state_dict(), state)
    assert (clipper.metrics(), clipper.names) == (metrics, names)
    check_same([parameter.grad for parameter in model.parameters()], gradients)


@pytest.mark.parametrize("shape", [(0,), (1, 5), (2, 2), (3, 1, 1), (1, 0)])
def test_one_row_takes_a_number_or_a_series(shape):
    """A vector of shape (1, 5) is not five steps of one row."""
    _, clipper = used(scope="global")
    state = clipper.state_dict()
    with pytest.raises(ValueError, match=ONE):
        clipper.observe(np.ones(shape))
    check_same(clipper.state_dict(), state)


@pytest.mark.parametrize("bad", [NAN, INF, -1.0])
def test_a_refused_series_records_nothing(bad):
    """The norms before the bad one are not recorded either."""
    _, clipper = used(scope="global", nonfinite="raise")
    state = clipper.state_dict()
    with pytest.raises(FloatingPointError, match="the gradient norm of global is not"):
        clipper.observe([1.0, 2.0, bad, 3.0])
    check_same(clipper.state_dict(), state)


def test_thresholds_that_need_the_norm_are_refused_with_the_reason():
    weight = weights()
    for clipper, words in [
        (QuantileClip(weight, include_current=True), "set include_current=False"),
        (
            StandardClip(weight, include_current=True, max_threshold=1.0),
            "include_current=True needs the current norm",
        ),
        (Clipper(weight, Drop(Fixed(1.0))), "Drop needs the current norm"),
    ]:
        with pytest.raises(ValueError, match=words):
            clipper.threshold()


def test_a_value_clip_observes_no_norms():
    with pytest.raises(TypeError, match="ValueClip records no norms"):
        ValueClip(weights(), clip_value=1.0).observe(1.0)


def test_valid_arguments_are_accepted():
    """The smallest and largest accepted values."""
    for make, keywords in [
        (QuantileClip, {"quantile": 0, "history_length": 1}),
        (QuantileClip, {"quantile": np.float32(1), "history_length": np.int64(3)}),
        (QuantileClip, {"warmup_steps": 0, "max_threshold": 1, "min_threshold": 1}),
        (QuantileClip, {"warmup_steps": 2, "warmup_threshold": INF}),
        (StandardClip, {"deviations": 0, "ddof": 0, "history_length": None}),
        (StandardClip, {"deviations": -1, "log": True}),
        (ZClip, {"alpha": 0, "warmup_steps": 0}),
        (AdaGC, {"warmup_threshold": INF, "beta": 0}),
        (AGC, {"rule": "nfnets", "scope": "unit"}),
        (AGC, {"rule": "layer", "global_clipping": False}),
        (QuantileClip, {"nonfinite": "skip", "max_consecutive_skips": 1}),
    ]:
        _, clipper = used(make, **keywords)
        assert clipper.metrics()["clip/steps"] == 8


@pytest.mark.parametrize("scope", ["global", "parameter", "unit"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_gradients_of_8_bits_are_refused_by_name(dtype, scope):
    """Torch cannot compute their norm. The error comes before anything is recorded."""
    weight = nn.Parameter(torch.ones(2, 3).to(dtype))
    clipper = Clipper([weight], Fixed(1.0), scope=scope)
    weight.grad = torch.ones(2, 3).to(dtype)
    with pytest.raises(TypeError, match=rf"16 bits or more, got {dtype}; cast to"):
        clipper.step()
    assert clipper.metrics()["clip/steps"] == 0
    assert weight.grad.float().eq(1).all()


def make_clippers():
    """A clipper of each kind, with a setting of its own."""
    model = nn.Linear(3, 2)
    first, second = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    return [
        (Clipper(model, Quantile(0.5)), "quantile"),
        (QuantileClip(model), "history_length"),
        (AGC(model), "rule"),
        (ValueClip(model, 1.0), "clip_value"),
        (UpdateClipper(model, first, Fixed(1.0)), "max_norm"),
        (TrustClip(model, second), "ratio"),
    ]


def through_pickle(clipper):
    return pickle.loads(pickle.dumps(clipper))


@pytest.mark.parametrize("copy", [lambda clipper: clipper, deepcopy, through_pickle])
@pytest.mark.parametrize("index", range(6))
def test_a_setting_that_is_assigned_is_an_error(index, copy):
    """The way out works: a new clipper continues the history."""
    clipper, name = make_clippers()[index]
    clipper = copy(clipper)
    for each in ["policy", "scope", "nonfinite", "exclude", name]:
        with pytest.raises(AttributeError, match=rf"^{each} is set .* strict=False"):
            setattr(clipper, each, 5.0)
    clipper.dry_run, clipper.note = True, "of a user"
    clipper.on_clip = print
    assert clipper.dry_run
    assert clipper.on_clip is print


def test_a_subclass_may_assign_the_name_of_an_argument_in_its_constructor():
    class OwnClip(QuantileClip):
        def __init__(self, parameters, quantile):
            self.quantile = quantile
            super().__init__(parameters, min(quantile, 0.9))
            self.quantile, self.factor = 2 * quantile, 3

    clipper = OwnClip(weights(), 0.95)
    clipper.factor = 4
    assert (clipper.quantile, clipper.factor) == (1.9, 4)
    assert repr(clipper).startswith("OwnClip(quantile=0.9")
    with pytest.raises(AttributeError, match="quantile is set when the OwnClip"):
        clipper.quantile = 0.5
