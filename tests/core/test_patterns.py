"""Which parameters `exclude` names, in any framework."""

import re
from functools import partial

import pytest

from autoclip_core.clipper.patterns import (
    as_patterns,
    as_scale_patterns,
    check_patterns_match,
    matches,
)

matches_in_torch = partial(matches, separator=".")


def is_large(name, parameter):
    return parameter > 5


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("head.bias", ["head.bias"]),
        ("head", ["head.bias", "head.weight"]),
        ("*.bias", ["head.bias", "body.0.bias"]),
        ("body.?.bias", ["body.0.bias"]),
        ("bias", ["bias"]),
        ("hea", []),
        ("", []),
        ("HEAD", []),
        (re.compile("b.as$"), ["head.bias", "body.0.bias", "bias"]),
        (re.compile("^head"), ["head.bias", "head.weight", "header"]),
        (is_large, ["header", None]),
    ],
)
def test_a_pattern_matches_these_names(pattern, names):
    """A pattern is a name, a module's name, a glob, a regex or a function."""
    known = ["head.bias", "head.weight", "body.0.bias", "bias", ".odd", "header", None]
    sizes = [1, 2, 3, 4, 5, 6, 7]
    pairs = zip(known, sizes, strict=True)
    assert [
        name for name, size in pairs if matches_in_torch(pattern, name, size)
    ] == names


def test_the_separator_can_be_a_slash():
    assert matches("head", "head/bias", None, "/")
    assert not matches("head", "head.bias", None, "/")


def test_exclude_is_none_or_one_pattern_or_several():
    pattern = re.compile("bias")
    assert as_patterns(None) == []
    assert as_patterns("head") == ["head"]
    assert as_patterns(pattern) == [pattern]
    assert as_patterns(is_large) == [is_large]
    assert as_patterns(iter(["head", pattern, is_large])) == ["head", pattern, is_large]


@pytest.mark.parametrize("exclude", [3, ["head", None]], ids=str)
def test_a_value_that_is_not_a_pattern_is_refused(exclude):
    with pytest.raises(TypeError, match=r"exclude must hold names.*got (3|None)"):
        as_patterns(exclude)


def check(patterns, names):
    parameters = [(name, size) for size, name in enumerate(names)]
    check_patterns_match(
        patterns, parameters, matches_in_torch, "give named_parameters()"
    )


def test_patterns_that_match_are_accepted():
    check(["head", "bias", re.compile("ht")], ["head.weight", None, "bias"])
    check([is_large], ["head.weight", "bias"])  # a function may match nothing
    check([is_large], [None, None])


def test_a_pattern_that_matches_nothing_is_refused():
    names = [f"layer{place}" for place in range(9)]
    for known, more in [(names[:8], ""), (names, ", ...")]:
        with pytest.raises(ValueError, match="exclude must match") as raised:
            check(["layer0", "head"], known)
        assert str(raised.value) == (
            "exclude must match a parameter's name, got 'head'; the names are "
            f"{', '.join(names[:8])}{more}"
        )


def test_unnamed_parameters_are_refused():
    with pytest.raises(ValueError, match="needs named parameters") as raised:
        check(["head"], [None, None])
    assert str(raised.value) == (
        "exclude='head' needs named parameters, got unnamed ones; give "
        "named_parameters()"
    )


def test_scale_only_is_none_or_holds_a_pattern():
    assert as_scale_patterns(None) == []
    assert as_scale_patterns("head") == ["head"]
    with pytest.raises(ValueError, match="scale_only must be None or hold a pattern"):
        as_scale_patterns([])
