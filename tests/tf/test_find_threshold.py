"""The Keras example measures the whole gradient and restores the model."""

import importlib.util
import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf

EXAMPLE = pathlib.Path(__file__).parents[2] / "examples" / "find_threshold_keras.py"


def test_the_model_is_unchanged_even_if_the_loss_raises():
    spec = importlib.util.spec_from_file_location("find_threshold_keras", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    layers = [keras.layers.BatchNormalization(), keras.layers.Dropout(0.5, seed=1)]
    model = keras.Sequential([keras.Input((2,)), *layers, keras.layers.Dense(1)])
    data = tf.data.Dataset.from_tensors((tf.ones((4, 2)), tf.ones((4, 1)))).repeat(3)
    before = [np.copy(variable.numpy()) for variable in model.variables]
    loss = keras.losses.MeanSquaredError()
    assert example.find_clipping_threshold(model, data, loss).steps == 3

    def fails(target, output):
        raise ArithmeticError("stop")

    with pytest.raises(ArithmeticError, match="stop"):
        example.find_clipping_threshold(model, data, fails)
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)
