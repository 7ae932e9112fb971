"""Tests of `scale_only` in Keras: all are measured, and only the named scaled."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from autoclip_core import Fixed
from autoclip_tf import AGC, Clipper, NormClip, QuantileClip, ValueClip

from ..support.scale_only import POLICIES, ROWS, SCALED, SHAPES, expect, make_series


def make_variables():
    return [keras.Variable(np.zeros(s, np.float32), name=n) for n, s in SHAPES.items()]


def scaled_by(clip, variables, grads):
    """Return the scaled gradients by name; None stays None."""
    tensors = [grad if grad is None else tf.convert_to_tensor(grad) for grad in grads]
    return [gradient for gradient, _ in clip(zip(tensors, variables, strict=True))]


@pytest.mark.parametrize(
    ("scope", "name", "nonfinite", "kind"),
    [
        ("global", "clip and drop", "zero", "rms"),
        ("parameter", "clip", "propagate", "l2"),
        ("unit of the last axis", "clip and drop", "zero", "max"),
    ],
)
def test_only_these_are_scaled_and_all_are_measured(scope, name, nonfinite, kind):
    """The gradients and `clip/norm_after` follow the rules, eagerly and under XLA."""
    policy, variables = POLICIES[name], make_variables()
    compiles = scope == "unit of the last axis"
    clip = Clipper(
        policy[0],
        scope=scope.split(" ")[0],
        nonfinite=nonfinite,
        scale_only=SCALED,
        norm=kind,
    )
    clip.build(variables)

    def step(*grads):
        return scaled_by(clip, variables, grads)

    series = make_series()
    if compiles:
        step = tf.function(step, jit_compile=True)
        series = [grads for grads in series if grads["v"] is not None]
    for grads in series:
        scaled = dict(zip(SHAPES, step(*grads.values()), strict=True))
        how = policy, nonfinite, kind
        after, norm, norm_after = expect(grads, ROWS[scope], *how)
        assert {n for n, gradient in scaled.items() if gradient is not None} == set(
            after
        )
        for n, wanted in after.items():
            np.testing.assert_allclose(scaled[n], wanted, rtol=1e-6)
            if n not in SCALED:  # unchanged bit for bit, or 0
                np.testing.assert_array_equal(scaled[n], np.float32(wanted))
        metrics = clip.metrics()
        numbers = [metrics["clip/norm"], metrics["clip/norm_after"]]
        np.testing.assert_allclose(numbers, [norm, norm_after], rtol=1e-6)


def test_sparse_gradients_and_the_parameters_of_both_parts_are_measured():
    table, dense = keras.Variable([[0.0], [5.0]], name="t"), keras.Variable([12.0])
    clip = AGC(0.5, scope="global", scale_only="t")
    slices = tf.IndexedSlices(
        tf.constant([[2.0], [3.0]]), tf.constant([1, 1]), dense_shape=(2, 1)
    )
    pairs = clip([(slices, table), (tf.constant([12.0]), dense)])
    assert clip.decision.norm.tolist() == pytest.approx([13.0])
    assert clip.decision.threshold.tolist() == pytest.approx([6.5])
    values = pairs[0][0].values.numpy().ravel().tolist()
    assert values == pytest.approx([1.0, 1.5])
    assert pairs[1][0].numpy().tolist() == [12.0]


def test_clipping_by_value_changes_only_these_elements():
    variables = make_variables()
    clip = ValueClip(0.5, scope="global", scale_only=SCALED)
    for grads in make_series():
        scaled = scaled_by(clip, variables, grads.values())
        given = [grad for grad in grads.values() if grad is not None]
        is_finite = all(np.isfinite(grad).all() for grad in given)
        norm = 0.0
        for gradient, (name, grad) in zip(scaled, grads.items(), strict=True):
            if grad is None:
                continue
            limit = 0.5 if name in SCALED else np.inf
            expected = (
                np.clip(grad, -limit, limit) if is_finite else np.zeros_like(grad)
            )
            np.testing.assert_array_equal(gradient, expected)
            norm = np.hypot(norm, np.linalg.norm(np.float64(expected)))
        if is_finite:
            after = clip.metrics()["clip/norm_after"]
            assert after == pytest.approx(norm, rel=1e-6)


def test_a_configuration_and_a_state_hold_scale_only():
    variables = make_variables()
    clip = QuantileClip(0.5, scope="global", scale_only=["w", "u"])
    copy = QuantileClip.from_config(clip.get_config())
    assert repr(copy) == repr(clip)
    assert "scale_only=['w', 'u']" in repr(clip)
    plain = QuantileClip(0.5, scope="global")
    for each in (clip, copy, plain):
        each.build(variables)
    assert [v.shape for v in plain._variables] == [v.shape for v in clip._variables]
    for grads in make_series()[:5]:
        results = [
            scaled_by(each, variables, grads.values()) for each in (clip, copy, plain)
        ]
        for one, other, of_plain in zip(*results, strict=True):
            np.testing.assert_array_equal(one, other)
            assert one.shape == of_plain.shape
    np.testing.assert_allclose(
        clip.decision.threshold, plain.decision.threshold, rtol=1e-6
    )


def test_a_pattern_that_names_nothing_is_an_error():
    with pytest.raises(ValueError, match="scale_only must be None or hold a pattern"):
        NormClip(1.0, scale_only=[])
    with pytest.raises(TypeError, match="scale_only must hold names, patterns or a"):
        NormClip(1.0, scale_only=3)
    for pattern in ("x", "v"):  # an excluded variable is never scaled
        clip = Clipper(Fixed(1.0), exclude="v", scale_only=pattern)
        with pytest.raises(
            ValueError, match="scale_only must match a parameter's name"
        ):
            clip.build(make_variables())
