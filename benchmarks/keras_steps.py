"""Time a step within `fit` in Keras: each clipper against `global_clipnorm`.

Run it as `python benchmarks/keras_steps.py`; `--help` lists the options. All models
train in one process, by a `fit` of several steps each in every round. `fit` has its
defaults, except for the progress bar, and traces only the first time.
"""

import time

import keras
import numpy as np

import command
from autoclip_tf import AGC, NormClip, QuantileClip, TrustClip
from autoclip_tf.optimizers import Adam
from shares import (
    EACH,
    FIXED,
    GLOBAL,
    NO_CLIPPING,
    SMALLEST,
    TRUST,
    UNIT,
    find_shares,
)
from timing import alternate, compare

REFERENCE = "global_clipnorm=1.0"
WORDS, LENGTH, BATCH = 500, 20, 16
STEPS, SETTLED = 8, 2
"""Of each `fit`: all steps, and those that are not timed."""

OPTIMIZERS = {
    REFERENCE: lambda: keras.optimizers.Adam(global_clipnorm=1.0),
    "the same again": lambda: keras.optimizers.Adam(global_clipnorm=1.0),
    NO_CLIPPING: lambda: keras.optimizers.Adam(),
    "clipnorm=1.0, per variable": lambda: keras.optimizers.Adam(clipnorm=1.0),
    "NormClip, clips": lambda: with_clipper(NormClip(1e-3)),
    "NormClip, does not clip": lambda: with_clipper(NormClip(1e3)),
    GLOBAL: lambda: with_clipper(QuantileClip(scope="global")),
    "QuantileClip, per variable": lambda: with_clipper(QuantileClip()),
    UNIT: lambda: with_clipper(AGC()),
    TRUST: lambda: with_clipper(TrustClip()),
}

SHARES = {
    FIXED: [REFERENCE],
    GLOBAL: [GLOBAL],
    EACH: ["QuantileClip, per variable"],
    UNIT: [UNIT],
    TRUST: [TRUST],
}
"""The contenders whose share of the step is in the docs."""


def with_clipper(clipper):
    return Adam(gradient_transformers=[clipper])


def lstm():
    """A word model of 1.0M parameters in 9 variables."""
    layers = [
        keras.Input((LENGTH,), dtype="int32"),
        keras.layers.Embedding(WORDS, 64),
        keras.layers.LSTM(256, return_sequences=True),
        keras.layers.LSTM(256),
        keras.layers.Dense(WORDS),
    ]
    return keras.Sequential(layers)


def deep():
    """A network of 0.4M parameters in 41 variables: many small tensors."""
    layers = [keras.layers.Dense(128, activation="relu") for _ in range(19)]
    embedding = keras.layers.Embedding(WORDS, 6)
    inputs = [keras.Input((LENGTH,), dtype="int32"), embedding, keras.layers.Flatten()]
    return keras.Sequential([*inputs, *layers, keras.layers.Dense(WORDS)])


def linear():
    """A layer of 10 500 parameters in 2 variables."""
    return keras.Sequential([keras.Input((LENGTH,)), keras.layers.Dense(WORDS)])


NETWORKS = {"LSTM": lstm, "41 small variables": deep, SMALLEST: linear}


class Stopwatch(keras.callbacks.Callback):
    """Takes the time between the ends of batches."""

    def on_train_begin(self, logs=None):
        self.ends = []

    def on_train_batch_end(self, batch, logs=None):
        self.ends.append(time.perf_counter())

    def seconds(self):
        """Return the seconds of a step; the first ones of a `fit` set it up."""
        return (self.ends[-1] - self.ends[SETTLED]) / (len(self.ends) - 1 - SETTLED)


def make_fit(network, optimizer):
    """Return a function that trains for some steps and returns the seconds of one."""
    keras.utils.set_random_seed(0)
    model, traces, watch = network(), [], Stopwatch()

    def loss(wanted, logits):
        traces.append(wanted)  # Python is here only while Keras traces
        return cross_entropy(wanted, logits)

    cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss)
    rng = np.random.default_rng(0)
    x = rng.integers(0, WORDS, size=(STEPS * BATCH, LENGTH)).astype("int32")
    y = rng.integers(0, WORDS, size=STEPS * BATCH).astype("int32")

    def fit():
        before = len(traces)
        model.fit(x, y, BATCH, verbose=0, shuffle=False, callbacks=[watch])
        if before and len(traces) > before:
            raise RuntimeError("Keras traced again in a step that was timed")
        return watch.seconds()

    fit()
    return fit


def measure(model, network, names, seconds):
    """Return a line per optimizer, and the shares."""
    fits = {name: make_fit(network, OPTIMIZERS[name]()) for name in names}
    taken = alternate(fits, seconds)
    lines = compare(taken, taken[REFERENCE], model=model)
    print(f"{model}: {lines[0]['rounds']} rounds of {STEPS} steps", flush=True)
    return lines, find_shares(taken, SHARES)


def main():
    options = command.parse(command.parser(__doc__, seconds=25.0))
    networks, names = NETWORKS, list(OPTIMIZERS)
    if options.quick:
        networks, names = {"tiny": linear}, [REFERENCE, NO_CLIPPING, GLOBAL]
    results, shares = [], {}
    for model, network in networks.items():
        lines, shares[model] = measure(model, network, names, options.seconds)
        results += lines
    numbers = {"results": results, "shares": shares}
    command.finish(options, "keras_steps", "keras", "tensorflow", **numbers)


if __name__ == "__main__":
    main()
