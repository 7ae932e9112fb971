"""Keras 3 optimizers with `gradient_transformers=`, in a real `fit`."""

import pickle
from functools import cache

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import autoclip_tf
from autoclip_core import ClipLog, Fixed, ParamRatio, Quantile
from autoclip_tf import (
    AGC,
    NormClip,
    QuantileClip,
    TrustClip,
    UpdateClipper,
    ValueClip,
    with_gradient_transformers,
)
from autoclip_tf.optimizers import SGD, Adam

NAMES = sorted(autoclip_tf.optimizers._all_of_keras())
MODES = {
    "graph": {"jit_compile": False},
    "xla": {"jit_compile": True},
    "eager": {"run_eagerly": True, "jit_compile": False},
}


def data(size=32):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(size, 4)).astype("float32")
    ids = rng.integers(0, 6, size=(size, 2)).astype("int32")
    return [x, ids], (3 * x.sum(1, keepdims=True) + ids[:, :1]).astype("float32")


def network():
    """Return a model with an embedding, whose gradient is sparse."""
    keras.utils.set_random_seed(0)
    x, ids = keras.Input((4,)), keras.Input((2,), dtype="int32")
    words = layers.Flatten()(layers.Embedding(6, 3)(ids))
    hidden = layers.Dense(5, activation="tanh")(layers.Concatenate()([x, words]))
    return keras.Model([x, ids], layers.Dense(1)(hidden))


def trained(optimizer, epochs=2, model=None, **compiled):
    model = model or network()
    model.compile(optimizer=optimizer, loss="mse", **compiled)
    x, y = data()
    history = model.fit(x, y, batch_size=8, epochs=epochs, shuffle=False, verbose=0)
    return model, history.history["loss"]


def weights_of(model):
    return [variable.numpy() for variable in model.trainable_variables]


def values_of(optimizer):
    return [variable.numpy() for variable in optimizer.variables]


def assert_equal(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_every_keras_optimizer_is_exported_by_its_name():
    expected = {"Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "Ftrl"}
    assert expected | {"Lion", "Nadam", "RMSprop", "SGD"} <= set(NAMES)
    for name in NAMES:
        kind = getattr(autoclip_tf.optimizers, name)
        assert kind.__name__ == name
        assert issubclass(kind, getattr(keras.optimizers, name))
        assert kind.__doc__.startswith(f"`keras.optimizers.{name}` that also accepts")
    with pytest.raises(AttributeError, match=r"has Adadelta, .*no 'Sgd'"):
        autoclip_tf.optimizers.Sgd  # noqa: B018
    with pytest.raises(ImportError):
        from autoclip_tf.optimizers import Sgd  # noqa: F401


@cache
def gradients():
    """Return the gradients of the first batch; that of the embedding is sparse."""
    model, (x, y) = network(), data()
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean((model(x) - y) ** 2)
    return tape.gradient(loss, [v.value for v in model.trainable_variables])


def stepped(optimizer):
    """Return the weights of a model after three steps with the same gradients."""
    weights = network().trainable_variables
    optimizer.build(weights)
    for _ in range(3):
        optimizer.apply(gradients(), weights)
    return [weight.numpy() for weight in weights]


@pytest.mark.parametrize("name", NAMES)
def test_a_transformer_without_effect_leaves_the_training_unchanged(name):
    kind, plain = getattr(autoclip_tf.optimizers, name), getattr(keras.optimizers, name)
    received = []

    def record(pairs):
        received.append([type(gradient) for gradient, _ in pairs])
        return pairs

    transformers = [record]
    if name not in ("Ftrl", "ScheduleFreeAdamW"):  # these keep weights in their state
        transformers.append(UpdateClipper(Fixed(1e6)))
    actual = stepped(kind(gradient_transformers=transformers))
    assert received == [[type(gradient) for gradient in gradients()]] * 3
    assert tf.IndexedSlices in received[0]
    assert_equal(actual, stepped(plain()))


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_clips_and_is_restored_from_its_configuration(name):
    kind = getattr(autoclip_tf.optimizers, name)
    clip = QuantileClip(quantile=0.5, history_length=10, scope="global")
    optimizer = kind(gradient_transformers=[clip])
    stepped(optimizer)
    assert clip.metrics()["clip/steps"] == 3
    restored = kind.from_config(optimizer.get_config())
    assert restored.gradient_transformers[0].get_config() == clip.get_config()
    saved = keras.optimizers.serialize(optimizer)
    loaded = keras.optimizers.deserialize(saved)
    assert type(loaded) is kind
    assert loaded.get_config() == optimizer.get_config()


def train_by_hand(rate, quantile, ratio, steps):
    """Train by SGD, clipped to a quantile of past norms; return weights and norms.

    The update is clipped to a ratio of the weights.
    """
    model, (x, y) = network(), data()
    past = []
    for step in range(steps):
        start = 8 * (step % 4)
        rows = slice(start, start + 8)
        with tf.GradientTape() as tape:
            error = model([part[rows] for part in x], training=True) - y[rows]
            loss = tf.reduce_mean(error**2)
        grads = tape.gradient(loss, [v.value for v in model.trainable_variables])
        full = [np.float64(tf.convert_to_tensor(g)) for g in grads]
        norm = np.sqrt(sum(np.sum(g**2) for g in full))
        limit = np.quantile(np.float32(past), quantile) if past else np.inf
        change = rate * min(1, limit / norm)
        size = np.sqrt(sum(np.sum(weight**2) for weight in weights_of(model)))
        change *= min(1, ratio * size / (change * norm))
        for variable, g in zip(model.trainable_variables, full, strict=True):
            variable.assign(variable.numpy() - change * g)
        past.append(norm)
    return weights_of(model), past


@pytest.mark.parametrize("mode", MODES)
def test_fit_equals_a_hand_written_loop(mode):
    clip = QuantileClip(quantile=0.2, history_length=100, scope="global")
    bound = UpdateClipper(ParamRatio(0.05), scope="global")
    optimizer = SGD(0.01, gradient_transformers=[clip, bound])
    model, _ = trained(optimizer, 3, **MODES[mode])
    wanted, past = train_by_hand(0.01, 0.2, 0.05, 12)
    assert 0 < bound.metrics()["clip/update_clip_rate"] < 1
    assert clip.metrics()["clip/steps"] == 12
    assert clip.metrics()["clip/clip_rate"] > 0.1
    assert clip.decision.norm[0] == pytest.approx(past[-1], rel=1e-4)
    for one, other in zip(weights_of(model), wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_units_of_a_sparse_embedding_compile_under_xla():
    clips = {mode: AGC(0.001) for mode in ("xla", "eager")}
    weights = {}
    for mode, clip in clips.items():
        model, _ = trained(SGD(gradient_transformers=[clip]), 1, **MODES[mode])
        weights[mode] = weights_of(model)
        assert clip.metrics()["clip/clip_rate"] > 0.5
    for compiled, eager in zip(weights["xla"], weights["eager"], strict=True):
        np.testing.assert_allclose(compiled, eager, rtol=1e-3, atol=1e-5)


def test_the_quick_start_runs():
    model = network()
    model.compile(
        optimizer=Adam(
            learning_rate=0.001,
            gradient_transformers=[QuantileClip(quantile=0.9, history_length=1000)],
        ),
        loss="mse",
        metrics=["mae"],
    )
    x, y = data()
    history = model.fit(x, y, epochs=1, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    with pytest.raises(ValueError, match="not recognized"):  # the error of Keras
        keras.optimizers.Adam(gradient_transformers=[])


def test_a_saved_model_resumes_bit_for_bit(tmp_path):
    clips = [TrustClip(history_length=10), QuantileClip(0.5, dry_run=True)]
    optimizer = Adam(0.01, gradient_transformers=clips, use_ema=True)
    model, _ = trained(optimizer, 2, **MODES["graph"])
    model.save(tmp_path / "saved.keras")
    resumed = keras.models.load_model(tmp_path / "saved.keras")
    x, y = data()
    for each in (model, resumed):
        each.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    assert_equal(weights_of(model), weights_of(resumed))
    assert_equal(values_of(model.optimizer), values_of(resumed.optimizer))
    metrics = resumed.optimizer.gradient_transformers[0].metrics()
    assert metrics == model.optimizer.gradient_transformers[0].metrics()
    assert metrics["clip/steps"] == metrics["clip/update_steps"] == 16


def test_weights_files_and_tensorflow_checkpoints_hold_the_history(tmp_path):
    def make_optimizer():
        update_clipper = UpdateClipper(Quantile(0.5, history_length=10))
        clips = [QuantileClip(0.5, history_length=10), update_clipper]
        return Adam(0.01, gradient_transformers=clips)

    model, _ = trained(make_optimizer(), **MODES["eager"])
    checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
    path = checkpoint.save(tmp_path / "state")
    model.save_weights(tmp_path / "state.weights.h5")
    x, y = data()
    wanted = model.fit(x, y, batch_size=8, shuffle=False, verbose=0).history["loss"]
    for kind in ("checkpoint", "weights"):
        other = network()
        other.compile(make_optimizer(), loss="mse", **MODES["eager"])
        other.optimizer.build(other.trainable_variables)
        if kind == "weights":
            other.load_weights(tmp_path / "state.weights.h5")
        else:
            saved = tf.train.Checkpoint(model=other, optimizer=other.optimizer)
            saved.restore(path).assert_existing_objects_matched()
        history = other.fit(x, y, batch_size=8, shuffle=False, verbose=0).history
        assert history["loss"] == wanted
        assert_equal(weights_of(model), weights_of(other))


@pytest.mark.parametrize("way", ["weights", "checkpoint"])
def test_the_checkpoint_of_an_optimizer_without_clipping_still_loads(way, tmp_path):
    plain, _ = trained(keras.optimizers.Adam(0.01), **MODES["eager"])
    model = network()
    clip = TrustClip()
    model.compile(Adam(0.01, gradient_transformers=[clip]), loss="mse")
    model.optimizer.build(model.trainable_variables)
    if way == "weights":
        plain.save_weights(tmp_path / "plain.weights.h5")
        model.load_weights(tmp_path / "plain.weights.h5")
    else:
        saved = tf.train.Checkpoint(model=plain, optimizer=plain.optimizer)
        path = saved.save(tmp_path / "plain")
        loaded = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
        loaded.restore(path).expect_partial()
    expected, loaded = values_of(plain.optimizer), values_of(model.optimizer)
    assert_equal(loaded[: len(expected)], expected)
    assert len(loaded) > len(expected)
    assert clip.metrics()["clip/steps"] == 0


def test_as_optimizer_copies_an_optimizer_and_adds_the_clipper():
    schedule = keras.optimizers.schedules.CosineDecay(0.01, 100)
    plain = keras.optimizers.AdamW(schedule, weight_decay=0.02, beta_1=0.8)
    clipping = QuantileClip(quantile=0.5).as_optimizer(plain)
    assert type(clipping) is autoclip_tf.optimizers.AdamW
    config = clipping.get_config()
    [saved] = config.pop("gradient_transformers")
    assert saved["class_name"] == "QuantileClip"
    assert config == plain.get_config()
    trained(clipping, 1, **MODES["eager"])
    assert clipping.gradient_transformers[0].metrics()["clip/steps"] == 4
    twice = NormClip(1.0).as_optimizer(SGD(0.1, gradient_transformers=[ValueClip(2.0)]))
    assert [type(t) for t in twice.gradient_transformers] == [ValueClip, NormClip]


class CustomSGD(keras.optimizers.SGD):
    """A custom optimizer."""


def test_a_custom_class_takes_transformers_and_is_pickled():
    kind = with_gradient_transformers(CustomSGD)
    assert kind is with_gradient_transformers(CustomSGD)
    assert with_gradient_transformers(kind) is kind
    optimizer = kind(0.01, gradient_transformers=[QuantileClip(0.5)])
    model, _ = trained(optimizer, 1, **MODES["eager"])
    copy = pickle.loads(pickle.dumps(model))
    assert type(copy.optimizer) is kind
    assert_equal(values_of(model.optimizer), values_of(copy.optimizer))
    for optimizer in (Adam(), keras.optimizers.Adam()):
        saved = keras.optimizers.serialize(optimizer)
        assert type(keras.optimizers.deserialize(saved)) is type(optimizer)


def test_accumulated_steps_are_observed_once_per_update():
    clip = TrustClip(quantile=0.5, ratio=0.4)
    optimizer = SGD(0.1, gradient_transformers=[clip], gradient_accumulation_steps=4)
    model, _ = trained(optimizer, 4, jit_compile=False)
    metrics = clip.metrics()
    assert metrics["clip/steps"] == metrics["clip/update_steps"] == 4  # 16 batches
    other = TrustClip(quantile=0.5, ratio=0.4)
    whole = network()
    optimizer = SGD(0.1, gradient_transformers=[other])
    whole.compile(optimizer, loss="mse", **MODES["eager"])
    x, y = data()
    whole.fit(x, y, batch_size=32, epochs=4, shuffle=False, verbose=0)
    assert 0 < metrics["clip/update_clip_rate"] < 1
    assert metrics == pytest.approx(other.metrics(), rel=1e-5)
    for one, two in zip(weights_of(model), weights_of(whole), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6)


def test_an_overflow_of_mixed_precision_is_not_recorded():
    clip = QuantileClip(0.5, scope="global")
    inner = SGD(0.1, gradient_transformers=[clip])
    optimizer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=4.0)
    weight = keras.Variable([1.0, 1.0])
    optimizer.build([weight])
    norms, log = [], ClipLog()
    for gradient in [[12.0, 16.0], [np.inf, 0.0], [np.nan, 1.0], [6.0, 8.0]]:
        scale = float(optimizer.dynamic_scale.numpy())
        optimizer.apply([tf.constant(gradient) * scale / 4.0], [weight])
        norms.append(float(clip.decision.norm[0]))
        log.record(clip.metrics())
    assert norms == [5.0, 5.0, 5.0, 2.5]
    assert (log.norms.tolist(), log.summary().repeated) == ([5.0, 2.5], 2)
    assert clip.metrics()["clip/steps"] == 2
    assert clip.metrics()["clip/nonfinite_total"] == 0
    assert float(optimizer.dynamic_scale.numpy()) == 1.0  # it backed off twice


@pytest.fixture
def mixed_precision():
    keras.config.set_dtype_policy("mixed_float16")
    yield
    keras.config.set_dtype_policy("float32")


@pytest.mark.filterwarnings("ignore:The model does not have any trainable weights")
@pytest.mark.filterwarnings("ignore:Skipping variable loading")  # also without clippers
@pytest.mark.parametrize("is_frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("form", ["h5", "keras"])
def test_a_model_is_loaded_without_variables_to_clip(form, is_frozen, tmp_path):
    """Keras builds the optimizer of such a model for no variables (keras#16833).

    The clippers are then built in the first step, also in a wrapped optimizer.
    """
    x, y = np.ones((4, 2)), np.zeros((4, 1))
    how = {"loss": keras.losses.MeanSquaredError(), **MODES["eager"]}
    clips = [TrustClip(), QuantileClip(0.5, exclude="*/dense*/bias", dry_run=True)]
    optimizer = Adam(0.01, gradient_transformers=clips)
    model = keras.Sequential([keras.Input((2,)), layers.Dense(1)])
    model.trainable = not is_frozen
    model.compile(keras.optimizers.LossScaleOptimizer(optimizer), **how)
    model.fit(x, y, verbose=0)
    path = tmp_path / f"model.{form}"
    model.save(path)
    loaded = keras.models.load_model(path)
    loaded.layers[-1].trainable = True
    loaded.compile(loaded.optimizer, **how)
    loaded.fit(x, y, verbose=0)
    is_kept = (form, is_frozen) == ("keras", False)
    for clip in loaded.optimizer.inner_optimizer.gradient_transformers:
        assert clip.metrics()["clip/steps"] == 1 + is_kept


@pytest.mark.usefixtures("mixed_precision")
def test_a_model_of_mixed_precision_is_fitted_and_saved(tmp_path):
    clip = QuantileClip(0.5, scope="global")
    optimizer = SGD(0.01, gradient_transformers=[clip])
    model, losses = trained(optimizer, 3, **MODES["graph"])
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert losses[-1] < losses[0]
    assert 0 < clip.metrics()["clip/steps"] <= 12
    assert np.isfinite(clip.metrics()["clip/norm"])
    model.save(tmp_path / "half.keras")
    restored = keras.models.load_model(tmp_path / "half.keras")
    [copy] = restored.optimizer.inner_optimizer.gradient_transformers
    assert copy.metrics() == clip.metrics()


def test_frozen_layers_have_no_row_and_averaged_weights_work():
    model = network()
    model.layers[-1].trainable = False
    clip = QuantileClip(0.5)
    optimizer = SGD(0.01, gradient_transformers=[clip], use_ema=True)
    trained(optimizer, 1, model, **MODES["eager"])
    assert len(clip.names) == 3
    frozen = model.layers[-1].name + "/"
    assert not any(frozen in name for name in clip.names)


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_a_variable_without_a_gradient_is_not_observed():
    weights = [keras.Variable([1.0], name="used"), keras.Variable([1.0], name="idle")]
    clip = QuantileClip(0.5)
    optimizer = SGD(1.0, gradient_transformers=[clip])
    for gradient in [2.0, 4.0]:
        optimizer.apply([tf.constant([gradient]), None], weights)
    assert np.isnan(clip.decision.norm[1])
    assert weights[0].numpy() == 1.0 - 2.0 - 2.0
    assert weights[1].numpy() == 1.0


def test_a_custom_loop_uses_the_optimizer():
    model, clip = network(), NormClip(0.5)
    optimizer, (x, y) = SGD(1.0, gradient_transformers=[clip]), data()

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
        grads = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(grads, model.trainable_variables, strict=True))

    before = weights_of(model)
    step()
    moved = [a - b for a, b in zip(weights_of(model), before, strict=True)]
    assert np.sqrt(sum(np.sum(m**2) for m in moved)) == pytest.approx(0.5, rel=1e-4)


def clip_twice_from_the_first_step_on():
    optimizer = SGD(1.0, gradient_transformers=[NormClip(0.5)])
    optimizer.global_clipnorm = 0.1
    optimizer.apply([keras.ops.ones(1)], [keras.Variable([1.0])])


WRONG = {
    "clipping twice, set later": (
        clip_twice_from_the_first_step_on,
        r"global_clipnorm must be left out.*got 0.1; put NormClip",
    ),
    "clipping twice": (
        lambda: Adam(clipnorm=1.0, gradient_transformers=[QuantileClip()]),
        r"clipnorm must be left out.*got 1.0; put NormClip\(.*scope=\"parameter\"",
    ),
    "clipping twice, in as_optimizer": (
        lambda: QuantileClip().as_optimizer(keras.optimizers.SGD(global_clipnorm=1.0)),
        "global_clipnorm must .* got 1.0; build the optimizer without "
        "global_clipnorm: QuantileClip clips",
    ),
    "clipping twice, in a config": (
        lambda: Adam.from_config(
            {"clipvalue": 2.0, "gradient_transformers": [QuantileClip()]}
        ),
        r"clipvalue must .* got 2.0; write config\[\"clipvalue\"\] = None",
    ),
    "clipping values twice": (
        lambda: Adam(clipvalue=1.0, gradient_transformers=[QuantileClip()]),
        r"clipvalue must be left out.*ValueClip",
    ),
    "a clipper alone": (
        lambda: Adam(gradient_transformers=QuantileClip()),
        r"a list.*write \[\.\.\.\]",
    ),
    "a class": (
        lambda: Adam(gradient_transformers=[QuantileClip]),
        r"a list of call.*write a",
    ),
    "a number": (
        lambda: Adam(gradient_transformers=[3]),
        r"a list of callables, got 3",
    ),
    "a wrapper": (
        lambda: with_gradient_transformers(keras.optimizers.LossScaleOptimizer),
        r"does not wrap another, got 'LossScaleOptimizer'; clip inside it",
    ),
    "a wrapper as an optimizer": (
        lambda: TrustClip().as_optimizer(keras.optimizers.LossScaleOptimizer(Adam())),
        r"^optimizer must.* wrap another.*LossScaleOptimizer\(clipper\.as_optimizer\(",
    ),
    "the arguments of PyTorch": (
        lambda: TrustClip(keras.Sequential(), Adam()),
        r"got 2 other arguments; in Keras: TrustClip\(\)\.as_optimizer\(optimizer\)",
    ),
    "an object for a class": (
        lambda: with_gradient_transformers(keras.optimizers.Adam()),
        r"as_optimizer",
    ),
    "a class for an object": (
        lambda: QuantileClip().as_optimizer(keras.optimizers.Adam),
        r"optimizer must be a Keras optimizer",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_combination_says_what_to_do(case):
    make, words = WRONG[case]
    with pytest.raises((ValueError, TypeError), match=words):
        make()


def test_one_clipper_serves_one_optimizer():
    weight = keras.Variable([1.0])
    for clip in (TrustClip(), QuantileClip()):
        SGD(0.1, gradient_transformers=[clip]).build([weight])
        other = SGD(0.1, gradient_transformers=[clip])
        words = r"one optimizer.* with type\(clipper\)\.from_config\(clipper\.get_con"
        with pytest.raises(ValueError, match=words):
            other.build([weight])
    with pytest.raises(ValueError, match="without repetition"):
        SGD(0.1, gradient_transformers=[clip, clip])
    built = keras.optimizers.SGD(0.1)
    built.build([weight])
    words = r"one that is not built yet.*from_config\(.*moments.*load_weights\(file\)"
    with pytest.raises(ValueError, match=words):
        QuantileClip().as_optimizer(built)
