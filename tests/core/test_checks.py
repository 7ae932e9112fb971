"""Bad arguments: the error names the argument, the rule, the value and a way out."""

import json
import math

import numpy as np
import pytest

import autoclip_core
from autoclip_core import Cap, Drop, Fixed, ParamRatio, Quantile, Scheduled, decide
from autoclip_core.checks import (
    check_choice,
    check_count,
    check_flag,
    check_limit,
    check_number,
    check_positive,
    check_quantile,
    format_error,
)
from autoclip_core.clipper.serialize import policy_from_dict, policy_to_dict

from ..support.cases import policy_of

INF, NAN = math.inf, math.nan
NOT_NUMBERS = [True, False, "0.5", None, [0.5], 1j, np.array([0.5]), Ellipsis]
NOT_COUNTS = [True, False, "3", 3.0, np.float32(3), INF, NAN, [3], 1j]
NOT_FLAGS = [0, 1, "True", None, np.True_]
NOT_POSITIVE = [0, 0.0, -1, -0.5, INF, -INF, NAN]

POSITIVE = "> 0 and finite"
UNIT_INTERVAL = "in [0, 1)"

# (class, its other required arguments), argument, rule, invalid values, way out.
NUMBERS = [
    (
        ("Fixed", {}),
        "max_norm",
        "> 0",
        [0, 0.0, -1, -0.5, -INF, NAN],
        "use a positive threshold (0 would remove every gradient)",
    ),
    (("Quantile", {}), "quantile", "in [0, 1]", [-0.1, -1, 100.5, INF, NAN], ""),
    (("StreamingQuantile", {}), "quantile", "in [0, 1]", [-1e-9, 200, -INF, NAN], ""),
    (("StreamingQuantile", {}), "rate", POSITIVE, NOT_POSITIVE, ""),
    (("ZScore", {}), "z", POSITIVE, NOT_POSITIVE, ""),
    (("ZScore", {}), "alpha", UNIT_INTERVAL, [-0.1, 1, 1.5, INF, NAN], ""),
    (
        ("EmaRatio", {}),
        "ratio",
        "> 1 and finite",
        [1, 1.0, 0.9, 0, -2, INF, NAN],
        "with a ratio of 1 or less the threshold can only fall",
    ),
    (("EmaRatio", {}), "beta", UNIT_INTERVAL, [-0.1, 1, 1.5, INF, NAN], ""),
    (("EmaRatio", {}), "warmup_threshold", "> 0", [0, -1, -INF, NAN], ""),
    (("ParamRatio", {}), "clipping", POSITIVE, NOT_POSITIVE, ""),
    (
        ("ParamRatio", {}),
        "eps",
        POSITIVE,
        NOT_POSITIVE,
        "it lets parameters that start at zero move; 1e-3 is usual",
    ),
    (("Cap", {"policy": Fixed(1)}), "max_norm", POSITIVE, NOT_POSITIVE, ""),
    (("Floor", {"policy": Fixed(1)}), "min_norm", POSITIVE, NOT_POSITIVE, ""),
    (
        ("Warmup", {"policy": Fixed(1), "steps": 3}),
        "threshold",
        "> 0",
        [0, -1, -INF, NAN],
        "",
    ),
]
COUNTS = [
    (("Quantile", {}), "history_length", 1, "use None to keep the norms of all steps"),
    (("MeanStd", {}), "history_length", 1, "use None to keep the norms of all steps"),
    (("MeanStd", {}), "ddof", 0, ""),
    (("ZScore", {}), "warmup_steps", 0, ""),
    (("EmaRatio", {}), "warmup_steps", 0, ""),
    (("Warmup", {"policy": Fixed(1)}), "steps", 0, ""),
]
FLAGS = [
    ("Quantile", "include_current"),
    ("MeanStd", "include_current"),
    ("MeanStd", "log"),
    ("ZScore", "log"),
]
CHOICES = [
    (("ZScore", {}), "target", "'reciprocal', 'mean', 'threshold'"),
    (("ZScore", {}), "record", "'winsorized', 'applied', 'raw', 'none'"),
    (("Drop", {"policy": Fixed(1)}), "action", "'zero', 'skip'"),
]


def refused(kind, argument, value, error):
    """Return the text of the error for a value of an argument."""
    name, others = kind
    with pytest.raises(error) as raised:
        getattr(autoclip_core, name)(**others, **{argument: value})
    return str(raised.value)


def each(*tables):
    """Return one case per row of the tables and value, named after both."""
    return [
        pytest.param(*row, value, id=f"{row[0][0]}-{row[1]}-{value!r:.20}")
        for table, values in tables
        for row in table
        for value in (row[3] if values is None else values)
    ]


@pytest.mark.parametrize(
    ("kind", "argument", "rule", "_", "way_out", "value"), each((NUMBERS, None))
)
def test_a_number_out_of_range(kind, argument, rule, _, way_out, value):
    said = refused(kind, argument, value, ValueError)
    expected = f"{argument} must be {rule}, got {value!r}"
    assert said == (f"{expected}; {way_out}" if way_out else expected)


@pytest.mark.parametrize(
    ("kind", "argument", "rule", "_", "way_out", "value"), each((NUMBERS, NOT_NUMBERS))
)
def test_what_is_no_number(kind, argument, rule, _, way_out, value):
    said = refused(kind, argument, value, TypeError)
    expected = f"{argument} must be a number {rule}, got {value!r}"
    assert said == (f"{expected}; {way_out}" if way_out else expected)


@pytest.mark.parametrize(
    ("kind", "argument", "least", "way_out", "value"), each((COUNTS, NOT_COUNTS))
)
def test_what_is_no_count(kind, argument, least, way_out, value):
    said = refused(kind, argument, value, TypeError)
    expected = f"{argument} must be a whole number >= {least}, got {value!r}"
    assert said == (f"{expected}; {way_out}" if way_out else expected)


@pytest.mark.parametrize(("kind", "argument", "least", "way_out"), COUNTS)
def test_a_count_that_is_too_small(kind, argument, least, way_out):
    for value in (least - 1, -100):
        said = refused(kind, argument, value, ValueError)
        expected = f"{argument} must be a whole number >= {least}, got {value!r}"
        assert said == (f"{expected}; {way_out}" if way_out else expected)
    name, others = kind
    getattr(autoclip_core, name)(**others, **{argument: least})


@pytest.mark.parametrize("argument", ["ddof", "steps", "warmup_steps"])
def test_none_is_a_count_only_for_the_history(argument):
    kind = {
        "ddof": ("MeanStd", {}),
        "steps": ("Warmup", {"policy": Fixed(1)}),
        "warmup_steps": ("ZScore", {}),
    }
    assert "got None" in refused(kind[argument], argument, None, TypeError)
    assert Quantile(history_length=None).history_length is None


@pytest.mark.parametrize(("name", "argument"), FLAGS)
@pytest.mark.parametrize("value", NOT_FLAGS, ids=repr)
def test_what_is_not_true_or_false(name, argument, value):
    said = refused((name, {}), argument, value, TypeError)
    assert said == f"{argument} must be True or False, got {value!r}"


@pytest.mark.parametrize(("kind", "argument", "words"), CHOICES)
@pytest.mark.parametrize(
    "value", ["", "Mean", "max", None, True, 0, ["mean"]], ids=repr
)
def test_a_word_that_is_none_of_those(kind, argument, words, value):
    said = refused(kind, argument, value, ValueError)
    assert said == f"{argument} must be one of {words}, got {value!r}"


@pytest.mark.parametrize("name", ["Quantile", "StreamingQuantile"])
@pytest.mark.parametrize(
    ("percent", "meant"), [(90, "0.9"), (99.5, "0.995"), (1.5, "0.015"), (100, "1")]
)
def test_a_percentile_gets_a_hint(name, percent, meant):
    said = refused((name, {}), "quantile", percent, ValueError)
    assert said == (
        f"quantile must be in [0, 1], got {percent!r}; did you mean {meant}?"
    )


def test_beyond_a_percentile_there_is_no_hint():
    assert "mean" not in refused(("Quantile", {}), "quantile", 100.5, ValueError)


@pytest.mark.parametrize("name", ["Cap", "Floor", "Drop", "Warmup"])
@pytest.mark.parametrize("value", [0.9, None, "Quantile(0.9)", Quantile], ids=repr)
def test_a_combinator_needs_a_policy(name, value):
    others = {"Cap": "max_norm", "Floor": "min_norm", "Warmup": "steps"}
    arguments = {others[name]: 1} if name in others else {}
    said = refused((name, arguments), "policy", value, TypeError)
    assert said == (
        f"policy must be a policy, got {value!r}; write a policy, such as Quantile(0.9)"
    )


@pytest.mark.parametrize(
    "code",
    [
        "Quantile(0.9, 1000)",
        "MeanStd(2.0, 32)",
        "ZScore(2.5, 0.97)",
        "EmaRatio(1.05, 0.98)",
        "ParamRatio(0.01, 1e-3)",
        "StreamingQuantile(0.9, 0.05)",
        "Cap(Fixed(1.0), 2.0)",
        "Floor(Fixed(1.0), 2.0)",
        "Drop(Fixed(1.0), 'zero')",
        "Warmup(Fixed(1.0), 10)",
    ],
)
def test_all_after_the_first_argument_are_keywords(code):
    with pytest.raises(TypeError, match="positional argument"):
        policy_of(code)


@pytest.mark.parametrize(
    "code",
    ["Fixed()", "Cap(Fixed(1))", "Floor(Fixed(1))", "Warmup(Fixed(1))", "Drop()"],
)
def test_what_has_no_default_must_be_given(code):
    with pytest.raises(TypeError, match="missing 1 required"):
        policy_of(code)


@pytest.mark.parametrize(
    "value", [1, 0.5, np.float32(0.5), np.float64(0.5), np.int64(1), np.float16(0.5)]
)
def test_numbers_of_any_kind_become_floats(value):
    for policy, name in [
        (Fixed(value), "max_norm"),
        (Quantile(value), "quantile"),
        (Cap(Fixed(1), max_norm=value), "max_norm"),
    ]:
        assert type(getattr(policy, name)) is float
        assert getattr(policy, name) == value


@pytest.mark.parametrize(
    ("points", "error", "words"),
    [
        ([], ValueError, "points must be pairs (step, threshold), at least one, got"),
        (3.0, ValueError, "points must be pairs (step, threshold), at least one, got"),
        ([(0, 1.0, 2.0)], ValueError, "at least one, got (0, 1.0, 2.0)"),
        ([(0, 2.0), 5], ValueError, "at least one, got 5"),
        (
            [(0, 2.0), (5, 1.0), (9, 1.0), (9, 3.0)],
            ValueError,
            "above the step before it, 9, got",
        ),
        ([(-1, 2.0)], ValueError, "step must be a whole number >= 0, got -1"),
        ([(0.5, 2.0)], TypeError, "step must be a whole number >= 0, got 0.5"),
        ([(0, 0.0)], ValueError, "threshold must be > 0 and finite, got 0.0"),
        ([(0, INF)], ValueError, "threshold must be > 0 and finite, got inf"),
        ([(0, "1")], TypeError, "threshold must be a number > 0 and finite, got '1'"),
    ],
    ids=repr,
)
def test_a_schedule_has_points_whose_steps_rise(points, error, words):
    with pytest.raises(error) as raised:
        Scheduled(points)
    assert words in str(raised.value)


def test_points_of_a_file_become_tuples():
    """JSON has lists; the policy must be hashable, and equal to the saved one."""
    policy = Scheduled([[np.int64(0), 3], [10, np.float32(0.5)]])
    assert repr(policy) == "Scheduled(points=((0, 3.0), (10, 0.5)))"
    assert hash(policy) == hash(policy_of(repr(policy)))
    saved = json.loads(json.dumps(policy_to_dict(Cap(policy, max_norm=1.0))))
    assert policy_from_dict(saved, vars(autoclip_core).get) == Cap(policy, max_norm=1.0)


def test_an_infinite_constant_only_observes():
    policy = policy_of(repr(Fixed(INF)))
    _, decision = decide(policy, policy.init(2), np.float32([1e30, NAN]))
    assert decision.threshold.tolist() == [INF, INF]
    assert decision.scale.tolist() == [1.0, 0.0]
    assert not decision.clipped.any()


def test_a_negative_deviation_could_turn_a_gradient_round():
    """mean + k * std may be negative; with log=True the threshold is positive."""
    with pytest.raises(ValueError, match="deviations must be") as raised:
        policy_of("MeanStd(-1.0)")
    assert str(raised.value) == (
        "deviations must be >= 0 and finite, got -1.0; "
        "a threshold below the mean needs log=True"
    )
    policy_of("MeanStd(-1.0, log=True)")
    policy_of("MeanStd(0)")


@pytest.mark.parametrize("value", [*NOT_NUMBERS, INF, NAN, -INF], ids=repr)
def test_deviations_are_a_finite_number(value):
    for log in (False, True):
        with pytest.raises((TypeError, ValueError), match="deviations must be"):
            policy_of("MeanStd")(value, log=log)


# Errors of a step.


def test_param_ratio_asks_for_the_norms_of_the_parameters():
    for policy in (ParamRatio(0.1), Cap(ParamRatio(0.1), max_norm=1.0)):
        with pytest.raises(ValueError, match="param_norms must be given") as raised:
            decide(policy, policy.init(1), [1.0])
        assert str(raised.value) == (
            "param_norms must be given, got None: ParamRatio limits a gradient by the "
            "norm of its parameters; pass param_norms=, one per row"
        )


@pytest.mark.parametrize(
    ("code", "way_out"),
    [
        ("Quantile(include_current=True)", "set include_current=False"),
        ("MeanStd(include_current=True)", "set include_current=False"),
        ("Drop(Quantile())", "whose threshold is that of clip"),
        ("Cap(Drop(Fixed(1.0)), max_norm=1.0)", "whose threshold is that of clip"),
        ("Warmup(Quantile(include_current=True), steps=3)", "include_current=False"),
    ],
)
def test_who_needs_the_norm_says_so_before_it_is_known(code, way_out):
    policy = policy_of(code)
    with pytest.raises(ValueError, match="before the norm is known") as raised:
        policy.limit(policy.init(1))
    assert str(raised.value).endswith(way_out)


# The checks themselves.


def test_a_message_has_four_parts():
    assert format_error("x", "> 0", -1, "try 1") == "x must be > 0, got -1; try 1"
    assert format_error("x", "> 0", "a", "") == "x must be > 0, got 'a'"


class Model:
    def __repr__(self):
        return "Model(\n" + "  (layer): Linear()\n" * 50 + ")"


@pytest.mark.parametrize("value", [Model(), [*range(100)], "a" * 100], ids=type)
def test_a_long_value_is_shown_in_a_short_line(value):
    message = format_error("x", "> 0", value, "try 1")
    shown = message.removeprefix("x must be > 0, got ").removesuffix("...; try 1")
    assert len(shown) == 77
    assert "\n" not in message


def test_a_short_value_is_shown_whole():
    assert format_error("x", "> 0", "a  b" * 19 + "cd", "").endswith("  bcd'")
    assert format_error("x", "> 0", "a  b" * 19 + "cde", "").endswith("  b...")
    assert format_error("x", "> 0", np.eye(2), "").endswith("[[1., 0.], [0., 1.]])")


def test_what_is_accepted_is_returned():
    assert check_number("x", 3, "any", lambda x: True) == 3.0
    assert check_positive("x", 1e-300) == 1e-300
    assert check_limit("x", INF) == INF
    assert check_quantile("x", 0) == 0.0
    assert check_quantile("x", 1) == 1.0
    assert check_count("x", np.int8(5), 5) == 5
    assert type(check_count("x", np.int8(5), 5)) is int
    assert check_flag("x", True) is True
    assert check_flag("x", False) is False
    assert check_choice("x", "b", iter(("a", "b"))) == "b"
    with pytest.raises(ValueError, match=r"^x must be one of 'a', got 'b'; use a$"):
        check_choice("x", "b", ["a"], "use a")


def test_drop_takes_both_actions():
    assert Drop(Fixed(1)).action == "zero"
    assert Drop(Fixed(1), action="skip").action == "skip"
