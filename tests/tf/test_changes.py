"""The fault battery's changes of a model in the midst of a run, in Keras.

One function before the clipper and one behind it write down what passes. Each step
compares thresholds and gradients with plain lists of norms, one for each variable:
whatever changes, the lists go on.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import sha256

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

from autoclip_tf import Clipper, NormClip
from autoclip_tf.optimizers import SGD

from ..support.account import POLICIES
from ..support.cases import of_another_process

POLICY, threshold_of = POLICIES["quantile"]
ROUNDING = {"float32": 2e-6, "bfloat16": 1e-2}


class Run:
    """A model in training, each variable of which has a list of its norms.

    Args:
      model: it is built; the optimizer is built for all it trains.
      most: a second clipper, which comes after the first, holds each norm below this.
    """

    def __init__(self, model, most=np.inf):
        self.model, self.most, self.steps = model, most, 0
        self.before, self.after, self.past = {}, {}, {}
        self.clip = Clipper(POLICY)
        second = [NormClip(most, scope="parameter")] if np.isfinite(most) else []
        first, last = (partial(write_down, into) for into in (self.before, self.after))
        transformers = [first, self.clip, *second, last]
        self.optimizer = SGD(0.01, gradient_transformers=transformers)
        self.optimizer.build(model.trainable_variables)
        self.compile()

    def compile(self, around=None):
        """As Keras asks after a change of what is trained, or how."""
        self.model.compile(around or self.optimizer, loss="mse", run_eagerly=True)

    def take(self, steps):
        """Take steps, and check each."""
        for _ in range(steps):
            self.steps += 1
            self.before.clear()
            self.after.clear()
            self.model.train_on_batch(*batch(self.model, self.steps))
            assert [*self.before] == [*self.after]
            assert len(self.before) == len(self.model.trainable_variables)
            self.check()

    def check(self):
        """The thresholds are those of the lists, and the gradients follow."""
        told = self.clip.metrics(per_row=True)
        assert told["clip/steps"] == self.steps
        for name in self.clip.names:
            past = self.past.setdefault(name, [])
            limit = threshold_of(past)
            assert told[f"clip/threshold/{name}"] == pytest.approx(limit, rel=2e-6)
            if name in self.before:
                grad = self.before[name]
                check_gradient(grad, self.after[name], min(limit, self.most))
                past.append(norm_of(grad))


def write_down(into, pairs):
    """Pass the gradients on."""
    for gradient, variable in pairs:
        into[variable.name.removesuffix(":0")] = gradient.numpy()
    return pairs


def norm_of(grad):
    return np.linalg.norm(np.float64(grad).ravel())


def check_gradient(before, after, limit):
    """A gradient keeps its bits or has the norm of its limit."""
    norm = norm_of(before)
    if norm < limit * (1 - 1e-6):
        np.testing.assert_array_equal(after, before, strict=True)
    elif norm > limit * (1 + 1e-6):
        wanted, rtol = np.float64(before) * (limit / norm), ROUNDING[before.dtype.name]
        np.testing.assert_allclose(np.float64(after), wanted, rtol)


def network():
    keras.utils.set_random_seed(0)
    inside = [layers.Dense(4, name="first"), layers.Dense(2, name="second")]
    return keras.Sequential([keras.Input((3,)), *inside])


def batch(model, step):
    """Targets of heavy tails, or scores of tokens."""
    rng = np.random.default_rng(step)
    if isinstance(model, Tied):
        return rng.integers(5, size=(2, 4)), rng.normal(size=(2, 4, 5))
    return rng.normal(size=(4, 3)), rng.lognormal() * rng.normal(size=(4, 2))


class Tied(keras.Model):
    """A table that looks tokens up, and scores them."""

    def __init__(self):
        super().__init__()
        self.table = layers.Embedding(5, 3)
        self.table.build()

    def call(self, tokens):
        return ops.matmul(self.table(tokens), ops.transpose(self.table.embeddings))


def test_a_model_that_does_not_change():
    Run(network()).take(20)


def test_a_tied_table_is_one_row():
    run = Run(Tied())
    run.take(15)
    assert len(run.clip.names) == 1


def test_an_unfrozen_layer_keeps_its_history():
    run = Run(network())
    for trainable in (True, False, True):
        run.model.get_layer("first").trainable = trainable
        run.compile()
        run.take(8)


def test_a_layer_frozen_at_first_has_a_row_if_the_optimizer_was_built_for_it():
    run = Run(network())
    for trainable in (False, True):
        run.model.get_layer("first").trainable = trainable
        run.compile()
        run.take(8)


@pytest.mark.parametrize("change", ["a layer is woken", "a layer is added"])
def test_a_later_variable_is_refused_and_changes_nothing(change):
    """Keras itself builds an optimizer once."""
    model = network()
    model.get_layer("first").trainable = change != "a layer is woken"
    run = Run(model)
    run.take(5)
    if change == "a layer is woken":
        model.get_layer("first").trainable = True
    else:
        model.add(layers.Dense(2))
    run.compile()
    held = [v.numpy() for v in (*model.variables, *run.optimizer.variables)]
    with pytest.raises(ValueError, match="Unknown variable"):
        model.train_on_batch(*batch(model, 6))
    for one, variable in zip(
        held, (*model.variables, *run.optimizer.variables), strict=True
    ):
        np.testing.assert_array_equal(variable.numpy(), one)


def test_another_optimizer_starts_without_history_and_the_first_one_continues():
    first = Run(network())
    first.take(8)
    Run(first.model).take(8)
    first.compile()
    first.take(8)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_another_precision_keeps_the_history(policy):
    """Of float16 Keras scales the loss; the clipper sees what was unscaled."""
    run = Run(network())
    for precision in ("float32", policy, "float32"):
        for part in (run.model, *run.model.layers):
            part.dtype_policy = keras.DTypePolicy(precision)
        around = None
        if precision == "mixed_float16":
            scale = 256.0  # Keras's own is so large that the first steps overflow
            around = keras.optimizers.LossScaleOptimizer(run.optimizer, scale)
        run.compile(around)
        run.take(8)


def test_another_dtype_of_the_gradients_keeps_the_history():
    """In a loop, which makes them as it likes."""
    weight, clip, past = tf.Variable(tf.ones((4, 3))), Clipper(POLICY), []
    for step, dtype in enumerate(["bfloat16"] * 10 + ["float32"] * 10):
        rng = np.random.default_rng(step)
        drawn = tf.constant(rng.lognormal() * rng.normal(size=(4, 3)), dtype)
        [(grad, _)] = clip([(drawn, weight)])
        assert grad.dtype == dtype
        limit = threshold_of(past)
        assert clip.decision.threshold[0] == pytest.approx(limit, rel=2e-6)
        check_gradient(drawn.numpy(), grad.numpy(), limit)
        past.append(norm_of(drawn.numpy()))


def test_two_clippers_in_one_optimizer_clip_one_after_the_other():
    Run(network(), most=0.8).take(20)


def test_runs_in_parallel_threads_are_independent():
    """Four models side by side, each checked as if it were alone."""
    runs = [Run(network()) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda run: run.take(15), runs))


def digest():
    """Of every bit of a model that was fitted, and of its optimizer."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((50,)), layers.Dense(300), layers.Dense(2)])
    clippers = [Clipper(POLICY), Clipper(POLICY, scope="global")]
    optimizer = SGD(0.01, momentum=0.9, gradient_transformers=clippers)
    model.compile(optimizer, loss="mse", run_eagerly=True)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(64, 50)), rng.normal(size=(64, 2))
    model.fit(x, y, batch_size=8, epochs=2, verbose=0)
    bits = sha256()
    for variable in (*model.variables, *model.optimizer.variables):
        bits.update(variable.numpy().tobytes())
    return bits.hexdigest()


def test_the_same_seed_gives_the_same_bits_in_another_process():
    assert of_another_process(__name__) == digest()
