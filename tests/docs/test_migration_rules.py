"""Policies against the rules of other clippers; test_migration.py lists the rows.

These tests need NumPy alone. The rules are stated in `other_rules`.
"""

import math

import numpy as np
import pytest

from autoclip_core import (
    Cap,
    Drop,
    EmaRatio,
    Fixed,
    MeanStd,
    Quantile,
    StreamingQuantile,
    Warmup,
    ZScore,
    replay,
)
from autoclip_core.loss import decide_loss, init_loss

from ..support import other_rules
from ..support.other_rules import losses_and_norms, olmo_core, series

NORMS = series()
IS_FINITE = np.isfinite(NORMS)


def run(policy):
    """Return the replay of our policy; a norm that is not finite must not count."""
    result = replay(NORMS, policy)
    assert (result.finite == IS_FINITE).all()
    only_finite = replay(NORMS[IS_FINITE], policy)
    np.testing.assert_array_equal(result.thresholds[IS_FINITE], only_finite.thresholds)
    return only_finite


def compare(policy, rule, after=0, rtol=3e-6, rate=(0.005, 0.995)):
    """Compare thresholds, scales and decisions on the finite norms.

    Args:
      policy: ours.
      rule: the result of one of `other_rules`, for the finite norms.
      after: the first step to compare.
      rtol: the largest relative difference of thresholds and scales.
      rate: the bounds of the fraction of clipped steps.
    """
    result = run(policy)
    thresholds, scales = np.array(list(rule)).T
    np.testing.assert_allclose(result.thresholds[after:], thresholds[after:], rtol)
    np.testing.assert_allclose(result.scales[after:], scales[after:], rtol)
    is_clipped = scales < 1 - rtol
    np.testing.assert_array_equal(result.clipped[after:], is_clipped[after:])
    assert rate[0] < is_clipped.mean() < rate[1]
    return result, thresholds


def finite_norms():
    """Return the finite norms as Python floats."""
    return NORMS[IS_FINITE].tolist()


def test_a_constant_of_a_policy():
    compare(Fixed(12.0), other_rules.fixed(finite_norms(), 12.0))


@pytest.mark.parametrize("percentile", [10.0, 50.0, 90.0])
def test_the_paper_keeps_all_norms(percentile):
    policy = Quantile(percentile / 100, history_length=None, include_current=True)
    compare(policy, other_rules.autoclip_paper(finite_norms(), percentile))


def test_an_entry_of_bitsandbytes():
    """The window is full from the 100th norm on; before it, both differ."""
    policy = Quantile(5 / 99, history_length=100, include_current=True)
    rule = other_rules.bitsandbytes(finite_norms(), 5)
    result, thresholds = compare(policy, rule, after=99)
    assert np.isclose(result.thresholds[:99], thresholds[:99]).mean() < 0.5
    assert 0.8 < result.clip_rate


def test_windows_are_those_of_both_classes():
    policy = Warmup(MeanStd(1.0, history_length=32), steps=32)
    compare(policy, other_rules.lelayf(finite_norms()))
    policy = Quantile(0.5, history_length=50)
    compare(policy, other_rules.wellsaid(finite_norms(), 50))


def test_skipped_steps_are_those_of_olmo_core():
    policy = Drop(Warmup(MeanStd(6.0, history_length=128), steps=63), action="skip")
    result, _ = compare(policy, other_rules.skip_step(finite_norms()))
    np.testing.assert_array_equal(result.skipped, result.clipped)
    losses, _ = losses_and_norms(steps=500)
    state, skipped = init_loss(policy.policy), []
    for loss in losses:
        state, decision = decide_loss(policy.policy, state, loss)
        skipped.append(decision.skipped[0])
    np.testing.assert_array_equal(skipped, olmo_core(losses))
    assert sum(skipped) > 3


@pytest.mark.parametrize("ratio", [1.5, 3.0])
def test_a_ratio_is_that_of_olmo(ratio):
    policy = EmaRatio(ratio, beta=0.95, warmup_steps=0)
    compare(policy, other_rules.olmo_ratio(finite_norms(), ratio, 0.95))


@pytest.mark.parametrize(
    ("policy", "rule"),
    [
        (
            Cap(Drop(Fixed(100.0), action="skip"), max_norm=12.0),
            lambda norms: other_rules.clip_and_skip(norms, 12.0, 100.0),
        ),
        (
            Warmup(MeanStd(3.0, history_length=128, ddof=0), steps=64),
            other_rules.levanter,
        ),
    ],
    ids=["Megatron-LM, xtuner, axlearn", "levanter"],
)
def test_decisions_agree_on_5000_steps(policy, rule):
    norms = np.concatenate([series(seed=seed) for seed in range(11)])
    norms = norms[np.isfinite(norms)][:5000]
    result = replay(norms, policy)
    _, scales = np.array(list(rule(norms.astype(float).tolist()))).T
    np.testing.assert_allclose(result.scales, scales, rtol=5e-6)
    np.testing.assert_array_equal(result.scales < 1, scales < 1)
    np.testing.assert_array_equal(result.skipped, scales == 0)
    assert len(norms) == 5000
    assert 0.01 < result.clipped.mean() < 0.9


def steady_norms():
    rng = np.random.default_rng(3)
    norms = np.float32(10 * np.exp(0.3 * rng.standard_normal(500)))
    norms[[50, 300, 301, 350, 499]] *= 10
    return norms


@pytest.mark.parametrize(
    ("norms", "difference"),
    [(steady_norms(), 0.13), (NORMS[IS_FINITE], 0.42)],
    ids=["steady", "changing"],
)
def test_skipped_steps_are_those_of_lingvo(norms, difference):
    """Both start at the same step and skip the same steps.

    The thresholds differ, because one averages log(n + 1) and the other log(n), with
    other weights in the warm-up.
    """
    policy = Drop(ZScore(4.0, alpha=0.995, warmup_steps=277, log=True), action="skip")
    ours = replay(norms, policy)
    thresholds, scales = np.array(list(other_rules.lingvo(norms.tolist()))).T
    assert np.flatnonzero(np.isfinite(thresholds))[0] == 277
    assert np.flatnonzero(np.isfinite(ours.thresholds))[0] == 277
    np.testing.assert_array_equal(ours.skipped, scales == 0)
    assert ours.skipped.sum() >= 3
    ratio = ours.thresholds[277:] / thresholds[277:]
    assert 0.05 < np.abs(ratio - 1).max() < difference


@pytest.mark.needs("peers")
def test_a_tracked_quantile_of_smartclip_never_falls():
    from smartclip import AutoClip

    peer = AutoClip(mode="percentile", percentile=95.0, history="ema")
    theirs = []
    for norm in finite_norms():
        peer.observe(norm)
        theirs.append(peer.threshold())
    assert (np.diff(theirs[5:]) >= 0).all()
    ours = run(StreamingQuantile(0.95)).thresholds
    assert (np.diff(ours[np.isfinite(ours)]) < 0).mean() > 0.5


@pytest.mark.needs("peers")
def test_moving_moments_are_those_of_smartclip():
    """Our threshold is theirs of the step before, to 0.5 % of the deviation."""
    from smartclip import ZScoreClip

    peer = ZScoreClip(zmax=3.0, ema_decay=0.99)
    theirs, means = [], []
    for norm in finite_norms():
        peer.observe(norm)
        theirs.append(peer.threshold())
        means.append(peer.stats()[0])
    inner = ZScore(3.0, alpha=0.99, warmup_steps=1, target="threshold", record="raw")
    ours = run(Warmup(inner, steps=99)).thresholds
    assert np.isposinf(ours[:99]).all()
    ours = np.float64(ours[99:])
    means, theirs = np.array(means[98:-1]), np.array(theirs[98:-1])
    np.testing.assert_allclose(
        (ours - means) / math.sqrt(0.99), theirs - means, rtol=1e-4
    )
