"""The same clippers in tf_keras: its legacy optimizers, and the newer ones."""

import numpy as np
import pytest
import tensorflow as tf

from autoclip_tf import QuantileClip, with_gradient_transformers

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


def go_on(model, epochs=1, **keywords):
    x, y = data()
    settings = {"batch_size": 8, "epochs": epochs, "shuffle": False, "verbose": 0}
    return model.fit(x, y, **settings, **keywords).history


def compiled(optimizer, mode):
    model = network()
    model.compile(optimizer, loss="mse", **MODES[mode])
    return model


def clipper():
    return QuantileClip(quantile=0.5, history_length=10, scope="global")


@pytest.mark.parametrize("mode", MODES)
def test_legacy_and_newer_optimizers_measure_the_same_norms(mode):
    seen = {}
    for kind, made in KINDS.items():
        clip = clipper()
        model = compiled(made(clip), mode)
        history = go_on(model, 3)
        assert clip.metrics()["clip/steps"] == 12
        seen[kind] = clip.decision, history["loss"]
    (one, losses), (other, other_losses) = seen.values()
    np.testing.assert_allclose(one.norm, other.norm, rtol=1e-3)
    np.testing.assert_allclose(one.threshold, other.threshold, rtol=1e-3)
    np.testing.assert_allclose(losses, other_losses, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_with_the_clipper_resumes_bit_for_bit(kind, tmp_path):
    clip, other = clipper(), clipper()
    model = compiled(KINDS[kind](clip), "eager")
    go_on(model, 2)
    saved = tf.train.Checkpoint(model=model, optimizer=model.optimizer, clipper=clip)
    path = saved.save(tmp_path / "state")
    again = compiled(KINDS[kind](other), "eager")
    loaded = tf.train.Checkpoint(model=again, optimizer=again.optimizer, clipper=other)
    status = loaded.restore(path)
    assert go_on(model)["loss"] == go_on(again)["loss"]
    status.assert_existing_objects_matched()
    assert clip.metrics() == other.metrics()
    assert clip.metrics()["clip/steps"] == 12


def test_a_saved_model_of_a_newer_optimizer_resumes_bit_for_bit(tmp_path):
    clip = clipper()
    model = compiled(KINDS["newer"](clip), "graph")
    go_on(model, 2)
    model.save(tmp_path / "model.keras")
    again = tf_keras.models.load_model(tmp_path / "model.keras")
    [other] = again.optimizer.gradient_transformers
    assert other.get_config() == clip.get_config()
    assert go_on(model)["loss"] == go_on(again)["loss"]
    assert clip.metrics() == other.metrics()


def test_a_tf_keras_callback_logs_the_metrics():
    clip = clipper()
    model = compiled(KINDS["legacy"](clip), "eager")
    log = tf_keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: logs.update(clip.metrics())
    )
    history = go_on(model, 2, callbacks=[log])
    assert history["clip/steps"] == [4, 8]
    assert history["clip/norm"][-1] == clip.metrics()["clip/norm"]


def test_a_legacy_class_needs_no_wrapper():
    with pytest.raises(ValueError, match=r"legacy\.Adam; pass them to it"):
        with_gradient_transformers(legacy.Adam)
    with pytest.raises(ValueError, match="deprecated in the new TF-Keras optimizer"):
        tf_keras.optimizers.Adam(gradient_transformers=[clipper()])
