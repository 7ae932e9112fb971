"""The metrics that `ClipLogger` adds to the logs of `fit`."""

import csv
import json

import keras
import numpy as np
import pytest
import tensorflow as tf

from autoclip_core import read_norms
from autoclip_tf import NormClip, QuantileClip, TrustClip
from autoclip_tf.callbacks import NAMES, UPDATE_NAMES, ClipLogger, clippers_of
from autoclip_tf.optimizers import SGD


def fit(optimizer, callbacks, epochs=3):
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(32, 4)).astype("float32")
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
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
    clips = [NormClip(2.0), TrustClip(quantile=0.5)]
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
    inner = SGD(0.01, gradient_transformers=[NormClip(2.0)])
    history = fit(keras.optimizers.LossScaleOptimizer(inner), [ClipLogger()])
    assert history["clip/threshold"] == [2.0] * 3


def test_an_optimizer_without_a_clipper_is_an_error():
    with pytest.raises(ValueError, match="ClipLogger needs an optimizer with a clip"):
        fit(SGD(0.01), [ClipLogger()])
