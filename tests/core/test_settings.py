"""The keywords that all clippers share: scope, warm-up, minimum and maximum."""

from typing import TypedDict

import numpy as np
import pytest

from autoclip_core import Cap, Drop, Fixed, Floor, ParamRatio, Warmup
from autoclip_core.clipper.settings import (
    ClipperKeywords,
    PolicyBounds,
    PolicyKeywords,
    WarmupKeywords,
    check_keywords,
    check_traceable,
    choose_scope,
    format_clipper,
)

INNER = Fixed(2.0)


@pytest.mark.parametrize(
    ("scope", "global_clipping", "default", "chosen"),
    [
        (None, None, "unit", "unit"),
        ("group", None, "unit", "group"),
        (None, True, "unit", "global"),
        (None, True, "global", "global"),
        (None, False, "global", "parameter"),
        (None, False, "unit", "unit"),
        ("global", True, "parameter", "global"),
        ("unit", False, "global", "unit"),
    ],
)
def test_scope_has_an_older_spelling(scope, global_clipping, default, chosen):
    assert choose_scope(scope, global_clipping, default) == chosen


@pytest.mark.parametrize(("scope", "other"), [("global", False), ("unit", True)])
def test_spellings_of_the_scope_that_disagree_are_refused(scope, other):
    with pytest.raises(ValueError, match="older spelling of scope") as raised:
        choose_scope(scope, other, "parameter")
    assert str(raised.value).startswith(
        f"global_clipping must be in agreement with scope={scope!r}, got {other}; "
    )


def test_an_unknown_scope_is_refused():
    with pytest.raises(ValueError, match="scope must be one of 'parameter', 'group'"):
        choose_scope("layer", None, "unit")
    with pytest.raises(TypeError, match="global_clipping must be True or False"):
        choose_scope(None, 1, "unit")


def test_a_traced_step_takes_no_policy_that_cancels_updates():
    for policy in (INNER, ParamRatio(0.1), Drop(INNER)):
        check_traceable(policy, np, "")
    with pytest.raises(ValueError, match="policy must be without Drop") as raised:
        check_traceable(Drop(INNER, action="skip"), np, "zero instead")
    assert str(raised.value).endswith("; zero instead")
    with pytest.raises(TypeError, match="policy must be a policy, got 1"):
        check_traceable(1, np, "")


@pytest.mark.parametrize("keywords", [ClipperKeywords, PolicyKeywords, WarmupKeywords])
def test_no_keyword_of_a_clipper_is_required(keywords):
    assert "scope" in keywords.__optional_keys__
    assert not keywords.__required_keys__


class Keywords(TypedDict, total=False):
    scope: str
    exclude: str


class Clip:
    def __init__(self, quantile, *, history_length=None, **keywords):
        check_keywords(type(self), keywords, Keywords)


def test_an_unknown_keyword_is_refused():
    Clip(0.9, scope="global", exclude=None)
    with pytest.raises(TypeError) as raised:
        Clip(0.9, scope="global", eps=1.0)
    assert str(raised.value) == (
        "eps is no argument of Clip; it takes quantile, history_length, exclude, scope"
    )


@pytest.mark.parametrize(
    ("settings", "whole"),
    [
        ((0, None, None, None), INNER),
        ((1, None, None, None), Warmup(INNER, steps=1, threshold=float("inf"))),
        ((5, 1.5, None, None), Warmup(INNER, steps=5, threshold=1.5)),
        ((0, None, 0.5, None), Floor(INNER, min_norm=0.5)),
        ((0, None, None, 3.0), Cap(INNER, max_norm=3.0)),
        ((0, None, 3.0, 3.0), Cap(Floor(INNER, min_norm=3.0), max_norm=3.0)),
        (
            (5, 1.5, 0.5, 3.0),
            Cap(
                Floor(Warmup(INNER, steps=5, threshold=1.5), min_norm=0.5), max_norm=3.0
            ),
        ),
    ],
    ids=str,
)
def test_the_bounds_wrap_a_policy(settings, whole):
    assert PolicyBounds(*settings).apply(INNER) == whole
    assert PolicyBounds().apply(INNER) == INNER


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ((-1, None, None, None), "warmup_steps must be a whole number >= 0, got -1"),
        ((3, 0.0, None, None), "warmup_threshold must be > 0, got 0.0"),
        ((0, 1.0, None, None), "warmup_threshold must be given together with warmup_"),
        ((0, None, 0.0, None), "min_threshold must be > 0 and finite, got 0.0"),
        ((0, None, None, -1.0), "max_threshold must be > 0 and finite, got -1.0"),
        ((0, None, 3.0, 2.0), "min_threshold must be at most max_threshold=2.0, got 3"),
    ],
    ids=str,
)
def test_invalid_bounds_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        PolicyBounds(*settings)


class Named:
    def __init__(self, quantile=0.9, *, history_length=1000, log=False):
        """Take the arguments of a policy, like a named clipper."""


def test_a_clipper_prints_its_first_argument_what_differs_its_scope_and_its_settings():
    arguments = {"quantile": 0.9, "history_length": 1000, "log": True}
    settings = {"max_threshold": float("inf"), "rows": 2}
    assert format_clipper(Named, arguments, "unit", settings) == (
        "Named(quantile=0.9, log=True, scope='unit', max_threshold=float('inf'), "
        "rows=2)"
    )


def test_a_clipper_prints_a_policy_without_its_comment_and_arguments_without_default():
    class Renamed(Named):
        def __init__(self, model):
            """Take other arguments than the clipper that it extends."""

    assert format_clipper(Renamed, {"policy": INNER, "log": False}, "global", {}) == (
        "Renamed(policy=Fixed(max_norm=2.0), log=False, scope='global')"
    )
