"""Another clip in front of the clipper is noticed by its metrics."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

from autoclip_core import ClipLog, Fixed
from autoclip_core.clipper.metrics_checks import find_repeated_limit
from autoclip_tf import (
    AGC,
    Clipper,
    NormClip,
    QuantileClip,
    TrustClip,
    UpdateClipper,
    optimizers,
)
from autoclip_tf.callbacks import ClipLogger

LIMIT = 0.25


class Trainer(keras.Model):
    """A model that clips in `train_step`, before the clipper of its optimizer."""

    def __init__(self, front):
        super().__init__()
        self.front, self.layer = front, keras.layers.Dense(1)

    def call(self, x):
        return self.layer(x)

    def train_step(self, data):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum((self(data[0]) - data[1]) ** 2)
        variables = self.trainable_variables
        gradients = self.front(tape.gradient(loss, variables))
        self.optimizer.apply_gradients(zip(gradients, variables, strict=True))
        return {"loss": loss}


def clip_by_global_norm(gradients):
    return tf.clip_by_global_norm(gradients, LIMIT)[0]


def change_nothing(gradients):
    return gradients


def fit(clip, front, epochs=10):
    """Return the texts of the warnings in a `fit` that logs each epoch."""
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 3)), rng.normal(size=(8, 1))
    model = Trainer(front)
    clips = clip if isinstance(clip, list) else [clip]
    model.compile(optimizers.SGD(1e-3, gradient_transformers=clips))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        logger = ClipLogger()
        model.fit(x, y, batch_size=4, epochs=epochs, verbose=0, callbacks=[logger])
    return [str(each.message) for each in caught]


@pytest.mark.parametrize(
    "clip", [QuantileClip(0.9, scope="global"), AGC(1e9), TrustClip()], ids=repr
)
def test_another_clip_in_front_warns_once(clip):
    [text] = fit(clip, clip_by_global_norm)
    assert "norms of 0.25 again and again" in text
    assert "leave the other out, such as" in text


@pytest.mark.parametrize(
    ("clip", "front"),
    [
        (QuantileClip(0.9, scope="global"), change_nothing),
        (NormClip(1e-9), change_nothing),  # normalizes on purpose
        (NormClip(1.0, dry_run=True), clip_by_global_norm),
        (UpdateClipper(Fixed(1.0)), clip_by_global_norm),
    ],
    ids=["no clip", "a normalizer", "a dry run", "updates"],
)
def test_other_norms_are_silent(clip, front):
    assert fit(clip, front) == []


def chain_pairs(front, behind, pairs):
    return behind(front(pairs))


def chain_gradients(front, behind, pairs):
    return behind([(gradient * 1.0, variable) for gradient, variable in front(pairs)])


def call_front(front, behind, pairs):
    return front(pairs)


def call_none(front, behind, pairs):
    return pairs


@pytest.mark.parametrize(
    ("call", "inside_count"),
    [(chain_pairs, 0), (chain_gradients, 0), (call_front, 1), (call_none, 2)],
)
@pytest.mark.parametrize("is_legacy", [False, True])
def test_a_clipper_behind_another_of_ours_is_silent(call, inside_count, is_legacy):
    """A warning is an error in these tests."""
    library = pytest.importorskip("tf_keras") if is_legacy else keras
    library.utils.set_random_seed(0)
    front, behind = NormClip(LIMIT), AGC(0.05)
    inside, log = [front, behind][2 - inside_count :], ClipLog()
    model = library.Sequential([library.Input((3,)), library.layers.Dense(1)])
    sgd = library.optimizers.legacy.SGD if is_legacy else optimizers.SGD
    optimizer = sgd(1e-3, gradient_transformers=inside)
    variables = model.trainable_variables
    for _ in range(20):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum((model(tf.random.normal((4, 3))) - 9.0) ** 2)
        pairs = zip(tape.gradient(loss, variables), variables, strict=True)
        optimizer.apply_gradients(call(front, behind, list(pairs)))
        log.record(behind.metrics())
    assert front.metrics()["clip/clip_rate"] == 1.0
    assert find_repeated_limit(log.norms.tolist()) == LIMIT
    assert "Red light" not in " ".join(log.summary().advice)


def test_a_clipper_behind_one_that_changes_nothing_warns():
    for clips in ([NormClip(1.0, dry_run=True), AGC(1e9)], [AGC(1e9), NormClip(1.0)]):
        [text] = fit(clips, clip_by_global_norm)
        assert "norms of 0.25 again and again" in text
        others = [clip.metrics().get("clip/other_clippers") for clip in clips]
        assert others == ([None, None] if clips[0].dry_run else [None, 1.0])


@pytest.mark.parametrize("value", [LIMIT, 0.37])
def test_a_gradient_that_never_changes_is_silent(value):
    """A warning is an error in these tests."""
    weight, clip = keras.Variable([0.0]), Clipper(Fixed(1.0))
    for _ in range(10):
        list(clip([(tf.constant([value]), weight)]))
        clip.metrics()
        clip.metrics()
