"""The same clippers in tf_keras: its legacy optimizers, and the newer ones."""

import numpy as np
import pytest
import tensorflow as tf

from autoclip_tf import QuantileClip, clippers_of, with_gradient_transformers
from autoclip_tf.callbacks import NAMES, ClipLogger

tf_keras = pytest.importorskip("tf_keras")
legacy = tf_keras.optimizers.legacy
MODES = {
    "graph": {},
    "xla": {"jit_compile": True},
    "eager": {"run_eagerly": True},
}
KINDS = {
    "legacy": lambda clip: legacy.Adam(0.01, gradient_transformers=[clip]),
    "newer": lambda clip: with_gradient_transformers(tf_keras.optimizers.Adam)(
        0.01, gradient_transformers=[clip]
    ),
}


def data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(32, 4)).astype("float32")
    ids = rng.integers(0, 6, size=(32, 2))
    return [x, ids], 3 * x.sum(1, keepdims=True)


def network():
    tf_keras.utils.set_random_seed(0)
    x, ids = tf_keras.Input((4,)), tf_keras.Input((2,), dtype="int32")
    words = tf_keras.layers.Flatten()(tf_keras.layers.Embedding(6, 3)(ids))
    joined = tf_keras.layers.Concatenate()([x, words])
    hidden = tf_keras.layers.Dense(5, activation="tanh")(joined)
    return tf_keras.Model([x, ids], tf_keras.layers.Dense(1)(hidden))


def fit(model, epochs=1, **keywords):
    x, y = data()
    settings = {"batch_size": 8, "epochs": epochs, "shuffle": False, "verbose": 0}
    return model.fit(x, y, **settings, **keywords).history


def compiled(optimizer, mode):
    model = network()
    model.compile(optimizer, loss="mse", **MODES[mode])
    return model


def make_clipper():
    return QuantileClip(quantile=0.5, history_length=10, scope="global")


@pytest.mark.parametrize("mode", ["xla", "eager"])  # other tests run in a graph
def test_legacy_and_newer_optimizers_measure_the_same_norms(mode):
    results = {}
    for kind, make_optimizer in KINDS.items():
        clip = make_clipper()
        model = compiled(make_optimizer(clip), mode)
        history = fit(model, 3)
        assert clip.metrics()["clip/steps"] == 12
        results[kind] = clip.decision, history["loss"]
    (old, old_losses), (new, new_losses) = results.values()
    np.testing.assert_allclose(old.norm, new.norm, rtol=1e-3)
    np.testing.assert_allclose(old.threshold, new.threshold, rtol=1e-3)
    np.testing.assert_allclose(old_losses, new_losses, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_with_the_clipper_resumes_bit_for_bit(kind, tmp_path):
    clip, other = make_clipper(), make_clipper()
    model = compiled(KINDS[kind](clip), "eager")
    fit(model, 2)
    saved = tf.train.Checkpoint(model=model, optimizer=model.optimizer, clipper=clip)
    path = saved.save(tmp_path / "state")
    restored = compiled(KINDS[kind](other), "eager")
    loaded = tf.train.Checkpoint(
        model=restored, optimizer=restored.optimizer, clipper=other
    )
    status = loaded.restore(path)
    assert fit(model)["loss"] == fit(restored)["loss"]
    status.assert_existing_objects_matched()
    assert clip.metrics() == other.metrics()
    assert clip.metrics()["clip/steps"] == 12


def test_a_saved_model_of_a_newer_optimizer_resumes_bit_for_bit(tmp_path):
    clip = make_clipper()
    model = compiled(KINDS["newer"](clip), "graph")
    fit(model, 2)
    model.save(tmp_path / "model.keras")
    restored = tf_keras.models.load_model(tmp_path / "model.keras")
    [other] = restored.optimizer.gradient_transformers
    assert other.get_config() == clip.get_config()
    assert fit(model)["loss"] == fit(restored)["loss"]
    assert clip.metrics() == other.metrics()


@pytest.mark.parametrize("kind", KINDS)
def test_the_logger_of_keras_works_in_tf_keras(kind):
    clip = make_clipper()
    model = compiled(KINDS[kind](clip), "eager")
    assert clippers_of(model) == clippers_of(model.optimizer) == [clip]
    history = fit(model, 2, callbacks=[ClipLogger(), tf_keras.callbacks.History()])
    assert set(history) == {"loss", *NAMES}
    assert len(history["clip/norm"]) == 2
    assert clip.metrics()["clip/steps"] == 8
    assert history["clip/norm"][-1] == clip.metrics()["clip/norm"]
    with pytest.raises(ValueError, match="ClipLogger needs a model with a clipper"):
        fit(compiled("sgd", "eager"), callbacks=[ClipLogger()])


def test_a_legacy_class_needs_no_wrapper():
    with pytest.raises(ValueError, match=r"legacy\.Adam; pass the clipper directly"):
        with_gradient_transformers(legacy.Adam)
    with pytest.raises(ValueError, match="deprecated in the new TF-Keras optimizer"):
        tf_keras.optimizers.Adam(gradient_transformers=[make_clipper()])
