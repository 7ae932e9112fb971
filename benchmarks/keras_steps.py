"""Time a training step in Keras: each clipper against `global_clipnorm`, side by side.

Run it as `python benchmarks/keras_steps.py`; `--help` tells the options. All models
train in one process, by a `fit` of some steps each in every round, in a new random
order; what is shown is the median of the ratio to `global_clipnorm=1.0` in the same
round, of a step within `fit`.
"""

import random
import statistics
import time

import keras
import numpy as np

import command
from autoclip_tf import AGC, NormClip, QuantileClip
from autoclip_tf.optimizers import Adam

REFERENCE = "global_clipnorm=1.0"
WORDS, LENGTH, BATCH = 500, 20, 16
STEPS, SETTLED = 8, 2
"""Of each `fit`: all steps, and those that are not timed."""

OPTIMIZERS = {
    REFERENCE: lambda: keras.optimizers.Adam(global_clipnorm=1.0),
    "the same again": lambda: keras.optimizers.Adam(global_clipnorm=1.0),
    "no clipping": lambda: keras.optimizers.Adam(),
    "clipnorm=1.0, per variable": lambda: keras.optimizers.Adam(clipnorm=1.0),
    "NormClip, clips": lambda: with_clipper(NormClip(1e-3)),
    "NormClip, does not clip": lambda: with_clipper(NormClip(1e3)),
    "QuantileClip, global": lambda: with_clipper(QuantileClip(scope="global")),
    "QuantileClip, per variable": lambda: with_clipper(QuantileClip()),
    "AGC": lambda: with_clipper(AGC()),
}


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


class Stopwatch(keras.callbacks.Callback):
    """Takes the time between the ends of batches."""

    def on_train_begin(self, logs=None):
        self.ends = []

    def on_train_batch_end(self, batch, logs=None):
        self.ends.append(time.perf_counter())

    def seconds(self):
        """Return the seconds of a step; the first ones of a `fit` set it up."""
        return (self.ends[-1] - self.ends[SETTLED]) / (len(self.ends) - 1 - SETTLED)


def make_fit(network, optimizer, compiled):
    """Return a function that trains for some steps and returns the seconds of one."""
    keras.utils.set_random_seed(0)
    model = network()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, jit_compile=compiled)
    rng = np.random.default_rng(0)
    x = rng.integers(0, WORDS, size=(STEPS * BATCH, LENGTH)).astype("int32")
    y = rng.integers(0, WORDS, size=STEPS * BATCH).astype("int32")
    watch = Stopwatch()

    def fit():
        model.fit(x, y, BATCH, verbose=0, shuffle=False, callbacks=[watch])
        return watch.seconds()

    fit()  # Keras traces
    return fit


def compare(network, compiled, seconds):
    """Print a line per optimizer, and return it: milliseconds, ratio."""
    fits = {
        name: make_fit(network, make(), compiled) for name, make in OPTIMIZERS.items()
    }
    taken = {name: [] for name in fits}
    order, end = list(fits), time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken[REFERENCE]) < 5:
        random.shuffle(order)
        for name in order:
            taken[name].append(fits[name]())
    how = "XLA" if compiled else "graph"
    print(f"\n{network.__name__}, {how}, {len(taken[REFERENCE])} rounds")
    print(f"{'':28}{'ms':>8}{'ratio':>7}{'(quartiles)':>14}{'best':>6}")
    found = []
    for name, times in taken.items():
        pairs = zip(times, taken[REFERENCE], strict=True)
        low, ratio, high = statistics.quantiles((a / b for a, b in pairs), n=4)
        best = min(times) / min(taken[REFERENCE])
        spread = f"({low:.2f}–{high:.2f})"
        median = 1e3 * statistics.median(times)
        print(f"{name:28}{median:8.2f}{ratio:7.2f}{spread:>14}{best:6.2f}", flush=True)
        case = {"model": network.__name__, "how": how, "contender": name}
        quartiles = {"low": low, "median": ratio, "high": high}
        found.append(case | {"milliseconds": median, "ratio": quartiles})
    return found


def main():
    options = command.parse(command.parser(__doc__, seconds=10.0, per="table"))
    cases = [(lstm, False), (deep, False), (deep, True)]
    found = [
        line
        for network, compiled in (cases[:1] if options.quick else cases)
        for line in compare(network, compiled, options.seconds)
    ]
    command.save(options.json, "keras", "tensorflow", results=found)


if __name__ == "__main__":
    main()
