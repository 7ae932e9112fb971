"""Measure a Keras model's gradient norms before training, and suggest a threshold.

Run it: `python examples/find_threshold_keras.py`. The weights, the seeds of layers such
as `Dropout`, and the statistics of `BatchNormalization` are put back afterwards.
"""

import keras
import numpy as np
import tensorflow as tf

from autoclip_core import suggest_threshold


def find_clipping_threshold(model, dataset, loss, num_batches=100):
    """Return what `suggest_threshold` says of the norms over some batches."""
    before = [variable.numpy() for variable in model.variables]
    norms = []
    try:
        for inputs, target in dataset.take(num_batches):
            with tf.GradientTape() as tape:
                value = loss(target, model(inputs, training=True))
            gradients = tape.gradient(value, model.trainable_variables)
            found = [g for g in gradients if g is not None]
            norms.append(float(tf.linalg.global_norm(found)))
    finally:
        for variable, value in zip(model.variables, before, strict=True):
            variable.assign(value)
    return suggest_threshold(norms)


def main():
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(16, "relu"), keras.layers.Dropout(0.2)]
    model = keras.Sequential([keras.Input((4,)), *layers, keras.layers.Dense(1)])
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(3200, 4)).astype("float32")
    data = tf.data.Dataset.from_tensor_slices((inputs, inputs[:, :1])).batch(32)
    print(find_clipping_threshold(model, data, keras.losses.MeanSquaredError()))


if __name__ == "__main__":
    main()
