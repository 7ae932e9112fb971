"""Loops as people write them, around a clipper that they call by hand."""

import contextlib
import functools
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

from autoclip_core.clipper.metrics_checks import CHANGES
from autoclip_tf import AdaGC, NormClip, TrustClip

KERNEL = [3.0, 4.0]


def pairs_of(weight):
    return [(tf.constant(KERNEL), weight)]


def ignore(clip, optimizer, weight):
    """tf2-gnn#23."""
    pairs = pairs_of(weight)
    clip(pairs)
    optimizer.apply_gradients(pairs)


def assign_and_ignore(clip, optimizer, weight):
    pairs = pairs_of(weight)
    clipped = clip(pairs)  # noqa: F841
    optimizer.apply_gradients(pairs)


def raise_between(clip, optimizer, weight):
    """A step that raises an error does not use the pairs; the next step does."""
    with contextlib.suppress(ArithmeticError):
        pairs = clip(pairs_of(weight))
        raise ArithmeticError
    optimizer.apply_gradients(clip(pairs_of(weight)))
    del pairs


USES = {
    "apply_gradients": lambda pairs, optimizer: optimizer.apply_gradients(pairs),
    "zip": lambda pairs, optimizer: optimizer.apply(*zip(*pairs, strict=True)),
    "list": lambda pairs, optimizer: optimizer.apply_gradients(list(pairs)),
    "for": lambda pairs, optimizer: [optimizer.apply([g], [v]) for g, v in pairs],
    "index": lambda pairs, optimizer: optimizer.apply([pairs[0][0]], [pairs[0][1]]),
    "slice": lambda pairs, optimizer: optimizer.apply_gradients(pairs[:]),
    "two parts": lambda pairs, optimizer: optimizer.apply_gradients(pairs + []),  # noqa: RUF005
    "after others": lambda pairs, optimizer: optimizer.apply_gradients([] + pairs),  # noqa: RUF005
    "pop": lambda pairs, optimizer: optimizer.apply_gradients([pairs.pop()]),
    "copy": lambda pairs, optimizer: optimizer.apply_gradients(pairs.copy()),
    "reversed": lambda pairs, optimizer: optimizer.apply_gradients(reversed(pairs)),
    "nest": lambda pairs, optimizer: optimizer.apply([tf.nest.flatten(pairs)[0]]),
    "an interactive session": lambda pairs, optimizer: repr(pairs),
}


def run(step, clip, is_graph=False, optimizer=None):
    """Return the texts of the warnings in three steps, and their number."""
    weight = keras.Variable([0.0, 0.0])
    optimizer = optimizer or keras.optimizers.SGD(1.0)
    optimizer.build([weight])
    if not clip.built:
        clip.build([weight])

    def call():
        step(clip, optimizer, weight)

    call = tf.function(call, autograph=is_graph == "autograph") if is_graph else call
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", "__array__", DeprecationWarning)
        for _ in range(3):
            call()
    return [str(each.message) for each in caught], clip.metrics()["clip/steps"]


@pytest.mark.parametrize("step", [ignore, assign_and_ignore])
@pytest.mark.parametrize("is_graph", [False, True, "autograph"])
def test_a_loop_that_ignores_the_clipped_pairs_is_a_warning(step, is_graph):
    [text], count = run(step, NormClip(1.0), is_graph)
    assert "the pairs that NormClip returned are not used" in text
    assert "optimizer.apply_gradients(clipper(pairs))" in text
    assert count == 3


@pytest.mark.parametrize("name", USES)
def test_pairs_that_are_used_in_any_way_are_no_warning(name):
    def step(clip, optimizer, weight):
        USES[name](clip(pairs_of(weight)), optimizer)

    for is_graph in (False, True) if name in ("zip", "for") else (False,):
        assert run(step, NormClip(1.0), is_graph) == ([], 3)


def test_a_dry_run_and_a_step_that_raises_an_error_are_no_warnings():
    assert run(ignore, NormClip(1.0, dry_run=True)) == ([], 3)
    assert run(raise_between, NormClip(1.0)) == ([], 6)


class Trainer(keras.Model):
    """A model whose `train_step` calls a clipper, and steps with an optimizer."""

    def __init__(self, clip, stepped=None):
        super().__init__()
        self.clip, self.stepped, self.layer = clip, stepped, keras.layers.Dense(1)

    def call(self, x):
        return self.layer(x)

    def train_step(self, data):
        with tf.GradientTape() as tape:
            loss = self.optimizer.scale_loss(tf.reduce_mean(self(data[0]) ** 2))
        variables = self.trainable_variables
        pairs = self.clip(zip(tape.gradient(loss, variables), variables, strict=True))
        if self.stepped is None:
            self.optimizer.apply([gradient for gradient, _ in pairs], variables)
        else:
            self.stepped.apply_gradients(pairs)
        return {"loss": loss}


def fit(optimizer, stepped=None, kind=Trainer):
    """Return the warnings in a `fit` whose `train_step` clips by hand."""
    clip = NormClip(1.0)
    model = kind(clip, stepped)
    model.compile(optimizer, run_eagerly=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(np.ones((4, 2)), np.ones((4, 1)), batch_size=2, verbose=0)
    texts = [str(each.message) for each in caught]
    return [text for text in texts if "NormClip" in text]


def scaled(inner):
    return keras.optimizers.LossScaleOptimizer(inner, initial_scale=1024.0)


def test_a_clip_of_gradients_that_are_unscaled_later_is_a_warning():
    """keras#19479."""

    def use(clip, optimizer, weight):
        optimizer.apply_gradients(clip(pairs_of(weight)))

    sgd = keras.optimizers.SGD
    by_hand, _ = run(use, NormClip(1.0), optimizer=scaled(sgd(1.0)))
    for [text] in (by_hand, fit(scaled(sgd(1.0)))):
        assert "NormClip clips before a LossScaleOptimizer: unless you have" in text
        assert "LossScaleOptimizer(clipper.as_optimizer(" in text
    inside, _ = run(
        lambda clip, optimizer, weight: optimizer.apply_gradients(pairs_of(weight)),
        clip := NormClip(1.0),
        optimizer=scaled(clip.as_optimizer(sgd(1.0))),
    )
    assert not inside
    assert not fit(sgd(1.0))
    assert not fit(scaled(sgd(1.0)), sgd(1.0))  # steps with an optimizer of its own


def test_a_model_that_steps_with_another_optimizer_is_no_warning():
    """Keras wraps the optimizer of `compile`, which a GAN may leave unused."""

    class Gan(Trainer):
        def train_step(self, data):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(self(data[0]) ** 2)
            variables = self.trainable_variables
            gradients = tape.gradient(loss, variables)
            pairs = self.clip(zip(gradients, variables, strict=True))
            self.stepped.apply([gradient for gradient, _ in pairs], variables)
            return {"loss": loss}

    sgd = keras.optimizers.SGD
    assert not fit(scaled(sgd(1.0)), sgd(1.0), Gan)
    for compiled, stepped in [
        (scaled(sgd(1.0)), scaled(sgd(1.0))),
        (optimizer := scaled(sgd(1.0)), optimizer),
        (scaled(inner := sgd(1.0)), inner),  # the attribute has what `compile` wraps
    ]:
        assert len(fit(compiled, stepped, Gan)) == 1


def test_a_model_without_an_optimizer_clips_in_silence():
    """It is not compiled, and steps by hand; a warning is an error in this test."""

    class Bare(keras.Model):
        def train(self, clip, weight):
            [(gradient, _)] = clip(pairs_of(weight))
            weight.assign_sub(gradient)
            return gradient

    gradient = Bare().train(NormClip(1.0), keras.Variable([0.0, 0.0]))
    np.testing.assert_allclose(np.linalg.norm(gradient), 1.0, rtol=1e-6)


@pytest.mark.parametrize("clip", [NormClip(1.0), TrustClip(), AdaGC()])
@pytest.mark.parametrize(
    ("calls", "has_parts"),
    [
        (["ab"] * 3, False),
        (["a", "b"] * 3, True),
        (["a", "b", "c", "a"], True),
        (["a", "a", "b", "b", "abc"], False),  # phases: the head, the body, all
    ],
)
def test_an_optimizer_that_steps_part_by_part_is_a_warning(clip, calls, has_parts):
    """tensorflow#45146: the norm of each part is in one history."""
    weights = {name: keras.Variable([0.0]) for name in "abc"}
    clip = type(clip).from_config(clip.get_config())
    optimizer = clip.as_optimizer(keras.optimizers.SGD(1.0))
    optimizer.build(list(weights.values()))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for names in calls:
            part = [weights[name] for name in names]
            optimizer.apply([tf.constant([1.0])] * len(part), part)
    texts = [str(each.message) for each in caught]
    expected = has_parts and type(clip) is not AdaGC  # one norm per parameter
    assert len(texts) == expected
    if expected:
        assert texts[0].startswith(f"{type(clip).__name__} receives the variables")
        assert "pass all variables in one call" in texts[0]


@pytest.mark.parametrize("is_one_step", [True, False])
def test_two_parts_in_one_graph_are_a_warning(is_one_step):
    """A graph is traced once, so no part returns."""
    weights = [keras.Variable([0.0]) for _ in range(2)]
    optimizer = NormClip(1.0).as_optimizer(keras.optimizers.SGD(1.0))
    optimizer.build(weights)

    def step(parts):
        for part in parts:
            optimizer.apply([tf.constant([1.0])], [part])

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for parts in [weights] if is_one_step else [weights[:1], weights[1:]]:
            tf.function(functools.partial(step, parts))()
    assert len(caught) == is_one_step


def accumulate(clip_first, k=4, updates=8, is_graph=False, logs=False, **keywords):
    """Train by hand with k micro-batches for each update; return the warnings.

    The metrics are read after each update if `logs` is true, after the last if "end".
    """
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    variables, clip = model.trainable_variables, NormClip(1.0, **keywords)
    optimizer = keras.optimizers.SGD(1e-3)
    optimizer.build(variables)
    totals = [tf.Variable(tf.zeros(v.shape)) for v in variables]

    def micro_batch(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x) - 20.0) ** 2)
        gradients = tape.gradient(loss, variables)
        if clip_first:
            gradients = [g for g, _ in clip(zip(gradients, variables, strict=True))]
        for total, gradient in zip(totals, gradients, strict=True):
            total.assign_add(gradient)

    def update():
        pairs = [(total / k, v) for total, v in zip(totals, variables, strict=True)]
        optimizer.apply_gradients(pairs if clip_first else clip(pairs))

    if is_graph:
        micro_batch, update = tf.function(micro_batch), tf.function(update)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(updates):
            for _ in range(k):
                micro_batch(tf.random.normal((3, 2)))
            update()
            for total in totals:
                total.assign(tf.zeros_like(total))
            if logs is True:
                clip.metrics()
        if logs == "end":
            clip.metrics()
    return [each for each in caught if "for each update" in str(each.message)]


@pytest.mark.parametrize(
    ("k", "is_graph", "logs"),
    [
        *((2, False, False), (4, False, False), (2, True, True), (12, False, True)),
        *((2, True, "end"), (5, True, "end")),
    ],
)
def test_micro_batches_that_are_clipped_before_their_sum_are_a_warning(
    k, is_graph, logs
):
    """DeepLearningExamples#713; the metrics show it in a graph, and with a large k."""
    updates = 10 if logs == "end" else 8
    [warning] = accumulate(True, k, updates, is_graph=is_graph, logs=logs)
    text = str(warning.message)
    assert f"NormClip was called {k} times for each update of SGD" in text
    assert "add up the gradients first, and call it once" in text
    assert warning.filename == __file__


@pytest.mark.parametrize(("is_graph", "logs"), [(0, True), (1, True), (1, "end")])
def test_a_clip_of_the_sum_is_no_warning(is_graph, logs):
    how = {"updates": 10, "is_graph": is_graph, "logs": logs}
    assert not accumulate(False, **how)
    assert not accumulate(True, k=1, **how)
    assert not accumulate(True, dry_run=True, **how)


def restore(clip, optimizer, steps, updates):
    state = clip._read_numpy()
    tally = state.tally._replace(steps=np.int32(steps))
    clip._state.write(state._replace(tally=tally))
    optimizer.iterations.assign(updates)


@pytest.mark.parametrize(
    ("applied", "earlier", "is_found"),
    [
        ([True] + 2 * [False], (0, 0), True),
        ([True] + 2 * [False], (90, 30), True),
        ([True] + 2 * [False], (0, 1000), True),
        (3 * [True], (90, 0), False),  # the optimizer is a new one
        (3 * [True], (0, 90), False),  # the clipper is a new one
        ([True, True, False], (0, 0), False),
        ([True, False, False, True, False], (0, 0), False),  # 12 updates
        (25 * [False] + 5 * [True] + 10 * [False], (0, 0), False),
    ],
)
def test_a_single_read_compares_with_the_first_call_in_a_graph(
    applied, earlier, is_found
):
    """Earlier steps and updates are those of a checkpoint."""
    weight, clip = keras.Variable([0.0, 0.0]), NormClip(1.0)
    optimizer, total = keras.optimizers.SGD(1.0), tf.Variable([0.0, 0.0])
    optimizer.build([weight])
    clip.build([weight])
    restore(clip, optimizer, *earlier)

    @tf.function
    def step(is_applied):
        [(gradient, _)] = clip(pairs_of(weight))
        total.assign_add(gradient)
        if is_applied:
            optimizer.apply([total.value()], [weight])

    for index in range(30):
        step(tf.constant(applied[index % len(applied)]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        clip.metrics()
    texts = [str(w.message) for w in caught if w.category is RuntimeWarning]
    assert ["called 3 times for each update" in t for t in texts] == [True] * is_found


@pytest.mark.parametrize("logs", [False, True])
def test_keras_accumulation_after_a_clip_by_hand_is_a_warning(logs):
    """Keras sums what it receives, and then counts one update."""
    weight, clip = keras.Variable([0.0, 0.0]), NormClip(1.0)
    optimizer = keras.optimizers.SGD(1.0, gradient_accumulation_steps=3)
    optimizer.build([weight])

    def train():
        for _ in range(14):
            optimizer.apply_gradients(clip(pairs_of(weight)))
            if logs:
                clip.metrics()

    with pytest.warns(RuntimeWarning, match="called 3 times for each update of SGD"):
        train()


def train_two_networks(clips, is_graph):
    """Step a critic three times for each step of a generator."""
    weights = [keras.Variable([0.0, 0.0]) for _ in range(2)]
    optimizers = [keras.optimizers.SGD(1.0) for _ in weights]
    for weight, optimizer, clip in zip(weights, optimizers, clips, strict=True):
        optimizer.build([weight])
        clip.build([weight])

    def step(index):
        optimizers[index].apply_gradients(clips[index](pairs_of(weights[index])))

    step = tf.function(step) if is_graph else step
    for _ in range(8):
        for index in (0, 0, 0, 1):
            step(index)
            clips[index].metrics()


@pytest.mark.parametrize("is_graph", [False, True])
def test_several_optimizers_are_no_warning(is_graph):
    """A warning is an error in these tests."""
    train_two_networks([NormClip(1.0), NormClip(1.0)], is_graph)
    shared = NormClip(1.0, scope="parameter")
    weights = [keras.Variable([0.0, 0.0]) for _ in range(2)]
    shared.build(weights)
    optimizers = [keras.optimizers.SGD(1.0) for _ in weights]
    for weight, optimizer in zip(weights, optimizers, strict=True):
        optimizer.build([weight])
    for _ in range(8):
        for weight, optimizer in zip(weights, optimizers, strict=True):
            optimizer.apply_gradients(shared(pairs_of(weight)))
        shared.metrics()


@pytest.mark.parametrize("accumulation", [None, 3])
def test_a_clipper_inside_an_optimizer_is_no_warning(accumulation):
    weight, clip = keras.Variable([0.0, 0.0]), NormClip(1.0)
    sgd = keras.optimizers.SGD(1.0, gradient_accumulation_steps=accumulation)
    optimizer = clip.as_optimizer(sgd)
    optimizer.build([weight])
    for _ in range(14):
        optimizer.apply_gradients(pairs_of(weight))
        clip.metrics()


def test_an_update_that_a_loop_leaves_out_is_no_warning():
    """A loop may skip a burst of updates, or steps with another optimizer."""
    weight, clip = keras.Variable([0.0, 0.0]), NormClip(1.0)
    optimizer = keras.optimizers.SGD(1.0)
    optimizer.build([weight])
    for step in range(30):
        pairs = clip(pairs_of(weight))
        [(gradient, _)] = pairs
        if not 2 < step < 9 and step % 3:
            optimizer.apply([gradient], [weight])
        if step % 5 == 0:
            clip.metrics()


def test_a_clipper_that_nothing_calls_says_where_it_belongs():
    """ray#32626: a clipper is read before its build and after it."""
    weight, clip = tf.Variable([0.0, 0.0]), NormClip(1.0)
    place = r"call pairs = clip\(pairs\) before .*clip\.as_optimizer\(optimizer\)"
    with pytest.raises(ValueError, match=rf"nothing has called; {place}"):
        clip.metrics()
    clip.build([weight])
    clip.metrics()
    for _ in range(CHANGES - 1):
        weight.assign_add([1.0, 0.0])
        clip.metrics()
    weight.assign_add([1.0, 0.0])
    with pytest.warns(RuntimeWarning, match=rf"has taken no step.* {place}"):
        clip.metrics()
    clip.metrics()


def test_a_clipper_that_is_called_after_some_reads_does_not_warn():
    weight, clip = tf.Variable([0.0, 0.0]), NormClip(1.0)
    clip.build([weight])
    for _ in range(2 * CHANGES):  # micro-batches
        clip.metrics()
    clip(pairs_of(weight))
    assert clip.metrics()["clip/steps"] == 1
    clip.reset()
    for _ in range(2 * CHANGES):
        weight.assign_add([1.0, 0.0])
        assert clip.metrics()["clip/steps"] == 0


def test_gradients_that_are_not_finite_again_and_again_warn_when_they_are_read():
    weight, clip = tf.Variable([0.0, 0.0]), NormClip(1.0)
    for _ in range(10):
        list(clip([(tf.constant([np.nan, 1.0]), weight)]))
    with pytest.warns(RuntimeWarning, match="the gradients of 10 of the last 10 steps"):
        clip.metrics()
    clip.metrics()
    clip.reset()
    for _ in range(9):
        list(clip([(tf.constant([np.nan, 1.0]), weight)]))
        clip.metrics()


@pytest.mark.parametrize("keywords", [{"nonfinite": "propagate"}, {"dry_run": True}])
def test_gradients_that_do_not_become_0_need_no_warning(keywords):
    weight, clip = tf.Variable([0.0, 0.0]), NormClip(1.0, **keywords)
    for _ in range(20):
        list(clip([(tf.constant([np.nan, 1.0]), weight)]))
        clip.metrics()


def train_two_losses(lists, names, steps=10):
    """Clip the gradients of each loss, with other variables, and apply their sum."""
    weights = {name: tf.Variable([0.0, 0.0], name=name) for name in "spv"}
    variables, optimizer = list(weights.values()), keras.optimizers.SGD(1.0)
    clips = {name: NormClip(1.0) for name in set(names)}
    for clip in clips.values():
        clip.build(variables)
    for _ in range(steps):
        sums = {name: tf.zeros(2) for name in weights}
        for name, parts in zip(names, lists, strict=True):
            pairs = [(tf.constant(KERNEL), weights[part]) for part in parts]
            for part, (gradient, _) in zip(parts, clips[name](pairs), strict=True):
                sums[part] += gradient
        optimizer.apply(list(sums.values()), variables)


def test_two_losses_with_a_shared_variable_that_are_clipped_before_their_sum_warn():
    """dennybritz/reinforcement-learning#54, with one clipper."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        train_two_losses(["sp", "sv"], "aa")
    [text] = [str(w.message) for w in caught if w.category is RuntimeWarning]
    assert "NormClip was called 2 times for each update of SGD" in text


def test_two_losses_may_have_a_clipper_each():
    train_two_losses(["sp", "sv"], "ab")


def test_a_call_may_leave_out_variables_without_a_gradient():
    weights = [tf.Variable([0.0, 0.0], name=name) for name in "sab"]
    clip, optimizer = NormClip(1.0), keras.optimizers.SGD(1.0)
    clip.build(weights)
    optimizer.build(weights)
    for step in range(40):
        pair = [weights[0], weights[1 + step % 2]]
        optimizer.apply_gradients(clip([(tf.constant(KERNEL), w) for w in pair]))
        clip.metrics()
