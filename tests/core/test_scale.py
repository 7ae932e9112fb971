"""The numeric rules: one table for all frameworks."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest

from autoclip_core import Cap, Floor, Limit, Policy, decide
from autoclip_core.scale import NONFINITE, SMALLEST_NORMAL, as_norms, scale_rows

from ..support.cases import FRAMEWORKS, UNCOMPILED, frameworks, in_numpy

every_framework = frameworks({"numpy": (in_numpy, "core")} | FRAMEWORKS | UNCOMPILED)

INF, NAN = float("inf"), float("nan")
SMALLEST = float(np.finfo(np.float32).tiny)
NEXT = float(np.nextafter(np.float32(1), np.float32(2)))


class Rule(NamedTuple):
    """One row of one step, and the expected results."""

    name: str
    norm: float
    threshold: float
    target: float
    scale: float
    """With nonfinite="zero"."""
    clipped: bool = False
    is_recorded: bool = True
    observed: bool = True
    finite: bool = True
    propagated: float | None = None
    """The scale with nonfinite="propagate", if it differs."""
    known_as: float | None = None
    """The norm in the decision, if it differs."""
    drop: float = INF
    """The drop level."""
    dropped: bool = False


RULES = [
    Rule("below", 0.5, 1.0, 1.0, scale=1.0),
    Rule("just below", 1.0, NEXT, NEXT, scale=1.0),
    Rule("equal", 1.0, 1.0, 1.0, scale=1.0),
    Rule("just above", NEXT, 1.0, 1.0, scale=1 / NEXT, clipped=True),
    Rule("above", 4.0, 2.0, 2.0, scale=0.5, clipped=True),
    Rule("far above", 1e30, 1.0, 1.0, scale=1e-30, clipped=True),
    Rule("R / n is 0", 3e38, 2e-38, 2e-38, 0.0, clipped=True, dropped=True),
    Rule("target below", 4.0, 2.0, 1.0, scale=0.25, clipped=True),
    Rule("target 0, above", 4.0, 2.0, 0.0, scale=0.0, clipped=True, dropped=True),
    Rule("target 0, small", 0.5, 0.25, 0.0, 0.0, clipped=True, dropped=True),
    Rule("target 0, equal", 2.0, 2.0, 0.0, scale=1.0),
    Rule("T 0, target 0", 4.0, 0.0, 0.0, 0.0, clipped=True, dropped=True),
    Rule("target 0, high D", 4.0, 2.0, 0.0, 0.0, clipped=True, drop=8.0, dropped=True),
    Rule("target 0, low D", 4.0, 8.0, 0.0, 0.0, clipped=True, drop=2.0, dropped=True),
    Rule("dropped", 9.0, 2.0, 2.0, scale=0.0, clipped=True, drop=8.0, dropped=True),
    Rule("clipped up to D", 8.0, 2.0, 2.0, scale=0.25, clipped=True, drop=8.0),
    Rule("D below T", 4.0, 8.0, 8.0, scale=0.0, clipped=True, drop=2.0, dropped=True),
    Rule("D alone", 4.0, INF, INF, scale=0.0, clipped=True, drop=2.0, dropped=True),
    Rule("equal to D", 2.0, INF, INF, scale=1.0, drop=2.0),
    Rule("D, huge T", 1e-3, 3e38, 3e38, 0.0, clipped=True, drop=1e-4, dropped=True),
    Rule("zero, D", 0.0, INF, INF, scale=1.0, drop=2.0, is_recorded=False),
    Rule("inf, D", INF, 1.0, 1.0, 0.0, False, False, True, False, 1.0, drop=2.0),
    Rule("tiny", 5e-7, 1e-7, 1e-7, scale=0.2, clipped=True),
    Rule("very tiny", 4e-37, 1e-37, 1e-37, scale=0.25, clipped=True),
    Rule("zero", 0.0, 1.0, 1.0, scale=1.0, is_recorded=False),
    Rule("zero, no threshold", 0.0, INF, INF, scale=1.0, is_recorded=False),
    Rule("no threshold", 1e30, INF, INF, scale=1.0),
    Rule("no threshold, target 0", 1e30, INF, 0.0, scale=1.0),
    Rule("smallest", SMALLEST, INF, INF, scale=1.0),
    Rule("subnormal", 1.1e-38, 1.0, 1.0, scale=1.0, is_recorded=False, known_as=0.0),
    Rule("nan", NAN, 1.0, 1.0, 0.0, is_recorded=False, finite=False, propagated=1.0),
    Rule("inf", INF, 1.0, 1.0, 0.0, is_recorded=False, finite=False, propagated=1.0),
    Rule("inf, no threshold", INF, INF, INF, 0.0, False, False, True, False, 1.0),
    Rule("unobserved", 4.0, 2.0, 2.0, 1.0, False, False, False, known_as=NAN),
    Rule("unobserved nan", NAN, 2.0, 2.0, 1.0, False, False, False, known_as=NAN),
]
BAD = [not rule.finite for rule in RULES]


class LastNorm(NamedTuple):
    """The state of `Given`: the last recorded norm, -1 before the first."""

    norm: np.ndarray


@dataclass(frozen=True, repr=False)
class Given(Policy):
    """A policy with given thresholds and targets, as a user may write it."""

    thresholds: tuple[float, ...]
    targets: tuple[float, ...]
    drops: tuple[float, ...] = ()
    cancels: bool = False

    def init(self, rows, xp=np):
        return LastNorm(xp.full((rows,), -1.0, dtype=xp.float32))

    def limit(self, state, norms=None, *, param_norms=None, xp=np):
        levels = self.thresholds, self.targets, self.drops or (INF,)
        threshold, target, drop = (
            xp.asarray(np.float32(level), dtype=xp.float32) for level in levels
        )
        if not self.drops:
            return Limit(threshold, target, cancels=self.cancels)
        return Limit(threshold, target, cancels=self.cancels, drop=drop)

    def record(self, state, norms, limit, xp=np):
        return LastNorm(norms)


def decision_on(rules, framework, **settings):
    """Return what one step records and decides, with one row per rule."""
    policy = Given(
        tuple(rule.threshold for rule in rules),
        tuple(rule.target for rule in rules),
        tuple(rule.drop for rule in rules),
    )
    norms = np.float32([rule.norm for rule in rules])
    observed = np.array([rule.observed for rule in rules])

    xp, array, compiled = framework()

    def step(state, norms, observed):
        return decide(policy, state, norms, observed=observed, xp=xp, **settings)

    state = policy.init(len(rules), xp)
    state, decision = compiled(step)(state, array(norms), array(observed))
    recorded = np.asarray(state.norm) >= 0
    return recorded, type(decision)(*(np.asarray(field) for field in decision))


def names(rules, flags):
    """Return the names of the rules with a set flag, so that a failure shows them."""
    return [rule.name for rule, flag in zip(rules, flags, strict=True) if flag]


def check(rules, framework, scales, recorded_rows, skipped=False, **settings):
    """Compare one step with the table."""
    recorded, decision = decision_on(rules, framework, **settings)
    expected = [rule.norm if rule.known_as is None else rule.known_as for rule in rules]
    np.testing.assert_array_equal(decision.norm, np.float32(expected))
    thresholds = np.float32([min(rule.threshold, rule.drop) for rule in rules])
    np.testing.assert_array_equal(decision.threshold, thresholds)
    np.testing.assert_allclose(decision.scale, scales, rtol=1.2e-7)
    ones = np.equal(scales, 1)
    assert names(rules, decision.scale == 1) == names(rules, ones)
    assert names(rules, decision.clipped) == names(rules, [r.clipped for r in rules])
    assert names(rules, decision.dropped) == names(rules, [r.dropped for r in rules])
    assert names(rules, decision.finite) == names(rules, [r.finite for r in rules])
    assert names(rules, recorded) == names(rules, recorded_rows)
    assert decision.skipped.tolist() == [skipped] * len(rules)
    for field in (decision.norm, decision.threshold, decision.scale):
        assert field.dtype == np.float32
    flags = decision.clipped, decision.finite, decision.skipped, decision.dropped
    for field in flags:
        assert field.dtype == bool


@every_framework
def test_zero_is_the_default(framework):
    scales = [rule.scale for rule in RULES]
    recorded_rows = [rule.is_recorded for rule in RULES]
    check(RULES, framework, scales, recorded_rows)
    check(RULES, framework, scales, recorded_rows, nonfinite="zero")


@every_framework
def test_propagate_leaves_a_bad_row_unchanged(framework):
    scales = [r.scale if r.propagated is None else r.propagated for r in RULES]
    recorded_rows = [rule.is_recorded for rule in RULES]
    check(RULES, framework, scales, recorded_rows, nonfinite="propagate")


@every_framework
def test_skip_cancels_the_update_and_no_row_records(framework):
    scales = [0.0 if rule.observed else 1.0 for rule in RULES]
    recorded_rows = [False] * len(RULES)
    check(RULES, framework, scales, recorded_rows, skipped=True, nonfinite="skip")


@every_framework
def test_skip_does_nothing_if_every_row_is_finite(framework):
    """An unobserved NaN does not cancel the update either."""
    good = [rule for rule in RULES if rule.finite]
    scales = [rule.scale for rule in good]
    recorded_rows = [rule.is_recorded for rule in good]
    check(good, framework, scales, recorded_rows, nonfinite="skip")


def test_raise_says_what_to_do_and_an_unobserved_nan_does_not_raise():
    policy = Given((1.0, 1.0), (1.0, 1.0))
    state = policy.init(2)
    with pytest.raises(FloatingPointError) as raised:
        decide(policy, state, [1.0, NAN], nonfinite="raise")
    assert str(raised.value) == (
        'a gradient norm is not finite and nonfinite="raise"; '
        'to continue without that gradient, set nonfinite="zero" or "skip"'
    )
    assert state.norm.tolist() == [-1, -1]
    state, decision = decide(
        policy, state, [4.0, NAN], observed=[True, False], nonfinite="raise"
    )
    assert decision.scale.tolist() == [0.25, 1.0]
    assert state.norm.tolist() == [4.0, -1.0]


@pytest.mark.parametrize("wrong", ["Zero", "", None, True, "ignore"])
def test_nonfinite_is_one_of_four_words(wrong):
    policy = Given((1.0,), (1.0,))
    with pytest.raises(ValueError, match="nonfinite must be one of") as raised:
        decide(policy, policy.init(1), [1.0], nonfinite=wrong)
    assert str(raised.value).endswith(f"got {wrong!r}")
    assert all(repr(word) in str(raised.value) for word in NONFINITE)


@dataclass(frozen=True, repr=False)
class Literal(Given):
    """A policy of a user that drops: it returns a plain 0 as its target."""

    def limit(self, state, norms=None, *, param_norms=None, xp=np):
        threshold = xp.asarray(np.float32(self.thresholds), dtype=xp.float32)
        return Limit(threshold, 0, cancels=self.cancels)


@every_framework
@pytest.mark.parametrize("cancels", [False, True])
def test_a_policy_of_two_arguments_drops_by_a_target_of_0(framework, cancels):
    """It does so alone and in a `Cap`, which does not lower its drop level."""
    xp, array, compiled = framework()
    alone = Literal((2.0, 2.0), (), cancels=cancels)
    for policy, scales in [(alone, [1.0, 0.0]), (Cap(alone, max_norm=1.0), [0.5, 0.0])]:

        def step(state, norms, policy=policy):
            return decide(policy, state, norms, xp=xp)

        state = policy.init(2, xp)
        _, decision = compiled(step)(state, array(np.float32([2.0, 4.0])))
        expected = [0.0, 0.0] if cancels else scales
        assert np.asarray(decision.scale).tolist() == expected
        assert np.asarray(decision.scale).dtype == np.float32
        assert np.asarray(decision.dropped).tolist() == [False, True]
        assert np.asarray(decision.skipped).tolist() == [cancels] * 2


@every_framework
def test_a_drop_level_may_be_one_number(framework):
    @dataclass(frozen=True, repr=False)
    class Numbered(Given):
        def limit(self, state, norms=None, *, param_norms=None, xp=np):
            limit = super().limit(state, norms, xp=xp)
            return limit._replace(drop=8.0)

    xp, array, compiled = framework()
    inner = Numbered((2.0,) * 3, (2.0,) * 3)
    for policy in (inner, Floor(inner, min_norm=1.0), Cap(inner, max_norm=4.0)):

        def step(state, norms, policy=policy):
            return decide(policy, state, norms, xp=xp)

        _, decision = compiled(step)(
            policy.init(3, xp), array(np.float32([1.0, 4.0, 9.0]))
        )
        assert np.asarray(decision.scale).tolist() == [1.0, 0.5, 0.0]
        assert np.asarray(decision.threshold).dtype == np.float32


# Norms of any type.


@pytest.mark.parametrize(
    "norms",
    [
        [0.5, 3.0],
        (0.5, 3),
        np.array([0.5, 3.0]),
        np.array([0.5, 3.0], np.float16),
        np.array([0.5, 3.0], np.longdouble),
    ],
    ids=["list", "tuple", "float64", "float16", "longdouble"],
)
def test_norms_of_any_type_become_float32(norms):
    converted = as_norms(norms)
    assert converted.dtype == np.float32
    assert converted.tolist() == [0.5, 3.0]


def test_a_norm_beyond_float32_is_not_finite_and_nothing_warns():
    largest = float(np.finfo(np.float32).max)
    norms = as_norms(np.array([largest, 1e39, 1e-39, 1e-300, INF, NAN]))
    np.testing.assert_array_equal(norms, np.float32([largest, INF, 0, 0, INF, NAN]))


def test_the_smallest_normal_number_is_that_of_float32():
    assert SMALLEST_NORMAL == SMALLEST
    below = np.nextafter(np.float32(SMALLEST), np.float32(0))
    assert as_norms([below, SMALLEST]).tolist() == [0.0, SMALLEST]


def test_as_norms_leaves_its_argument_alone():
    norms = np.float32([1e-40, 2])
    as_norms(norms)
    np.testing.assert_array_equal(norms, np.float32([1e-40, 2]))


# The gradients themselves.


def test_nothing_is_added_to_the_divisor():
    """[3e-7, 4e-7] clipped to 1e-7 is [6e-8, 8e-8]; n + 1e-6 would give a third."""
    gradient = np.array([3e-7, 4e-7])
    norm = np.float32([np.linalg.norm(gradient)])
    limit = np.float32([1e-7])
    scale, clipped, _ = scale_rows(norm, limit, limit, INF)
    np.testing.assert_allclose(scale * gradient, [6e-8, 8e-8], rtol=1e-6)
    assert clipped.all()
    wrong = 1e-7 / (norm + 1e-6) * gradient
    assert np.linalg.norm(wrong) < 0.07e-6


def test_scaling_to_the_norm_itself_is_exact():
    """`max_norm / (norm + 1e-6)` would shrink a gradient exactly at its limit."""
    rng = np.random.default_rng(0)
    norms = np.float32(10.0 ** rng.uniform(-30, 30, 1000))
    scale, clipped, _ = scale_rows(norms, norms, norms, INF)
    assert (scale == 1).all()
    assert not clipped.any()
