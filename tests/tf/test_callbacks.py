"""`ClipLogger` adds metrics to the logs of `fit`, and `clippers_of` finds clippers."""

import csv
import json
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

from autoclip_core import ParamRatio, read_norms
from autoclip_tf import NormClip, QuantileClip, TrustClip, UpdateClipper, clippers_of
from autoclip_tf.callbacks import NAMES, UPDATE_NAMES, ClipLogger
from autoclip_tf.optimizers import SGD


def fit(optimizer, callbacks, epochs=3):
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(32, 4)).astype("float32")
    model = make_model()
    model.compile(optimizer, loss="mse", run_eagerly=True, jit_compile=False)
    y = x.sum(1, keepdims=True)
    settings = {"batch_size": 8, "epochs": epochs, "verbose": 0, "shuffle": False}
    return model.fit(x, y, callbacks=callbacks, **settings).history


class MetricsRecorder(keras.callbacks.Callback):
    """Record the clipper's metrics at the end of each epoch."""

    def on_train_begin(self, logs=None):
        self.recorded = []

    def on_epoch_end(self, epoch, logs=None):
        [clip] = clippers_of(self.model.optimizer)
        self.recorded.append(clip.metrics())


def test_the_history_holds_the_metrics_of_each_epoch(tmp_path):
    file, recorder = tmp_path / "log.csv", MetricsRecorder()
    callbacks = [ClipLogger(), recorder, keras.callbacks.CSVLogger(file)]
    optimizer = SGD(0.01, gradient_transformers=[QuantileClip(0.5, scope="global")])
    history = fit(optimizer, callbacks)
    assert set(history) == {"loss", *NAMES}
    for name in NAMES:
        assert history[name] == [metrics[name] for metrics in recorder.recorded]
    assert [metrics["clip/steps"] for metrics in recorder.recorded] == [4, 8, 12]
    with file.open() as lines:
        rows = list(csv.DictReader(lines))
    assert [float(row["clip/norm"]) for row in rows] == history["clip/norm"]
    (tmp_path / "history.json").write_text(json.dumps(history))
    for path in (file, tmp_path / "history.json"):
        assert read_norms(path).norms.tolist() == history["clip/norm"]


def test_the_metrics_of_several_clippers_are_numbered():
    clips = [NormClip(2.0, dry_run=True), TrustClip(quantile=0.5)]
    history = fit(SGD(0.01, gradient_transformers=clips), [ClipLogger()])
    assert history["clip/0/threshold"] == [2.0] * 3
    assert {f"clip/1/{name[5:]}" for name in NAMES} <= set(history)
    assert {name for name in history if "update" in name} == set(UPDATE_NAMES)
    assert history["clip/update_norm"][-1] == clips[1].metrics()["clip/update_norm"]


def test_tensorboard_receives_the_metrics(tmp_path):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    board = keras.callbacks.TensorBoard(tmp_path, write_graph=False)
    optimizer = SGD(0.01, gradient_transformers=[NormClip(2.0)])
    history = fit(optimizer, [ClipLogger(), board])
    events = event_accumulator.EventAccumulator(str(tmp_path / "train"))
    events.Reload()
    name = "epoch_clip/norm"
    assert name in events.Tags()["tensors"]
    values = [float(tf.make_ndarray(e.tensor_proto)) for e in events.Tensors(name)]
    assert values == pytest.approx(history["clip/norm"])
    read = read_norms(tmp_path)
    assert (read.column, read.norms.tolist()) == (name, values)


def test_a_clipper_inside_a_loss_scale_optimizer_is_logged():
    clips = [NormClip(1e9), NormClip(1.0)]
    inner = SGD(0.01, gradient_transformers=clips)
    loggers = [ClipLogger(), ClipLogger(clips[1])]
    history = fit(keras.optimizers.LossScaleOptimizer(inner), loggers)
    assert history["clip/0/threshold"] == [1e9] * 3
    assert history["clip/threshold"] == history["clip/1/threshold"] == [1.0] * 3


def test_a_model_without_a_clipper_is_an_error():
    with pytest.raises(
        ValueError, match="ClipLogger needs a model with a clipper, got"
    ):
        fit(SGD(0.01), [ClipLogger()])


@pytest.mark.parametrize(
    ("clippers", "error", "message"),
    [
        ([], ValueError, "clippers must be at least one"),
        (SGD(0.01), TypeError, "clippers must be a clipper of autoclip_tf, or a list"),
        ([NormClip(1.0), "quantile"], TypeError, "clippers must be a clipper"),
    ],
)
def test_what_is_no_clipper_is_refused(clippers, error, message):
    with pytest.raises(error, match=message):
        ClipLogger(clippers)


class Gan(keras.Model):
    """Two networks with an optimizer each; Keras's own optimizer is not used."""

    def __init__(self):
        super().__init__()
        self.generator = keras.layers.Dense(4)
        self.critic = keras.layers.Dense(1)

    def compile(self, clippers):
        super().compile(run_eagerly=True)
        self.both = {
            name: SGD(0.01, gradient_transformers=[clipper])
            for name, clipper in clippers.items()
        }

    def train_step(self, real):
        fake = self.generator(real)
        for name, sign in (("critic", 1.0), ("generator", -1.0)):
            network = getattr(self, name)
            with tf.GradientTape() as tape:
                fake = self.generator(real)
                loss = sign * tf.reduce_mean(self.critic(fake) - self.critic(real))
            variables = network.trainable_variables
            self.both[name].apply(tape.gradient(loss, variables), variables)
        return {"loss": loss}


def test_the_clippers_of_a_gan_are_logged():
    keras.utils.set_random_seed(0)
    model, x = Gan(), np.random.default_rng(0).normal(size=(8, 4))
    clippers = {"critic": NormClip(3.0), "generator": NormClip(2.0)}
    model.compile(clippers)
    assert type(model.optimizer).__name__ == "RMSprop"
    settings = {"epochs": 2, "batch_size": 4, "verbose": 0}
    history = model.fit(x, callbacks=[ClipLogger()], **settings).history
    for number, (clipper, limit) in enumerate(
        zip(clippers.values(), (3.0, 2.0), strict=True)
    ):
        assert clippers_of(model)[number] is clipper
        assert history[f"clip/{number}/threshold"] == [limit] * 2
        metrics = clipper.metrics()
        assert metrics["clip/steps"] == 4
        assert history[f"clip/{number}/norm"][-1] == metrics["clip/norm"] > 0


def make_model():
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])


class StepsByVariable(keras.Model):
    """Its `train_step` calls the rule of the optimizer for each variable."""

    def __init__(self):
        super().__init__()
        self.weight = self.add_weight(shape=(1,))

    def train_step(self, data):
        self.optimizer.update_step(tf.constant([1.0]), self.weight, tf.constant(0.1))
        return {"loss": 0.0}


class CompileAgain(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 1:
            self.model.compile(keras.optimizers.SGD(0.01), run_eagerly=True, loss="mse")
            self.model.make_train_function(force=True)


@pytest.mark.parametrize(
    ("make", "callbacks", "steps"),
    [
        (StepsByVariable, [], [0, 0]),  # tensorflow#45146
        (make_model, [CompileAgain()], [2]),  # keras#13368
        (make_model, [], []),
    ],
)
@pytest.mark.parametrize("clip", [NormClip(1.0), TrustClip()])
def test_an_epoch_without_a_clipped_step_is_a_warning(make, callbacks, steps, clip):
    clip = type(clip).from_config(clip.get_config())
    model = make()
    optimizer = SGD(0.01, gradient_transformers=[clip])
    model.compile(optimizer, run_eagerly=True, loss="mse")
    optimizer.build(model.trainable_variables)
    settings = {"batch_size": 2, "epochs": 2, "verbose": 0}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(
            np.ones((4, 4)),
            np.ones((4, 1)),
            callbacks=[*callbacks, ClipLogger()],
            **settings,
        )
    texts = [str(w.message) for w in caught if "took no step" in str(w.message)]
    assert len(texts) == len(steps)
    for text, count in zip(texts, steps, strict=True):
        assert text.startswith(f"{type(clip).__name__} took no step")
        assert f"after {count} steps" in text


def test_the_warning_names_a_loss_scale_that_skips_every_update():
    inner = SGD(0.01, gradient_transformers=[TrustClip()])
    optimizer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=np.inf)
    with pytest.warns(RuntimeWarning, match="does a loss scale skip every update"):
        fit(optimizer, [ClipLogger()], epochs=1)


def bound():
    return UpdateClipper(ParamRatio(0.01, eps=0.2), norm="rms")


@pytest.mark.parametrize(
    ("make", "wrap"),
    [
        (lambda: [QuantileClip(0.5), bound()], keras.optimizers.LossScaleOptimizer),
        (lambda: [TrustClip(quantile=0.5)], lambda optimizer: optimizer),
    ],
)
def test_the_clippers_of_a_loaded_model_are_found(make, wrap, tmp_path):
    clips = make()
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(
        wrap(SGD(0.01, gradient_transformers=clips)), run_eagerly=True, loss="mse"
    )
    model.fit(np.ones((4, 2)), np.ones((4, 1)), verbose=0)
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    for place, expected in ((model, clips), (model.optimizer, clips)):
        assert all(a is b for a, b in zip(clippers_of(place), expected, strict=True))
    restored = clippers_of(loaded)
    assert [type(each) for each in restored] == [type(each) for each in clips]
    assert [each.metrics() for each in restored] == [each.metrics() for each in clips]


def test_clippers_in_attributes_are_found_once():
    clip, inner = NormClip(1.0), keras.Sequential([keras.Input((2,))])
    inner.compile(SGD(0.01, gradient_transformers=[NormClip(2.0)]))
    outer = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    outer.parts, outer.myself = [inner, inner], outer
    outer.compile(SGD(0.01))
    assert [each.policy.max_norm for each in clippers_of(outer)] == [2.0]
    outer.clip = clip
    assert clippers_of(outer) == [clip]
    assert clippers_of(SGD(0.01)) == []


def test_the_clipper_of_a_compiled_part_is_not_that_of_the_model():
    """A classic GAN trains its critic alone, and the generator through the critic."""
    part = make_model()
    whole = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4), part])
    data = np.ones((4, 4)), np.ones((4, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for model, clip in ((part, TrustClip()), (whole, TrustClip())):
            optimizer = clip.as_optimizer(keras.optimizers.SGD(0.01))
            model.compile(optimizer, run_eagerly=True, loss="mse")
            history = model.fit(*data, verbose=0, callbacks=[ClipLogger()]).history
            assert clippers_of(model) == [clip]
            assert {"clip/norm", "clip/update_norm"} <= set(history)


def test_a_model_of_a_loop_of_its_own_needs_its_optimizer():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    logger = ClipLogger()
    logger.set_model(model)
    for find in (lambda: clippers_of(model), logger.on_train_begin):
        with pytest.raises(
            ValueError, match=r"got <Sequential .*; write clippers_of\(optimizer\)"
        ):
            find()
    model.optimizer_of_loop = NormClip(2.0).as_optimizer(keras.optimizers.SGD(0.1))
    assert [clip.policy.max_norm for clip in clippers_of(model)] == [2.0]
    given = ClipLogger(clippers_of(model.optimizer_of_loop))
    plain = keras.Sequential([keras.Input((2,))])
    given.set_model(plain)
    given.on_train_begin()
    plain.compile(SGD(0.01))
    assert clippers_of(plain) == []


@pytest.mark.parametrize("value", [None, 3, NormClip(1.0), "adam", SGD])
def test_clippers_of_anything_else_are_refused(value):
    with pytest.raises(
        TypeError, match="model_or_optimizer must be a Keras model or opt"
    ):
        clippers_of(value)


@pytest.mark.parametrize("order", [1, -1])
def test_a_trust_clip_beside_a_clipper_of_gradients_is_refused(order):
    clips = [QuantileClip(0.9), TrustClip()][::order]
    with pytest.raises(
        ValueError, match=r"got QuantileClip\(quantile=0.9.* clipped twice"
    ):
        SGD(0.01, gradient_transformers=clips)
    with pytest.raises(ValueError, match="would be clipped twice"):
        TrustClip().as_optimizer(NormClip(1.0).as_optimizer(keras.optimizers.SGD(0.1)))
