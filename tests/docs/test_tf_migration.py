"""The rows about Keras of the page on other clippers; test_migration.py lists them.

Keras lets a NaN into the weights, so a step that is not finite goes to ours alone.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf

from autoclip_tf import NormClip, QuantileClip, ValueClip
from autoclip_tf.optimizers import SGD

from ..support import other_rules
from ..support.other_rules import series

SHAPES = [(3, 4), (3,)]


def make_gradients(norms, seed=2):
    """Return one float32 array for each variable, stacked over the steps."""
    rng = np.random.default_rng(seed)
    drawn = [rng.standard_normal((len(norms), *shape)) for shape in SHAPES]
    if norms.ndim == 1:
        squares = sum(np.square(d).reshape(len(d), -1).sum(1) for d in drawn)
        factors = [norms / np.sqrt(squares)] * len(drawn)
    else:
        factors = [
            norms[:, i] / np.linalg.norm(d.reshape(len(d), -1), axis=1)
            for i, d in enumerate(drawn)
        ]
    return [
        np.float32(d * f.reshape(-1, *[1] * (d.ndim - 1)))
        for d, f in zip(drawn, factors, strict=True)
    ]


def train(optimizer, gradients):
    """Return the update of each step, with a learning rate of 1: minus the gradient."""
    variables = [keras.Variable(np.zeros(shape, "float32")) for shape in SHAPES]
    optimizer.build(variables)

    @tf.function
    def step(given):
        for variable in variables:
            variable.assign(tf.zeros_like(variable.value))
        optimizer.apply(given, variables)
        return [-tf.convert_to_tensor(variable.value) for variable in variables]

    steps = [
        step([tf.constant(g) for g in given]) for given in zip(*gradients, strict=True)
    ]
    return [np.stack(parts) for parts in zip(*steps, strict=True)]


CASES = {
    "global": ({"global_clipnorm": 12.0}, NormClip(max_norm=12.0), None),
    "each": ({"clipnorm": 12.0}, NormClip(max_norm=12.0, scope="parameter"), 2),
    "value": ({"clipvalue": 0.5}, ValueClip(clip_value=0.5), None),
}


@pytest.mark.parametrize("name", CASES)
def test_a_constant_is_that_of_keras(name):
    keywords, clip, rows = CASES[name]
    norms = series(rows=rows, level=2.0 if name == "value" else 10.0)
    is_finite = np.isfinite(norms if rows is None else norms[:, 0])
    gradients = make_gradients(norms)
    ours = train(SGD(1.0, gradient_transformers=[clip]), gradients)
    finite = [g[is_finite] for g in gradients]
    theirs = train(keras.optimizers.SGD(1.0, **keywords), finite)
    for one, other, before in zip(ours, theirs, finite, strict=True):
        assert not one[~is_finite].any()
        np.testing.assert_allclose(one[is_finite], other, rtol=3e-6)
        is_clipped = (np.abs(other / before - 1) > 1e-5).reshape(len(other), -1)
        assert 0.005 < is_clipped.any(axis=1).mean() < 0.995


def test_keras_counts_a_repeated_token_apart():
    """A token that occurs twice: its two slices, or their sum."""
    slices = tf.IndexedSlices(
        tf.constant([[3.0], [3.0]]), tf.constant([1, 1]), tf.constant([4, 1])
    )
    norms = []
    for optimizer in (
        keras.optimizers.SGD(1.0, global_clipnorm=1.0),
        SGD(1.0, gradient_transformers=[NormClip(max_norm=1.0)]),
    ):
        table = keras.Variable(np.zeros((4, 1), "float32"))
        optimizer.build([table])
        optimizer.apply([slices], [table])
        norms.append(float(np.linalg.norm(table.numpy())))
    np.testing.assert_allclose(norms, [np.sqrt(2), 1.0], rtol=1e-6)


def test_a_percentile_of_the_global_norm():
    """Their TensorFlow classes clip each tensor to it, and take the nearest norm.

    Ours follows the rule of the paper's PyTorch code.
    """
    norms = series()
    is_finite = np.isfinite(norms)
    gradients = make_gradients(norms)
    clip = QuantileClip(
        quantile=0.1, history_length=10000, include_current=True, global_clipping=True
    )
    ours = train(SGD(1.0, gradient_transformers=[clip]), gradients)
    finite = norms[is_finite].tolist()
    linear = np.array(list(other_rules.autoclip_paper(finite, 10.0)))
    for one, before in zip(ours, gradients, strict=True):
        scales = linear[:, 1].reshape(-1, *[1] * (one.ndim - 1))
        np.testing.assert_allclose(
            one[is_finite], scales * before[is_finite], rtol=3e-6
        )
    rule = other_rules.autoclip_paper(finite, 10.0, "nearest")
    nearest = np.array(list(rule))[:, 0]
    assert 0.5 < (nearest != linear[:, 0]).mean()
    rows = [g[is_finite].reshape(len(finite), -1) for g in gradients]
    sizes = [np.linalg.norm(row, axis=1) for row in rows]
    each = np.sqrt(sum(np.minimum(size, nearest) ** 2 for size in sizes))
    assert (each > 1.2 * nearest).mean() > 0.5
