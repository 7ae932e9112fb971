"""`UpdateClipper` and `TrustClip` clip the change of the variables after a step."""

import json
import re

import keras
import numpy as np
import pytest
import tensorflow as tf

from autoclip_core import Drop, Fixed, MeanStd, ParamRatio, Quantile
from autoclip_core.clipper.trust import make_bound
from autoclip_tf import NormClip, TrustClip, UpdateClipper, with_gradient_transformers
from autoclip_tf.optimizers import SGD, Adam

from ..support import update_reference

MODES = {
    "graph": lambda step: tf.function(step, autograph=False),
    "xla": lambda step: tf.function(step, jit_compile=True, autograph=False),
}


MODE_OF = dict.fromkeys(update_reference.CASES, "graph") | {"trust": "xla"}


@pytest.mark.parametrize(("name", "mode"), [*MODE_OF.items()])
def test_a_hundred_recorded_steps_agree_with_the_reference(name, mode):
    case = update_reference.CASES[name]
    weights = {
        key: keras.Variable(value, name=key)
        for key, value in update_reference.weights().items()
    }
    clip = UpdateClipper(case.policy, scope=case.scope, norm=case.norm)
    rate, momentum = update_reference.LEARNING_RATE, update_reference.MOMENTUM
    optimizer = SGD(rate, momentum=momentum, gradient_transformers=[clip])
    variables = list(weights.values())
    optimizer.build(variables)
    step = MODES[mode](lambda *gradients: optimizer.apply(gradients, variables))
    expected = update_reference.run(case)
    for gradients, reference in zip(
        update_reference.gradients(), expected, strict=True
    ):
        step(*map(tf.constant, gradients.values()))
        arrays = {key: weight.numpy() for key, weight in weights.items()}
        update_reference.assert_agrees(arrays, reference)
    np.testing.assert_allclose(clip.decision.norm, expected[-1].norms, rtol=1e-4)
    rate = np.mean([np.less(each.scales, 1.0) for each in expected])
    assert clip.metrics()["clip/update_clip_rate"] == pytest.approx(rate, abs=0.01)


def step_from(start, gradients, clip, optimizer=SGD, rate=1.0, **settings):
    """Return the variable, and the optimizer, after a step with each gradient."""
    weight = keras.Variable(np.float32(start))
    optimizer = optimizer(rate, gradient_transformers=[clip], **settings)
    for gradient in gradients:
        optimizer.apply([tf.constant(gradient, tf.float32)], [weight])
    return weight, optimizer


def test_weight_decay_belongs_to_the_update():
    clip = UpdateClipper(Fixed(0.1))
    weight, _ = step_from([3, 4], [[0, 0]], clip, rate=0.5, weight_decay=0.1)
    assert clip.decision.norm == pytest.approx(0.5 * 0.1 * 5, rel=1e-5)
    np.testing.assert_allclose(weight, [3 - 0.06, 4 - 0.08], rtol=1e-6)


def test_the_momentum_is_not_clipped():
    clip = UpdateClipper(Fixed(1.0))
    weight, _ = step_from([0], [[8], [0]], clip, momentum=0.5)
    assert clip.decision.norm == 4.0
    np.testing.assert_allclose(weight, [-2.0], rtol=1e-6)


def test_the_average_of_the_weights_follows_the_clipped_weights():
    clip = UpdateClipper(Fixed(1.0))
    settings = {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 2}
    weight, optimizer = step_from([0], [[8], [8]], clip, **settings)
    # The weight is -1, then -2, and then the average of both.
    assert clip.decision.norm == 8.0
    assert weight.numpy() == [-1.5]
    assert optimizer._model_variables_moving_average[0].numpy() == [-1.5]


def test_a_constraint_acts_after_the_clipper():
    weight, clip = keras.Variable([1.0, 1.0]), UpdateClipper(Fixed(1.0))
    weight.constraint = lambda values: tf.maximum(values, 0.3)
    optimizer = SGD(1.0, gradient_transformers=[clip])
    optimizer.apply([tf.constant([3.0, 4.0])], [weight])
    assert clip.decision.norm == 5.0
    np.testing.assert_allclose(weight, [0.4, 0.3], rtol=1e-6)


def three_rows(clip, third=(1.0, 1.0)):
    """Return old and new values of three variables; the first has a large update."""
    middle = np.linspace(0.6, 1, 20)
    old = [np.float32(v) for v in ([0.1, 1e-4], middle, [0.3, 7.0])]
    gradients = [[5e3, 1.0], np.linspace(0.31, 0.47, 20), third]
    weights = [keras.Variable(value) for value in old]
    optimizer = SGD(1.0, weight_decay=0.5, gradient_transformers=[clip])
    optimizer.apply([tf.constant(g, tf.float32) for g in gradients], weights)
    return old, [weight.numpy() for weight in weights]


def test_a_row_within_its_bound_has_the_new_weights_bit_for_bit():
    clip = UpdateClipper(Fixed(20.0))
    old, new = three_rows(clip)
    assert clip.decision.clipped.tolist() == [True, False, False]
    _, plain = three_rows(UpdateClipper(Fixed(20.0), dry_run=True))
    assert (old[1] + (plain[1] - old[1]) != plain[1]).any()  # it would be rounded
    for place in (1, 2):
        np.testing.assert_array_equal(new[place], plain[place])
    np.testing.assert_allclose(np.linalg.norm(new[0] - old[0]), 20.0, rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_whose_update_is_not_finite_keeps_its_old_weights(bad):
    clip = UpdateClipper(Fixed(1e6))
    old, new = three_rows(clip, third=[bad, 1.0])
    np.testing.assert_array_equal(new[2], old[2])
    assert (new[1] != old[1]).all()
    assert clip.metrics()["clip/update_nonfinite_total"] == 1
    old, new = three_rows(TrustClip(nonfinite="propagate"), third=[bad, 1.0])
    np.testing.assert_array_equal(new[2], old[2])
    loose = UpdateClipper(Fixed(1e6), nonfinite="propagate")
    assert not np.isfinite(three_rows(loose, third=[bad, 1.0])[1][2][0])


def test_a_dropped_row_keeps_its_old_weights():
    clip = UpdateClipper(Drop(Fixed(20.0)))
    old, new = three_rows(clip)
    assert clip.decision.dropped.tolist() == [True, False, False]
    np.testing.assert_array_equal(new[0], old[0])
    assert (new[2] != old[2]).all()


def test_excluded_variables_are_left_alone_and_others_measured_without_scaling():
    weights = [keras.Variable([1.0], name=name) for name in ("a", "b", "c")]
    clip = UpdateClipper(Fixed(5.0), scope="global", exclude="c", scale_only="a")
    optimizer = SGD(1.0, gradient_transformers=[clip])
    optimizer.apply([tf.constant([g]) for g in (6.0, 8.0, 100.0)], weights)
    values = [float(weight.numpy()[0]) for weight in weights]
    assert clip.decision.norm == 10.0
    assert values == [1.0 - 3.0, 1.0 - 8.0, 1.0 - 100.0]


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_only_variables_that_the_step_changes_are_observed():
    weights = [keras.Variable([1.0], name=name) for name in ("used", "idle", "set")]
    weights[2].overwrite_with_gradient = True
    clip = UpdateClipper(ParamRatio(0.5))
    optimizer = SGD(1.0, gradient_transformers=[clip])
    optimizer.apply([tf.constant([4.0]), None, tf.constant([9.0])], weights)
    assert [float(weight.numpy()[0]) for weight in weights] == [0.5, 1.0, 9.0]
    np.testing.assert_array_equal(clip.decision.norm, [4.0, np.nan, np.nan])


def test_the_norm_of_the_parameters_covers_those_without_a_gradient():
    weights = [keras.Variable([3.0], name="used"), keras.Variable([4.0], name="idle")]
    clip = UpdateClipper(ParamRatio(0.1), scope="global")
    optimizer = SGD(1.0, gradient_transformers=[clip])
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        optimizer.apply([tf.constant([9.0]), None], weights)
    assert clip.decision.threshold == pytest.approx(0.5, rel=1e-6)
    assert weights[0].numpy() == pytest.approx(2.5, rel=1e-6)


def test_an_overflow_of_the_loss_scale_leaves_the_weights():
    clip = TrustClip()
    inner = Adam(0.5, gradient_transformers=[clip])
    optimizer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=4.0)
    weight = keras.Variable([1.0, 1.0])
    optimizer.build([weight])
    values = []
    for gradient in ([4.0, 4.0], [np.inf, 0.0], [4.0, 4.0]):
        optimizer.apply([tf.constant(gradient)], [weight])
        values.append(float(weight.numpy()[0]))
    assert values == pytest.approx([0.99, 0.99, 0.99**2], rel=1e-5)
    metrics = clip.metrics()
    assert metrics["clip/steps"] == metrics["clip/update_steps"] == 2
    assert metrics["clip/update_nonfinite_total"] == 0


def test_the_place_in_the_list_does_not_matter():
    results = []
    for order in (1, -1):
        clips = [NormClip(5.0), UpdateClipper(Fixed(1.0))]
        weight = keras.Variable([0.0])
        optimizer = SGD(1.0, gradient_transformers=clips[::order])
        optimizer.apply([tf.constant([9.0])], [weight])
        results.append((clips[0].decision.norm, clips[1].decision.norm, weight.numpy()))
    assert results[0] == results[1] == ([9.0], [5.0], [-1.0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_variables_of_another_type_are_clipped_in_float32_or_wider(dtype):
    weight, clip = keras.Variable([3.0, 4.0], dtype=dtype), UpdateClipper(Fixed(0.5))
    optimizer = SGD(1.0, gradient_transformers=[clip])
    optimizer.apply([tf.constant([3.0, 4.0], dtype)], [weight])
    assert weight.dtype == dtype
    expected = np.array([2.7, 3.6])
    np.testing.assert_allclose(np.float64(weight.numpy()), expected, rtol=4e-3)


X = np.random.default_rng(3).normal(size=(64, 8)).astype("float32")


def zero_parts():
    """Return weights, and a function from them to the losses of three models.

    What starts at 0 is a linear model with its bias, the last layer of a residual
    branch, and B of a low-rank adapter.
    """
    rng = np.random.default_rng(4)
    fixed = [tf.constant(rng.normal(size=s) / 3, tf.float32) for s in [(8, 4)] * 4]
    weights = {
        name: keras.Variable(np.float32(value), name=name)
        for name, value in {
            "kernel": np.zeros((8, 4)),
            "bias": np.zeros(4),
            "branch_in": rng.normal(size=(8, 8)) / 3,
            "branch_out": np.zeros((8, 8)),
            "lora_a": rng.normal(size=(8, 2)) / 3,
            "lora_b": np.zeros((2, 4)),
        }.items()
    }

    def losses():
        w = {name: tf.convert_to_tensor(weight) for name, weight in weights.items()}
        hidden = X + tf.nn.relu(X @ w["branch_in"]) @ w["branch_out"]
        low_rank = fixed[2] + w["lora_a"] @ w["lora_b"]
        errors = (
            X @ w["kernel"] + w["bias"] - X @ fixed[0] - 0.5,
            hidden @ fixed[1] - tf.abs(X) @ fixed[1],
            X @ low_rank - X @ (fixed[2] + fixed[3][:, :2] @ fixed[3][:2]),
        )
        return tf.stack([tf.reduce_mean(error**2) for error in errors])

    return list(weights.values()), losses


def losses_after(optimizer, steps, spike=1.0):
    """Return the losses after each step; from step 3 on, every tenth has a spike."""
    step, _ = step_of_losses(optimizer)
    factors = [spike if i % 10 == 3 else 1.0 for i in range(steps)]
    return np.array([step(tf.constant(factor)) for factor in factors])


def step_of_losses(optimizer):
    """Return a compiled step from a factor of the gradient to the losses before it, and
    all variables."""
    weights, compute_losses = zero_parts()
    optimizer.build(weights)

    @tf.function(autograph=False)
    def step(factor):
        with tf.GradientTape() as tape:
            losses = compute_losses()
        gradients = tape.gradient(losses, [weight.value for weight in weights])
        optimizer.apply([factor * g for g in gradients], weights)
        return losses

    return step, [*weights, *optimizer.variables]


def test_weights_at_0_learn_within_three_times_the_steps():
    plain = losses_after(Adam(0.01), 150)
    bounded = losses_after(TrustClip().as_optimizer(keras.optimizers.Adam(0.01)), 450)
    assert (plain[-1] < 0.5 * plain[0]).all()
    assert (bounded.min(axis=0) <= plain.min(axis=0)).all()


def test_spikes_from_the_third_step_on_do_not_stop_the_training():
    optimizer = keras.optimizers.SGD(0.03, momentum=0.9)
    clipped = losses_after(TrustClip().as_optimizer(optimizer), 200, spike=300.0)
    plain = losses_after(SGD(0.03, momentum=0.9), 200, spike=300.0)
    assert not (plain[-1] < plain[0]).any()  # NaN, or above the start
    assert (clipped[-1] < clipped[0]).all()
    assert clipped[-1].sum() < 0.1 * clipped[0].sum()


NUMBER = np.arange(240)
RATES = np.where(NUMBER < 20, NUMBER / 20, 0.5 + 0.5 * np.cos(np.pi * NUMBER / 240))
CHANGES = {
    "x10": (np.ones(240), np.where(NUMBER < 120, 1.0, 10.0)),
    "/10": (np.ones(240), np.where(NUMBER < 120, 1.0, 0.1)),
    "warm-up from 0 and cosine": (RATES, np.ones(240)),
}
"""By name: the factors of the learning rate and of the gradient in each step."""


def test_a_lasting_change_of_level_or_of_the_rate_does_not_stop_the_training():
    """One compiled step serves all runs; each begins with the initial variables."""
    clip = TrustClip(history_length=50)
    optimizer = clip.as_optimizer(keras.optimizers.SGD(0.03, momentum=0.9))
    step, variables = step_of_losses(optimizer)
    initial = [variable.numpy() for variable in variables]
    for name, pairs in CHANGES.items():
        for variable, value in zip(variables, initial, strict=True):
            variable.assign(value)
        losses = []
        for rate, factor in zip(*pairs, strict=True):
            optimizer.learning_rate.assign(0.03 * rate)
            losses.append(step(tf.constant(factor, tf.float32)).numpy())
        assert losses[-1].sum() < 0.15 * losses[0].sum(), name
        metrics = clip.metrics()
        norm, threshold = metrics["clip/norm"], metrics["clip/threshold"]
        assert norm < threshold < 10 * norm, name


WAYS = {
    "an update clipper": lambda: UpdateClipper(
        MeanStd(3.0, history_length=64),
        scope="unit",
        norm="max",
        nonfinite="propagate",
        warmup_steps=4,
        max_threshold=2.0,
        exclude=["head", re.compile("bias$")],
        dry_run=True,
    ),
    "a trust clip": lambda: TrustClip(
        ratio=0.05,
        quantile=0.5,
        history_length=64,
        scope="global",
        exclude=["head", re.compile("bias$")],
        nonfinite="propagate",
        dry_run=True,
    ),
    "a trust clip at its defaults": TrustClip,
}


@pytest.mark.parametrize("way", WAYS)
def test_a_configuration_restores_the_same_clipper(way):
    clip = WAYS[way]()
    saved = json.loads(json.dumps(keras.saving.serialize_keras_object(clip)))
    restored = keras.saving.deserialize_keras_object(saved)
    assert type(restored) is type(clip)
    assert restored.get_config() == clip.get_config()
    assert repr(restored) == repr(clip)
    assert eval(repr(clip)).get_config() == clip.get_config()


def test_the_halves_of_a_trust_clip_have_the_documented_settings():
    clip = WAYS["a trust clip"]()
    gradient, update = clip.gradient, clip.update
    assert gradient.policy == Quantile(0.5, history_length=64)
    assert (gradient.scope, gradient._settings.nonfinite) == ("global", "propagate")
    assert update.policy == make_bound(0.05) == ParamRatio(0.05, eps=0.2)
    assert (update.scope, update._settings.nonfinite) == ("global", "zero")
    assert update._settings.norm == "rms"
    for half in (gradient, update):
        assert half._settings.dry_run
        assert half._settings.exclude == ["head", re.compile("bias$")]


def test_a_trust_clip_has_metrics_and_a_state_in_both_halves():
    clip = TrustClip(ratio=0.1)
    words = r"must be built before .* call optimizer\.build\(model\.trainable_variables"
    for read in (clip.metrics, clip.check_state):
        with pytest.raises(ValueError, match=words):
            read()
    weight, _ = step_from([3, 4], [[0, 1], [0, 9]], clip, optimizer=SGD)
    metrics = clip.metrics(per_row=True)
    assert (metrics["clip/norm"], metrics["clip/norm_after"]) == (9.0, 1.0)
    assert metrics["clip/update_norm"] == pytest.approx(np.sqrt(0.5), rel=1e-5)
    assert metrics[f"clip/update_scale/{weight.path}"] < 1
    assert repr(clip) == "TrustClip(ratio=0.1, scope='parameter', rows=1)"
    clip.check_state()
    clip.reset()
    assert clip.metrics()["clip/steps"] == clip.metrics()["clip/update_steps"] == 0
    clip.update._state.variables[-1].assign(-1)
    with pytest.raises(ValueError, match="state of a clipper is invalid"):
        clip.check_state()


def legacy():
    tf_keras = pytest.importorskip("tf_keras")
    return with_gradient_transformers(tf_keras.optimizers.Adam)


PAIR = [(tf.constant([1.0]), tf.Variable([0.0]))]
WRONG = {
    "skip": (lambda: UpdateClipper(Fixed(1.0), nonfinite="skip"), "nonfinite must be"),
    "raise": (lambda: TrustClip(nonfinite="raise"), "nonfinite must be"),
    "a policy that cancels updates": (
        lambda: UpdateClipper(Drop(Fixed(1.0), action="skip")),
        r"policy must be without Drop\(action=\"skip\"\).*filter the gradient first",
    ),
    "a loss policy": (
        lambda: UpdateClipper(Fixed(1.0), loss_policy=Fixed(1.0)),
        "loss_policy is no argument of UpdateClipper",
    ),
    "groups": (lambda: TrustClip(scope="group"), "scope must be"),
    "no ratio": (lambda: TrustClip(ratio=0.0), "ratio must be > 0"),
    "a percentile": (lambda: TrustClip(quantile=90), "quantile must be in"),
    "pairs": (lambda: UpdateClipper(Fixed(1.0))(PAIR), "as_optimizer"),
    "pairs for both": (lambda: TrustClip()(PAIR), r"TrustClip\(\.\.\.\)\.as_optimizer"),
    "two": (
        lambda: SGD(gradient_transformers=[UpdateClipper(Fixed(1.0)), TrustClip()]),
        "with at most one that clips the update.*leave one out",
    ),
    "an optimizer with one": (
        lambda: TrustClip().as_optimizer(SGD(gradient_transformers=[TrustClip()])),
        "with at most one that clips the update",
    ),
    "tf_keras": (
        lambda: legacy()(gradient_transformers=[TrustClip()]),
        r"^TrustClip must clip .*TrustClip\(\.\.\.\)\.as_optimizer",
    ),
    "an optimizer that keeps weights": (
        lambda: TrustClip().as_optimizer(keras.optimizers.ScheduleFreeAdamW()),
        "'ScheduleFreeAdamW'; its state holds weights of its own",
    ),
    "an optimizer that sums them": (
        lambda: TrustClip().as_optimizer(keras.optimizers.Ftrl()),
        "'Ftrl'; its state holds weights of its own",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_use_is_named_with_its_way_out(case):
    make, words = WRONG[case]
    with pytest.raises((ValueError, TypeError), match=words):
        make()
