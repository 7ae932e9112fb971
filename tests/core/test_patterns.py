"""Which parameters `exclude` names, whatever the framework."""

import re
from functools import partial

import pytest

from autoclip_core.clipper.patterns import as_patterns, check_patterns_match, matches

of_torch = partial(matches, separator=".")


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
def test_what_a_pattern_names(pattern, names):
    """A name, a module's name, a pattern with `*`, a regular expression, a function."""
    there = ["head.bias", "head.weight", "body.0.bias", "bias", ".odd", "header", None]
    sizes = [1, 2, 3, 4, 5, 6, 7]
    found = [n for n, s in zip(there, sizes, strict=True) if of_torch(pattern, n, s)]
    assert found == names


def test_another_separator():
    assert matches("head", "head/bias", None, "/")
    assert not matches("head", "head.bias", None, "/")


def test_one_several_or_none():
    pattern = re.compile("bias")
    assert as_patterns(None) == []
    assert as_patterns("head") == ["head"]
    assert as_patterns(pattern) == [pattern]
    assert as_patterns(is_large) == [is_large]
    assert as_patterns(iter(["head", pattern, is_large])) == ["head", pattern, is_large]


@pytest.mark.parametrize("wrong", [3, ["head", None]], ids=str)
def test_what_is_no_pattern(wrong):
    with pytest.raises(TypeError, match=r"exclude must hold names.*got (3|None)"):
        as_patterns(wrong)


def check(patterns, names):
    members = [(name, size) for size, name in enumerate(names)]
    check_patterns_match(patterns, members, of_torch, "give named_parameters()")


def test_a_name_that_is_there_is_accepted():
    check(["head", "bias", re.compile("ht")], ["head.weight", None, "bias"])
    check([is_large], ["head.weight", "bias"])  # a function may name nothing
    check([is_large], [None, None])


def test_a_name_that_is_not_there():
    names = [f"layer{place}" for place in range(9)]
    for known, more in [(names[:8], ""), (names, ", ...")]:
        with pytest.raises(ValueError, match="exclude must match") as raised:
            check(["layer0", "head"], known)
        assert str(raised.value) == (
            "exclude must match a parameter's name, got 'head'; the names are "
            f"{', '.join(names[:8])}{more}"
        )


def test_names_of_what_has_none():
    with pytest.raises(ValueError, match="needs named parameters") as raised:
        check(["head"], [None, None])
    assert str(raised.value) == (
        "exclude='head' needs named parameters, got unnamed ones; give "
        "named_parameters()"
    )
