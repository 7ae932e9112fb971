"""Loops of one's own with a loss scale: which of them clip scaled gradients.

keras#19479. The code that clips shows which optimizer steps.
"""

import types
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

from autoclip_tf import NormClip

SGD = keras.optimizers.SGD


def scaled(inner=None):
    return keras.optimizers.LossScaleOptimizer(inner or SGD(1.0), initial_scale=1024.0)


def pairs_of(optimizer, weight):
    with tf.GradientTape() as tape:
        loss = optimizer.scale_loss(tf.reduce_sum(weight * [3.0, 4.0]))
    return [(tape.gradient(loss, weight), weight)]


def unscale(pairs, optimizer):
    return [(gradient / optimizer.dynamic_scale, weight) for gradient, weight in pairs]


def apply_list(clip, optimizer, weight):
    gradients = [gradient for gradient, _ in clip(pairs_of(optimizer, weight))]
    optimizer.apply(gradients, [weight])


def apply_one(clip, optimizer, weight):
    [(gradient, _)] = clip(pairs_of(optimizer, weight))
    optimizer.apply_gradients([(gradient, weight)])


def apply_in_a_comprehension(clip, optimizer, weight):
    pairs = clip(pairs_of(optimizer, weight))
    [optimizer.apply([gradient], [variable]) for gradient, variable in pairs]


def apply_what_a_function_clips(clip, optimizer, weight):
    def clipped():
        return [gradient for gradient, _ in clip(pairs_of(optimizer, weight))]

    optimizer.apply(clipped(), [weight])


def apply_an_attribute(clip, optimizer, weight):
    trainer = types.SimpleNamespace(parts=types.SimpleNamespace(optimizer=optimizer))
    pairs = list(clip(pairs_of(optimizer, weight)))
    trainer.parts.optimizer.apply_gradients(pairs)


def apply_an_optimizer_whose_inner_one_is_at_hand(clip, optimizer, weight):
    inner = optimizer.inner_optimizer
    pairs = list(clip(pairs_of(optimizer, weight)))
    optimizer.apply_gradients(pairs)
    assert inner.built


def apply_stateless(clip, optimizer, weight):
    """A loop on the JAX backend is written so; on TensorFlow, Keras refuses it."""
    [(gradient, _)] = clip(pairs_of(optimizer, weight))
    state = [variable.value for variable in optimizer.variables]
    with pytest.raises(ValueError, match="not supported with the TensorFlow"):
        optimizer.stateless_apply(state, [gradient], [weight.value])


def unscale_first(clip, optimizer, weight):
    pairs = clip(unscale(pairs_of(optimizer, weight), optimizer))
    inner_gradients = [gradient for gradient, _ in pairs]
    optimizer.inner_optimizer.apply(inner_gradients, [weight])


def unscale_first_with_a_name(clip, optimizer, weight):
    inner = optimizer.inner_optimizer
    [(gradient, _)] = clip(unscale(pairs_of(optimizer, weight), optimizer))
    inner.apply([gradient], [weight])


def let_the_inner_optimizer_clip(clip, optimizer, weight):
    optimizer.apply_gradients(pairs_of(optimizer, weight))


def assign_by_hand(clip, optimizer, weight):
    [(gradient, _)] = clip([(tf.constant([3.0, 4.0]), weight)])
    weight.assign_sub(gradient)


SCALED = [
    apply_list,
    apply_one,
    apply_in_a_comprehension,
    apply_what_a_function_clips,
    apply_an_attribute,
    apply_an_optimizer_whose_inner_one_is_at_hand,
    apply_stateless,
]
UNSCALED = [
    unscale_first,
    unscale_first_with_a_name,
    let_the_inner_optimizer_clip,
    assign_by_hand,
]


def run(step, clip, optimizer, kind, is_built=True):
    """Return the texts of the warnings in three steps."""
    weight = keras.Variable([0.0, 0.0])
    if is_built:
        optimizer.build([weight])
    if not clip.built:
        clip.build([weight])

    def call():
        step(clip, optimizer, weight)

    if kind != "eager":
        call = tf.function(call, autograph=kind == "autograph")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        for _ in range(3):
            call()
    assert clip.metrics()["clip/steps"] == 3
    return [str(each.message) for each in caught]


@pytest.mark.parametrize("step", SCALED)
@pytest.mark.parametrize("kind", ["eager", "graph", "autograph"])
def test_a_step_of_the_loss_scale_optimizer_is_a_warning(step, kind):
    [text] = run(step, NormClip(1.0), scaled(), kind)
    assert "NormClip clips gradients that a LossScaleOptimizer unscales" in text


def test_an_optimizer_that_the_first_step_builds_is_a_warning():
    assert len(run(apply_list, NormClip(1.0), scaled(), "eager", is_built=False)) == 1


@pytest.mark.parametrize("step", UNSCALED)
@pytest.mark.parametrize("kind", ["eager", "graph", "autograph"])
def test_unscaled_gradients_are_no_warning(step, kind):
    clip = NormClip(1.0)
    is_inside = step is let_the_inner_optimizer_clip
    optimizer = scaled(clip.as_optimizer(SGD(1.0)) if is_inside else None)
    assert run(step, clip, optimizer, kind) == []
    if not is_inside:
        assert run(apply_list, NormClip(1.0), SGD(1.0), kind) == []


@pytest.mark.parametrize("is_built", [True, False])
@pytest.mark.parametrize("clipped", ["generator", "critic"])
def test_the_optimizer_of_the_clipped_variables_is_meant(clipped, is_built):
    """Only that of the generator scales its loss."""
    generator, critic = scaled(), SGD(1.0)
    weights = [keras.Variable([0.0, 0.0]) for _ in range(2)]
    clip = NormClip(1.0)

    def step():
        pairs = pairs_of(generator, weights[0])
        pairs.append((tf.constant([3.0, 4.0]), weights[1]))
        if clipped == "generator":
            pairs[:1] = list(clip(pairs[:1]))
        else:
            pairs[1:] = list(clip(pairs[1:]))
        generator.apply_gradients(pairs[:1])
        critic.apply_gradients(pairs[1:])

    if is_built:
        generator.build(weights[:1])
        critic.build(weights[1:])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        for _ in range(3):
            step()
    assert len(caught) == (clipped == "generator")


class Trainer(keras.Model):
    """A model whose `train_step` clips, and steps in a method."""

    def __init__(self, clip):
        super().__init__()
        self.clip, self.layer = clip, keras.layers.Dense(1)

    def call(self, x):
        return self.layer(x)

    def train_step(self, data):
        with tf.GradientTape() as tape:
            loss = self.optimizer.scale_loss(tf.reduce_mean(self(data[0]) ** 2))
        variables = self.trainable_variables
        pairs = list(zip(tape.gradient(loss, variables), variables, strict=True))
        self.take_step(pairs)
        return {"loss": loss}

    def take_step(self, pairs):
        self.apply_gradients([gradient for gradient, _ in self.clip(pairs)])

    def apply_gradients(self, gradients):
        self.optimizer.apply(gradients, self.trainable_variables)


class Unscaling(Trainer):
    def take_step(self, pairs):
        pairs = self.clip(unscale(pairs, self.optimizer))
        gradients, variables = zip(*pairs, strict=True)
        self.optimizer.inner_optimizer.apply(gradients, variables)


@pytest.mark.parametrize("model_class", [Trainer, Unscaling])
@pytest.mark.parametrize("run_eagerly", [True, False])
def test_a_train_step_may_unscale_first(model_class, run_eagerly):
    model = model_class(NormClip(1.0))
    model.compile(scaled(), run_eagerly=run_eagerly)
    model(np.ones((1, 2)))
    model.optimizer.build(model.trainable_variables)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        model.fit(np.ones((4, 2)), np.ones((4, 1)), batch_size=2, verbose=0)
    assert len(caught) == (model_class is Trainer)


def test_a_model_without_an_optimizer_is_silent():
    """It steps by hand; a warning is an error in this test."""

    class Bare(keras.Model):
        def train(self, clip, weight):
            [(gradient, _)] = clip([(tf.constant([3.0, 4.0]), weight)])
            weight.assign_sub(gradient)

    Bare().train(NormClip(1.0), keras.Variable([0.0, 0.0]))
