"""A training loop of your own with `tf.GradientTape`: the clipper is a plain callable.

One batch in ten has targets a hundred times too large. Run it:
`python examples/keras_custom_loop.py`. A second loop goes on from the checkpoint of the
first, history included.
"""

import argparse
import os
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import tensorflow as tf

from autoclip_tf import QuantileClip


class Training:
    """A model, its optimizer and its clipper, and one step of all three."""

    def __init__(self) -> None:
        layers = [keras.layers.Dense(32, "tanh"), keras.layers.Dense(1)]
        self.model = keras.Sequential([keras.Input((8,)), *layers])
        self.optimizer = keras.optimizers.SGD(0.05)
        self.clip = QuantileClip(quantile=0.5, scope="global")
        self.optimizer.build(self.model.trainable_variables)
        self.clip.build(self.model.trainable_variables)
        self.checkpoint = tf.train.Checkpoint(
            model=self.model, optimizer=self.optimizer, clipper=self.clip
        )

    @tf.function
    def step(self, x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(self.model(x, training=True) - y))
        variables = self.model.trainable_variables
        gradients = tape.gradient(loss, variables)
        self.optimizer.apply_gradients(
            self.clip(zip(gradients, variables, strict=True))
        )
        return loss

    def print_row(self) -> None:
        x, y = batch(step=0)
        loss = tf.reduce_mean(tf.square(self.model(x) - y))
        metrics = self.clip.metrics()
        print(
            f"{metrics['clip/steps']:5.0f} {loss:6.3f} {metrics['clip/norm']:8.2f} "
            f"{metrics['clip/threshold']:10.2f} {metrics['clip/norm_after']:6.2f} "
            f"{metrics['clip/clip_rate']:8.0%}"
        )


def batch(step: int) -> tuple[tf.Tensor, tf.Tensor]:
    x = tf.random.stateless_normal((32, 8), seed=(0, step))
    return x, tf.reduce_sum(x, axis=1, keepdims=True) * (100 if step % 10 == 9 else 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    keras.utils.set_random_seed(0)
    first, second = Training(), Training()
    print("steps   loss     norm  threshold  after  clipped")
    for step in range(steps // 2):
        first.step(*batch(step))
    first.print_row()
    with tempfile.TemporaryDirectory() as folder:
        path = first.checkpoint.write(f"{folder}/half")
        second.checkpoint.read(path).assert_consumed()
    for step in range(steps // 2, steps):
        second.step(*batch(step))
    second.print_row()


if __name__ == "__main__":
    main()
