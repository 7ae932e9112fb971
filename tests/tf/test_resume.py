"""2N steps equal N steps, a file, a new process and N more steps, bit for bit.

One policy of each kind has a clipper, at alternating scopes; a window has a clipper at
each scope. Policies of a kind have the same arrays in a file, and `test_clipper.py`
restores every policy from its configuration. One optimizer applies all clippers, one
after the other, so each format is one file. A quarter of the clippers also runs in a
loop without an optimizer. The optimizer steps eagerly, and the loop is traced.
"""

import os
import pathlib
import subprocess
import sys
from hashlib import sha256

import keras
import numpy as np
import pytest
import tensorflow as tf

from autoclip_core import (
    Cap,
    Drop,
    EmaRatio,
    Fixed,
    MeanStd,
    Quantile,
    StreamingQuantile,
    Warmup,
    ZScore,
)
from autoclip_tf import Clipper, QuantileClip
from autoclip_tf.optimizers import SGD
from autoclip_tf.state.variables import LATER

from ..support.cases import STATIC, policy_of

N = 5  # warm-ups end, and the shorter windows are full, before or after the load
SCOPES = ("parameter", "global", "unit")
# A gradient transformer cannot skip an update.
CODES = [code for code in STATIC if "skip" not in code]
# The last policy of each kind in the table has a short window.
KINDS = {type(STATIC[code]): code for code in CODES}
# The scope decides only how many rows a state has.
AT_ONE_SCOPE = [(code, SCOPES[place % 3]) for place, code in enumerate(KINDS.values())]
WINDOWS = [(KINDS[Quantile], scope) for scope in SCOPES]
RUNS = list(dict.fromkeys(AT_ONE_SCOPE + WINDOWS))
IN_LOOP = RUNS[1::4]


def make_clippers(runs):
    """Return clippers of which only the first clips; the others receive its results."""
    return [
        Clipper(policy_of(code), scope=scope, dry_run=place > 0)
        for place, (code, scope) in enumerate(runs)
    ]


def check_metrics(clippers):
    """Check that all clippers counted every step and that most of them clipped."""
    rows = [clip.metrics() for clip in clippers]
    assert all(metrics["clip/steps"] == 2 * N for metrics in rows)
    assert sum(metrics["clip/clip_rate"] > 0 for metrics in rows) > 0.6 * len(rows)


def network():
    keras.utils.set_random_seed(0)
    layers = [keras.Input((3,)), keras.layers.Dense(2), keras.layers.Dense(1)]
    return keras.Sequential(layers)


SHAPES = [(3, 2), (2,), (2, 1), (1,)]


def noise(step):
    """Return gradients whose norms have a heavy-tailed distribution."""
    rng = np.random.default_rng(step)
    size = rng.lognormal()
    return [tf.constant(size * rng.normal(size=s), tf.float32) for s in SHAPES]


class InOptimizer:
    """A model compiled with all clippers."""

    def __init__(self, model=None):
        self.model = model or network()
        if model is None:
            optimizer = SGD(0.02, gradient_transformers=make_clippers(RUNS))
            self.model.compile(optimizer, loss="mse")
            optimizer.build(self.model.trainable_variables)
        self.clippers = self.model.optimizer.gradient_transformers

    def step(self, grads):
        weights = self.model.trainable_variables
        grads = [g + w for g, w in zip(grads, weights, strict=True)]
        self.model.optimizer.apply(grads, weights)

    def variables(self):
        return [*self.model.trainable_variables, *self.model.optimizer.variables]

    def checkpoint(self):
        return tf.train.Checkpoint(model=self.model, optimizer=self.model.optimizer)


class InLoop:
    """Variables and clippers without an optimizer."""

    def __init__(self):
        self.weights = [tf.Variable(tf.ones(shape)) for shape in SHAPES]
        self.clippers = make_clippers(IN_LOOP)
        for clip in self.clippers:
            clip.build(self.weights)
        self.step = tf.function(self._step)

    def _step(self, grads):
        grads = [g + w for g, w in zip(grads, self.weights, strict=True)]
        pairs = zip(grads, self.weights, strict=True)
        for clip in self.clippers:
            pairs = clip(pairs)
        for gradient, weight in pairs:
            weight.assign_sub(0.02 * gradient)

    def variables(self):
        return [*self.weights, *(v for clip in self.clippers for v in clip._variables)]

    def checkpoint(self):
        return tf.train.Checkpoint(weights=self.weights, clippers=self.clippers)


def train(run, steps):
    """Take these steps; return the values of all variables of the run."""
    for step in steps:
        run.step(noise(step))
    return [variable.numpy() for variable in run.variables()]


# The formats: how to save a run, and how to load it.


def save_keras(run, folder):
    run.model.save(folder / "model.keras")


def load_keras(run, folder):
    """Do nothing: the new process loads its model from this file."""


def save_weights(run, folder):
    run.model.save_weights(folder / "model.weights.h5")


def load_weights(run, folder):
    run.model.load_weights(folder / "model.weights.h5")


def save_checkpoint(run, folder):
    run.checkpoint().write(folder / type(run).__name__)


def load_checkpoint(run, folder):
    run.checkpoint().read(folder / type(run).__name__).assert_existing_objects_matched()


FORMATS = {
    "keras": (InOptimizer, save_keras, load_keras),
    "weights": (InOptimizer, save_weights, load_weights),
    "checkpoint": (InOptimizer, save_checkpoint, load_checkpoint),
    "checkpoint of a loop": (InLoop, save_checkpoint, load_checkpoint),
}


# The runs in two processes.


def resume(folder):
    """Load each format in a new process, and train."""
    folder = pathlib.Path(folder)
    model = keras.models.load_model(folder / "model.keras")
    runs = {InOptimizer: InOptimizer(model), InLoop: InLoop()}
    for name, (kind, _, load) in FORMATS.items():
        load(runs[kind], folder)
        np.savez(folder / f"{name}.npz", *train(runs[kind], range(N, 2 * N)))
    (folder / "digest").write_text(fit_and_digest())


def fit_and_digest():
    """Return a hash of all bits of a model and its optimizer after `fit`."""
    keras.utils.set_random_seed(0)
    layers = keras.layers.Dense(300), keras.layers.Dense(2)
    model = keras.Sequential([keras.Input((50,)), *layers])
    clippers = [QuantileClip(0.75, history_length=8, scope=s) for s in SCOPES[:2]]
    optimizer = SGD(0.01, momentum=0.9, gradient_transformers=clippers)
    model.compile(optimizer, loss="mse", run_eagerly=True)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(64, 50)), rng.normal(size=(64, 2))
    model.fit(x, y, batch_size=8, epochs=2, verbose=0)
    bits = sha256()
    for variable in (*model.variables, *model.optimizer.variables):
        bits.update(variable.numpy().tobytes())
    return bits.hexdigest()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Return the results of the uninterrupted and the resumed run of each format.

    The last entry holds a hash of another run in both processes.
    """
    folder, uninterrupted = tmp_path_factory.mktemp("resume"), {}
    for kind in (InOptimizer, InLoop):
        run = kind()
        train(run, range(N))
        for kind_of_format, save, _ in FORMATS.values():
            if kind_of_format is kind:
                save(run, folder)
        uninterrupted[kind] = train(run, range(N, 2 * N))
        check_metrics(run.clippers)
    code = f"import sys; from {__name__} import resume; resume(sys.argv[1])"
    root = pathlib.Path(__file__).parents[2]
    # The new process orders sets of strings in another way.
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    command = [sys.executable, "-c", code, folder]
    subprocess.run(command, cwd=root, env=environment, check=True)
    results = {}
    for name, (kind, _, _) in FORMATS.items():
        with np.load(folder / f"{name}.npz") as file:
            results[name] = uninterrupted[kind], list(file.values())
    return results | {"digest": (fit_and_digest(), (folder / "digest").read_text())}


@pytest.mark.parametrize("form", FORMATS)
def test_all_clippers_resume_in_a_new_process_bit_for_bit(outcomes, form):
    uninterrupted, resumed = outcomes[form]
    clippers = IN_LOOP if "loop" in form else RUNS
    assert len(uninterrupted) == len(resumed) > 5 * len(clippers)
    for one, other in zip(uninterrupted, resumed, strict=True):
        np.testing.assert_array_equal(one, other, strict=True)


def test_the_same_seed_gives_the_same_bits_in_another_process(outcomes):
    one, other = outcomes["digest"]
    assert one == other


# Files that are broken or do not fit.


def trained(clip):
    """Return a small model after three steps with this clipper."""
    model = network()
    optimizer = SGD(0.02, momentum=0.9, gradient_transformers=[clip])
    model.compile(optimizer, loss="mse", run_eagerly=True)
    optimizer.build(model.trainable_variables)
    for step in range(3):
        optimizer.apply(noise(step), model.trainable_variables)
    return model


def values_of_optimizer(model):
    return [variable.numpy() for variable in model.optimizer.variables]


OTHERS = {
    "another history": lambda: QuantileClip(0.5, history_length=6),
    "another scope": lambda: QuantileClip(0.5, history_length=5, scope="global"),
    "another policy": lambda: Clipper(Warmup(Fixed(1.0), steps=3)),
}


@pytest.mark.parametrize("other", OTHERS)
def test_weights_of_other_clippers_are_refused_and_change_no_history(other, tmp_path):
    path = tmp_path / "model.weights.h5"
    trained(QuantileClip(0.5, history_length=5)).save_weights(path)
    model = trained(OTHERS[other]())
    before = values_of_optimizer(model)
    if other == "another policy":  # its variables differ, so Keras loads none of them
        with pytest.warns(UserWarning, match="Skipping variable loading for optimizer"):
            model.load_weights(path)
    else:
        with pytest.raises(
            ValueError, match=r"shape \(.* in the file and \(.*; make the clippers"
        ):
            model.load_weights(path)
    for value, expected in zip(values_of_optimizer(model), before, strict=True):
        np.testing.assert_array_equal(value, expected)


BROKEN = {
    "empty": lambda content: b"",
    "the first half": lambda content: content[: len(content) // 2],
    "95 percent": lambda content: content[: int(0.95 * len(content))],
    "another format": lambda content: b"epoch,loss\n1,0.5\n",
}
"""Contents of a broken file, as functions of the correct content."""
FILES = {
    "model.weights.h5": "weights",
    "InOptimizer.index": "checkpoint",
    "InOptimizer.data-00000-of-00001": "checkpoint",
}
every_broken = pytest.mark.parametrize("broken", BROKEN)


@every_broken
@pytest.mark.parametrize("name", FILES)
def test_a_broken_file_is_refused_and_changes_nothing(name, broken, tmp_path):
    run = InOptimizer(trained(QuantileClip(0.5, history_length=5)))
    _, save, load = FORMATS[FILES[name]]
    save(run, tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(BROKEN[broken](content))
    before = train(run, [3])
    with pytest.raises((OSError, ValueError, IndexError, tf.errors.OpError)):
        load(run, tmp_path)
    for one, other in zip(train(run, []), before, strict=True):
        np.testing.assert_array_equal(one, other)


@every_broken
def test_a_broken_model_file_is_refused(broken, tmp_path):
    path = tmp_path / "model.keras"
    trained(QuantileClip(0.5, history_length=5)).save(path)
    path.write_bytes(BROKEN[broken](path.read_bytes()))
    with pytest.raises(ValueError, match=r"ensure the file is an accessible `\.keras`"):
        keras.models.load_model(path)


STATES = pathlib.Path(__file__).parents[1] / "support" / "states"
NORMS = [step * 7 % 11 + 1 for step in range(1, 13)]
POLICIES = [
    MeanStd(2.0, history_length=8),
    ZScore(2.5, warmup_steps=5),
    EmaRatio(2.0, warmup_steps=5),
    StreamingQuantile(0.75),
    Warmup(Quantile(0.75, history_length=8), steps=5),
]
"""The policies of clippers with `dry_run`, which precede one that clips in the file."""


def write_saved_state():
    """Write the file, as it was done when this layout of the state was new."""
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
    clip = QuantileClip(quantile=0.75, history_length=8)
    train_on_norms(
        model, [*(Clipper(policy, dry_run=True) for policy in POLICIES), clip]
    )
    model.save(STATES / "keras-1.keras")


def train_on_norms(model, clippers):
    """Train the model on gradients of these norms; the learning rate is 0."""
    model.compile(SGD(0.0, gradient_transformers=clippers), loss="mse")
    model.optimizer.build(model.trainable_variables)
    for norm in NORMS:
        gradient = tf.constant([[float(norm)]])
        model.optimizer.apply([gradient], model.trainable_variables)


def test_a_model_that_an_earlier_version_saved_can_be_loaded():
    model = keras.models.load_model(STATES / "keras-1.keras")
    *others, clip = model.optimizer.gradient_transformers
    assert [other.policy for other in others] == POLICIES
    new = [Clipper(policy, dry_run=True) for policy in POLICIES]
    train_on_norms(keras.models.clone_model(model), new)
    for other, expected in zip(others, new, strict=True):
        pairs = zip(other._state.variables, expected._state.variables, strict=True)
        for variable, wanted in pairs:
            assert variable.dtype == wanted.dtype
            np.testing.assert_allclose(variable, wanted, rtol=1e-6)
    assert clip.metrics()["clip/steps"] == len(NORMS)
    # The version that saved the file counted no dropped steps.
    assert [c.metrics()["clip/dropped_total"] for c in (*others, clip)] == [0] * 6
    model.optimizer.apply([tf.constant([[99.0]])], model.trainable_variables)
    expected = np.quantile(NORMS[-8:], 0.75)
    assert clip.decision.threshold[0] == pytest.approx(expected, rel=1e-6)
    assert clip.decision.scale[0] == pytest.approx(expected / 99, rel=1e-6)


DROPPING = [
    Drop(MeanStd(1.0, history_length=8), clip=Quantile(0.5, history_length=4)),
    Cap(Drop(StreamingQuantile(0.5)), max_norm=2.0),
]


def write_saved_drops():
    """Write the second file, as it was done when dropped steps were first counted."""
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
    train_on_norms(model, [Clipper(policy, dry_run=True) for policy in DROPPING])
    model.save(STATES / "keras-2.keras")


def test_a_model_that_counts_dropped_steps_can_be_loaded():
    model = keras.models.load_model(STATES / "keras-2.keras")
    loaded = model.optimizer.gradient_transformers
    assert [clip.policy for clip in loaded] == DROPPING
    fresh = [Clipper(policy, dry_run=True) for policy in DROPPING]
    train_on_norms(keras.models.clone_model(model), fresh)
    for clip, expected in zip(loaded, fresh, strict=True):
        for variable, wanted in zip(
            clip._state.variables, expected._state.variables, strict=True
        ):
            np.testing.assert_allclose(variable, wanted, rtol=1e-6)
        assert clip.metrics()["clip/dropped_total"] > 0
        clip.check_state()


def test_a_checkpoint_of_an_earlier_version_restores_each_clipper(tmp_path):
    """`tf.train.Checkpoint` finds a variable by its place: later ones are the last."""
    optimizers = []
    for _ in range(2):
        weight = keras.Variable([0.0])
        clips = [Clipper(policy, dry_run=True) for policy in DROPPING]
        optimizers.append(SGD(0.1, gradient_transformers=clips))
        optimizers[-1].build([weight])
    saved, loaded = optimizers
    for norm in NORMS:
        saved.apply([tf.constant([float(norm)])])
    count = len(LATER) * len(DROPPING)
    numbers = ["", *(f"_{number}" for number in range(1, len(DROPPING)))]
    later = [name + number for number in numbers for name in LATER]
    assert [variable.name for variable in saved.variables[-count:]] == later
    earlier = tf.Module()
    earlier._variables = [variable.value for variable in saved.variables[:-count]]
    path = tf.train.Checkpoint(optimizer=earlier).save(tmp_path / "earlier")
    tf.train.Checkpoint(optimizer=loaded).restore(path)
    pairs = zip(saved.gradient_transformers, loaded.gradient_transformers, strict=True)
    for old, new in pairs:
        expected, clip = old._read_numpy(), new._read_numpy()
        assert clip.tally.dropped == 0
        assert not clip.decision.dropped.any()
        assert clip.tally.steps == len(NORMS)
        leaves = zip(*map(tf.nest.flatten, (clip.policy, expected.policy)), strict=True)
        for leaf, other in leaves:
            np.testing.assert_array_equal(leaf, other)
