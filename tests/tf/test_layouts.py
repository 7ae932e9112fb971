"""The axes of an output unit, for the layers of Keras."""

import keras
import numpy as np
import pytest
from keras import layers

from autoclip_core.clipper.units import Units, split_shape, unit_count
from autoclip_tf import AGC
from autoclip_tf.layouts import axes_by_layer, by_path, make_unit_rule

# A layer, its input shape, and the axes of the norm by the end of a variable's path.
LAYERS = {
    "Dense": (lambda **k: layers.Dense(4, **k), (3,), {"kernel": (0,), "bias": (0,)}),
    "Conv1D": (lambda **k: layers.Conv1D(4, 2, **k), (8, 3), {"kernel": (0, 1)}),
    "Conv2D": (lambda **k: layers.Conv2D(4, 2, **k), (8, 8, 3), {"kernel": (0, 1, 2)}),
    "Conv2D of groups": (
        lambda **k: layers.Conv2D(4, 2, groups=2, **k),
        (8, 8, 6),
        {"kernel": (0, 1, 2)},
    ),
    "Conv1DTranspose": (
        lambda **k: layers.Conv1DTranspose(4, 2, **k),
        (8, 3),
        {"kernel": (0, 2)},
    ),
    "Conv2DTranspose": (
        lambda **k: layers.Conv2DTranspose(4, 2, **k),
        (8, 8, 3),
        {"kernel": (0, 1, 3)},
    ),
    "DepthwiseConv2D": (
        lambda **k: layers.DepthwiseConv2D(2, depth_multiplier=2, **k),
        (8, 8, 3),
        {"kernel": (0, 1)},
    ),
    "SeparableConv2D": (
        lambda **k: layers.SeparableConv2D(4, 2, **k),
        (8, 8, 3),
        {"depthwise_kernel": (0, 1), "pointwise_kernel": (0, 1, 2)},
    ),
    "EinsumDense": (
        lambda **k: layers.EinsumDense("abc,cde->abde", (None, 2, 4), **k),
        (8, 3),
        {"kernel": (0,)},
    ),
    "Embedding": (lambda **k: layers.Embedding(9, 4, **k), (5,), {"embeddings": (1,)}),
    "LSTM": (
        lambda **k: layers.LSTM(4, **k),
        (5, 3),
        {"cell/kernel": (0,), "recurrent_kernel": (0,), "bias": (0,)},
    ),
    "GRU": (
        lambda **k: layers.GRU(4, **k),
        (5, 3),
        {"cell/kernel": (0,), "recurrent_kernel": (0,), "bias": (1,)},
    ),
    "LayerNormalization": (
        lambda **k: layers.LayerNormalization(axis=(1, 2), **k),
        (5, 3),
        {"gamma": (0, 1), "beta": (0, 1)},
    ),
}
KNOWN_BY_NAME = sorted(set(LAYERS) - {"EinsumDense"})


def build(which, **keywords):
    """Return a model of one layer, and the expected axes."""
    make, shape, wanted = LAYERS[which]
    layer = make(**keywords)
    model = keras.Sequential([keras.Input(shape), layer])
    return model, wanted


def check(model, wanted, units_of):
    for end, axes in wanted.items():
        matches = [v for v in model.trainable_variables if v.path.endswith(end)]
        assert matches, (end, [v.path for v in model.trainable_variables])
        for variable in matches:
            assert units_of(variable.path, variable.shape) == Units(axes), variable.path


@pytest.mark.parametrize("name", KNOWN_BY_NAME)
def test_a_layer_with_its_default_name_is_recognized_by_its_path(name):
    model, wanted = build(name)
    check(model, wanted, by_path)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_with_another_name_is_recognized_by_its_class(name):
    model, wanted = build(name, name="custom")
    if name == "GRU":  # its bias is recognized by the name of the cell
        wanted = {end: axes for end, axes in wanted.items() if end != "bias"}
    check(model, wanted, make_unit_rule("unit", axes_by_layer(model)))


def test_attention_has_a_unit_for_each_feature_of_each_head():
    x = keras.Input((5, 8))
    attention = layers.MultiHeadAttention(num_heads=2, key_dim=3)
    model = keras.Model(x, attention(x, x))
    wanted = {
        "query/kernel": (0,),
        "key/kernel": (0,),
        "value/kernel": (0,),
        "attention_output/kernel": (0, 1),
        "query/bias": (0, 1),
        "attention_output/bias": (0,),
    }
    check(model, wanted, by_path)


def test_rules_for_all_shapes_and_axes_by_pattern():
    assert make_unit_rule("layer", {})("a/kernel", (3, 4)) == Units((0, 1))
    assert make_unit_rule("nfnets", {})("a/kernel", (2, 2, 3, 4)) == Units((0, 1, 2))
    rule = make_unit_rule("unit", {"*/up/kernel": (0, 1, -1), "low": (0,)})
    assert rule("net/up/kernel", (2, 2, 3, 4)) == Units((0, 1, 3))
    assert rule("low/kernel", (2, 2, 3, 4)) == Units((0,))
    assert rule("net/other/kernel", (2, 2, 3, 4)) == Units((0, 1, 2))
    with pytest.raises(ValueError, match="rule must be one of 'unit', 'layer'"):
        make_unit_rule("units", {})


def test_agc_limits_each_filter_of_a_transposed_convolution():
    model, _ = build("Conv2DTranspose", name="up", use_bias=False)
    [kernel] = model.trainable_variables
    clip = AGC(0.1, axes=axes_by_layer(model))
    gradient = np.random.default_rng(0).normal(size=kernel.shape).astype("float32")
    [(got, _)] = clip([(keras.ops.convert_to_tensor(gradient), kernel)])
    weight = np.sqrt(np.sum(np.float64(kernel.numpy()) ** 2, axis=(0, 1, 3)))
    norm = np.sqrt(np.sum(np.float64(gradient) ** 2, axis=(0, 1, 3)))
    scale = np.minimum(1.0, 0.1 * np.maximum(weight, 1e-3) / norm)
    np.testing.assert_allclose(got, gradient * scale[:, None], rtol=1e-5)
    assert clip.names == [f"{kernel.path}[{i}]" for i in range(4)]
    restored = AGC.from_config(clip.get_config())
    assert restored._axes.by_path == {kernel.path: (0, 1, 3)}


def test_no_layer_has_an_axis_that_units_split():
    for name in KNOWN_BY_NAME:
        model, _ = build(name)
        for variable in model.trainable_variables:
            shape = tuple(variable.shape)
            units = by_path(variable.path, shape)
            assert split_shape(shape, units) == shape
            assert unit_count(shape, units) <= np.prod(shape)
