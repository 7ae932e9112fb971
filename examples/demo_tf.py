"""One training run of the demo in Keras: an optimizer with a gradient transformer."""

import os
from functools import cache

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is imported

import keras
import numpy as np

from autoclip_core import ClipLog
from autoclip_tf import (
    AGC,
    Clipper,
    NormClip,
    QuantileClip,
    StandardClip,
    TrustClip,
    ZClip,
)
from autoclip_tf.optimizers import SGD
from demo_task import (
    BATCH,
    FIXED,
    HIDDEN,
    Method,
    Run,
    initial_weights,
    rate_at,
    tests_after,
)
from digits_data import CLASSES, INPUTS, LENGTH, batches, load


def make_clipper(method: Method) -> Clipper | TrustClip:
    """Return the method's clipper; without clipping it only observes (`dry_run`)."""
    if not method.clips:
        return NormClip(FIXED, dry_run=True)
    if method.clipper == "trust":
        return TrustClip()
    if method.clipper == "fixed":
        return NormClip(FIXED)
    if method.clipper == "quantile":
        return QuantileClip(0.9, global_clipping=True)
    if method.clipper == "median":
        return QuantileClip(0.5, global_clipping=True)
    if method.clipper == "mean_std":
        return StandardClip(2.0, global_clipping=True)
    if method.clipper == "agc":
        return AGC(0.01, exclude="*head*")  # as its paper does
    if method.clipper == "zclip":
        return ZClip()
    raise ValueError(f"the demo has no clipper for {method.clipper!r}")


@cache
def make_model(method: Method) -> keras.Model:
    """Return a ReLU network that reads a sequence and then names the digit.

    It is compiled once per method, for all its seeds in this process.
    """
    model = keras.Sequential(
        [
            keras.Input((LENGTH, INPUTS)),
            keras.layers.SimpleRNN(HIDDEN, activation="relu"),
            keras.layers.Dense(CLASSES, name="head"),
        ]
    )
    model.compile(
        optimizer=SGD(method.rate, gradient_transformers=[make_clipper(method)]),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=True,
    )
    model.optimizer.build(model.trainable_variables)
    return model


def begin(model: keras.Model, seed: int) -> Clipper:
    """Set the initial weights, reset the clipper, and return that of the gradient."""
    start = initial_weights(seed)
    rnn, head = model.layers
    zeros = np.zeros(HIDDEN), np.zeros(CLASSES)
    rnn.set_weights([start["inputs"], start["recurrent"], zeros[0]])
    head.set_weights([start["outputs"], zeros[1]])
    [clipper] = model.optimizer.gradient_transformers
    clipper.reset()
    return clipper.gradient if isinstance(clipper, TrustClip) else clipper


def train(method: Method, seed: int, steps: int) -> Run:
    """Train one network and return what happened."""
    train_x, train_y, test_x, test_y = load()
    model = make_model(method)
    clipper = begin(model, seed)
    log, losses, accuracies = ClipLog(), [], []
    for step, batch in enumerate(batches(seed, steps, BATCH)):
        model.optimizer.learning_rate = rate_at(step, method)
        model.reset_metrics()
        losses.append(float(model.train_on_batch(train_x[batch], train_y[batch])))
        log.record(clipper.decision)
        if tests_after(step, steps):
            logits = keras.ops.convert_to_numpy(model(test_x, training=False))
            accuracies.append(float(np.mean(logits.argmax(axis=1) == test_y)))
    return Run(
        method,
        seed,
        losses=np.array(losses),
        norms=log.norms,
        thresholds=log.thresholds,
        clipped=log.clipped,
        finite=log.finite,
        accuracies=np.array(accuracies),
    )
