"""Changes of a Keras model during a run: freezing, precision, optimizers, threads.

One function before the clipper and one after it record the gradients. Each step
compares thresholds and gradients with plain lists of norms, one list per variable.
The lists continue after every change.
"""

from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import partial

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

from autoclip_tf import AGC, Clipper, NormClip, TrustClip, UpdateClipper, ValueClip
from autoclip_tf.optimizers import SGD

from ..support.account import POLICIES

POLICY, threshold_of = POLICIES["quantile"]
ROUNDING = {"float32": 2e-6, "bfloat16": 1e-2}


class Run:
    """A training run with a list of past norms for each variable.

    Args:
      model: a built model. The optimizer is built for all its trainable variables.
      max_norm: the limit of a second clipper, which comes after the first.
    """

    def __init__(self, model, max_norm=np.inf):
        self.model, self.max_norm, self.steps = model, max_norm, 0
        self.before, self.after, self.past = {}, {}, {}
        self.clip = Clipper(POLICY)
        second = []
        if np.isfinite(max_norm):
            second = [NormClip(max_norm, scope="parameter")]
        first, last = (partial(record, into) for into in (self.before, self.after))
        transformers = [first, self.clip, *second, last]
        self.optimizer = SGD(0.01, gradient_transformers=transformers)
        self.optimizer.build(model.trainable_variables)
        self.compile()

    def compile(self, wrapper=None):
        """Compile again, which Keras needs after a change of the trained variables."""
        self.model.compile(wrapper or self.optimizer, loss="mse", run_eagerly=True)

    def train(self, steps):
        """Train for this many steps and check each of them."""
        for _ in range(steps):
            self.steps += 1
            self.before.clear()
            self.after.clear()
            self.model.train_on_batch(*batch(self.model, self.steps))
            assert [*self.before] == [*self.after]
            assert len(self.before) == len(self.model.trainable_variables)
            self.check()

    def check(self):
        """Compare the thresholds and the clipped gradients with the lists."""
        metrics = self.clip.metrics(per_row=True)
        assert metrics["clip/steps"] == self.steps
        for name in self.clip.names:
            past = self.past.setdefault(name, [])
            limit = threshold_of(past)
            threshold = metrics[f"clip/threshold/{name}"]
            assert threshold == pytest.approx(limit, rel=2e-6)
            if name in self.before:
                grad = self.before[name]
                check_gradient(grad, self.after[name], min(limit, self.max_norm))
                past.append(norm_of(grad))


def record(into, pairs):
    """Store the gradients by name and return the pairs unchanged."""
    for gradient, variable in pairs:
        into[variable.name.removesuffix(":0")] = gradient.numpy()
    return pairs


def norm_of(grad):
    return np.linalg.norm(np.float64(grad).ravel())


def check_gradient(before, after, limit):
    """Check that a gradient is unchanged or is scaled to its limit."""
    norm = norm_of(before)
    if norm < limit * (1 - 1e-6):
        np.testing.assert_array_equal(after, before, strict=True)
    elif norm > limit * (1 + 1e-6):
        wanted, rtol = np.float64(before) * (limit / norm), ROUNDING[before.dtype.name]
        np.testing.assert_allclose(np.float64(after), wanted, rtol)


def network():
    keras.utils.set_random_seed(0)
    hidden, output = layers.Dense(4, name="first"), layers.Dense(2, name="second")
    return keras.Sequential([keras.Input((3,)), hidden, output])


def batch(model, step):
    """Return inputs and targets; the targets have heavy tails or score tokens."""
    rng = np.random.default_rng(step)
    if isinstance(model, Tied):
        return rng.integers(5, size=(2, 4)), rng.normal(size=(2, 4, 5))
    return rng.normal(size=(4, 3)), rng.lognormal() * rng.normal(size=(4, 2))


class Tied(keras.Model):
    """A model whose embedding table is both input and output layer."""

    def __init__(self):
        super().__init__()
        self.table = layers.Embedding(5, 3)
        self.table.build()

    def call(self, tokens):
        return ops.matmul(self.table(tokens), ops.transpose(self.table.embeddings))


def test_a_model_that_does_not_change():
    Run(network()).train(20)


def test_a_tied_table_is_one_row():
    run = Run(Tied())
    run.train(15)
    assert len(run.clip.names) == 1


def test_an_unfrozen_layer_keeps_its_history():
    run = Run(network())
    for trainable in (True, False, True):
        run.model.get_layer("first").trainable = trainable
        run.compile()
        run.train(8)


def test_a_layer_frozen_at_first_has_a_row_if_the_optimizer_was_built_for_it():
    run = Run(network())
    for trainable in (False, True):
        run.model.get_layer("first").trainable = trainable
        run.compile()
        run.train(8)


@pytest.mark.parametrize("change", ["a layer is unfrozen", "a layer is added"])
def test_a_later_variable_is_refused_and_changes_nothing(change):
    """Keras builds an optimizer only once."""
    model = network()
    model.get_layer("first").trainable = change != "a layer is unfrozen"
    run = Run(model)
    run.train(5)
    if change == "a layer is unfrozen":
        model.get_layer("first").trainable = True
    else:
        model.add(layers.Dense(2))
    run.compile()
    before = [v.numpy() for v in (*model.variables, *run.optimizer.variables)]
    with pytest.raises(ValueError, match="Unknown variable"):
        model.train_on_batch(*batch(model, 6))
    after = [v.numpy() for v in (*model.variables, *run.optimizer.variables)]
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)


def test_another_optimizer_starts_without_history_and_the_first_one_continues():
    first = Run(network())
    first.train(8)
    Run(first.model).train(8)
    first.compile()
    first.train(8)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_another_precision_keeps_the_history(policy):
    """With float16 Keras scales the loss; the clipper receives unscaled gradients."""
    run = Run(network())
    for precision in ("float32", policy, "float32"):
        for part in (run.model, *run.model.layers):
            part.dtype_policy = keras.DTypePolicy(precision)
        wrapper = None
        if precision == "mixed_float16":
            scale = 256.0  # the default overflows in the first steps
            wrapper = keras.optimizers.LossScaleOptimizer(run.optimizer, scale)
        run.compile(wrapper)
        run.train(8)


def test_another_dtype_of_the_gradients_keeps_the_history():
    """A custom training loop may change the dtype of its gradients."""
    weight, clip, past = tf.Variable(tf.ones((4, 3))), Clipper(POLICY), []
    for step, dtype in enumerate(["bfloat16"] * 10 + ["float32"] * 10):
        rng = np.random.default_rng(step)
        before = tf.constant(rng.lognormal() * rng.normal(size=(4, 3)), dtype)
        [(after, _)] = clip([(before, weight)])
        assert after.dtype == dtype
        limit = threshold_of(past)
        assert clip.decision.threshold[0] == pytest.approx(limit, rel=2e-6)
        check_gradient(before.numpy(), after.numpy(), limit)
        past.append(norm_of(before.numpy()))


def test_two_clippers_in_one_optimizer_clip_one_after_the_other():
    Run(network(), max_norm=0.8).train(20)


def test_runs_in_parallel_threads_are_independent():
    """Train four models in parallel and check each of them."""
    runs = [Run(network()) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda run: run.train(8), runs))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Clipper(POLICY), "quantile"),
        (lambda: NormClip(1.0), "max_norm"),
        (lambda: AGC(), "axes"),
        (lambda: ValueClip(1.0), "clip_value"),
        (lambda: UpdateClipper(POLICY), "history_length"),
        (lambda: TrustClip(), "ratio"),
    ],
)
def test_a_setting_that_is_assigned_is_an_error(make, name):
    """The graph and the state would keep the old setting."""
    for clip in (make(), deepcopy(make())):
        for each in ["scope", "nonfinite", "dry_run", name]:
            with pytest.raises(AttributeError, match=rf"^{each} is set .* compile"):
                setattr(clip, each, 5.0)
        clip.note = "of a user"


def test_a_subclass_may_assign_the_name_of_an_argument_in_its_constructor():
    class OwnClip(NormClip):
        def __init__(self, max_norm):
            super().__init__(2 * max_norm)
            self.max_norm = max_norm

    clip = OwnClip(1.0)
    assert clip.max_norm == 1.0
    assert clip.get_config()["max_norm"] == 2.0


def test_the_transformers_of_an_optimizer_cannot_be_assigned():
    clip = NormClip(1.0)
    optimizer = SGD(0.1, gradient_transformers=[clip])
    with pytest.raises(AttributeError, match=r"make a new optimizer .* compile the"):
        optimizer.gradient_transformers = [NormClip(5.0)]
    assert optimizer.gradient_transformers == (clip,)
