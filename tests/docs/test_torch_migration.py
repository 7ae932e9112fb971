"""Constant limits of other clippers in PyTorch; test_migration.py lists the rows."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from autoclip_core import Cap, Drop, Fixed
from autoclip_torch import Clipper, NormClip, ValueClip

from ..support import other_rules
from ..support.other_rules import series
from ..support.torch_series import (
    compare,
    finite,
    gradients,
    make_pair,
    make_parameters,
    set_gradients,
)


@pytest.mark.parametrize(
    ("norm", "norm_type", "limit"), [("l2", 2.0, 12.0), ("max", math.inf, 5.0)]
)
def test_a_constant_is_that_of_torch(norm, norm_type, limit):
    ours, theirs = make_pair()
    returned = []

    def clip():
        norm = nn.utils.clip_grad_norm_(theirs, max_norm=limit, norm_type=norm_type)
        returned.append(norm)

    clipper = NormClip(ours, max_norm=limit, norm=norm)
    decisions = compare(clipper, ours, clip, theirs, gradients(series()))
    norms = torch.cat([decision.norm for decision in decisions])
    torch.testing.assert_close(norms, torch.stack(returned), rtol=1e-6, atol=0)


def test_both_raise_at_a_norm_that_is_not_finite():
    ours, theirs = make_pair()
    clipper = NormClip(ours, max_norm=12.0, nonfinite="raise")
    for norm, grads in zip(series(), gradients(series()), strict=True):
        set_gradients(ours, grads)
        set_gradients(theirs, grads)
        if np.isfinite(norm):
            clipper.step()
            nn.utils.clip_grad_norm_(theirs, 12.0, error_if_nonfinite=True)
        else:
            with pytest.raises(FloatingPointError):
                clipper.step()
            with pytest.raises(RuntimeError, match="non-finite"):
                nn.utils.clip_grad_norm_(theirs, 12.0, error_if_nonfinite=True)


def test_a_nan_spreads_in_torch_alone():
    ours, theirs = make_pair()
    grads = next(gradients([10.0]))
    grads[0][0, 0] = math.nan
    set_gradients(theirs, grads)
    nn.utils.clip_grad_norm_(theirs, 12.0)
    assert all(p.grad.isnan().all() for p in theirs)
    set_gradients(ours, grads)
    clipper = NormClip(ours, 12.0)
    clipper.step()
    assert not any(p.grad.any() for p in ours)
    assert clipper.metrics()["clip/nonfinite_total"] == 1
    set_gradients(ours, grads)
    NormClip(ours, 12.0, nonfinite="propagate").step()
    for parameter, gradient in zip(ours, grads, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, equal_nan=True)


def test_a_limit_of_elements_is_that_of_torch():
    ours, theirs = make_pair()
    compare(
        ValueClip(ours, clip_value=0.5),
        ours,
        lambda: nn.utils.clip_grad_value_(theirs, 0.5),
        theirs,
        gradients(series(level=1.0)),
    )


def test_constants_to_clip_and_to_skip():
    """xtuner also skips a step whose norm is not finite, as `nonfinite="skip"` does."""
    norms = series()
    ours = make_parameters()
    policy = Cap(Drop(Fixed(150.0), action="skip"), max_norm=12.0)
    clipper = Clipper(ours, policy, scope="global", nonfinite="skip")
    rule = other_rules.clip_and_skip(norms.tolist(), 12.0, 150.0)
    scales, skipped = [], []
    for grads in gradients(norms):
        set_gradients(ours, grads)
        decision = clipper.step()
        scales.append(float(decision.scale))
        skipped.append(bool(decision.skipped))
    _, expected = np.array(list(rule)).T
    np.testing.assert_allclose(scales, expected, rtol=5e-6)
    np.testing.assert_array_equal(skipped, expected == 0)
    assert 5 < np.sum(skipped) < 100
    assert 100 < np.sum((expected > 0) & (expected < 0.99)) < 400


@pytest.mark.parametrize(
    ("max_norm", "nonfinite"),
    [(1.0, "raise"), (5.0, "skip"), (0.5, "zero"), (10.0, "zero")],
    ids=["torchtitan", "ESPnet", "Stable-Baselines3", "ultralytics"],
)
def test_constants_of_training_codebases(max_norm, nonfinite):
    norms = series(level=0.3 * max_norm)
    ours = make_parameters()
    clipper = NormClip(ours, max_norm, nonfinite=nonfinite)
    rule = other_rules.fixed(finite(norms), max_norm)
    for norm, grads in zip(norms, gradients(norms), strict=True):
        set_gradients(ours, grads)
        if math.isfinite(norm):
            decision = clipper.step()
            threshold, scale = next(rule)
            assert float(decision.threshold) == threshold
            assert float(decision.scale) == pytest.approx(scale, rel=5e-6)
            continue
        if nonfinite == "raise":
            with pytest.raises(FloatingPointError):
                clipper.step()
        else:
            assert bool(clipper.step().skipped) == (nonfinite == "skip")
    assert next(rule, None) is None
