"""Keras clippers as gradient transformers: numbers, configuration, errors."""

import json
import re
from functools import cache, lru_cache

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

import autoclip_core
import autoclip_tf
from autoclip_core import Cap, ClipLog, Drop, Fixed, Quantile
from autoclip_tf import (
    AGC,
    AdaGC,
    Clipper,
    NormClip,
    QuantileClip,
    StandardClip,
    ValueClip,
    ZClip,
)

from ..support.account import norm_of
from ..support.cases import STATIC, policy_of
from ..support.traces import check_traces, traced_policies

TRACED = [c for c in traced_policies() if "None" not in c and "skip" not in c]
# `core/test_parity.py` compares every policy under XLA with NumPy, and
# `core/test_golden.py` compares NumPy with the traces. The clipper needs only one
# policy of each kind.
KINDS = tuple({type(policy_of(code)): code for code in TRACED}.values())
EAGER = [  # a window, a running average, and the norms of the weights
    "Quantile(0.5, history_length=10)",
    "ZScore(2.0, alpha=0.9, warmup_steps=5, target='threshold')",
    "ParamRatio(0.16, eps=0.01)",
]
MODES = {
    "eager": lambda step: step,
    "graph": tf.function,
    "xla": lambda step: tf.function(step, jit_compile=True),
}
COMPILED = ["graph", "xla"]
CLIPPERS = {
    "QuantileClip": lambda **k: QuantileClip(0.9, history_length=20, **k),
    "StandardClip": lambda **k: StandardClip(2.0, history_length=20, norm="rms", **k),
    "AGC": lambda **k: AGC(0.1, **k),
    "ZClip": lambda **k: ZClip(warmup_steps=5, **k),
    "AdaGC": lambda **k: AdaGC(warmup_steps=0, **k),
    "NormClip": lambda **k: NormClip(1.0, **k),
    "Clipper": lambda **k: Clipper(Cap(Quantile(0.9), max_norm=5.0), norm="max", **k),
    "ValueClip": lambda **k: ValueClip(2.0, **k),
}


def every_clipper():
    return pytest.mark.parametrize("name", CLIPPERS)


def every_mode():
    return pytest.mark.parametrize("mode", MODES)


STEPS, ROWS = 240, 12
"""The most steps and rows of a run of golden traces. Compiled runs are padded to it."""


@cache
def replayer(codes, mode):
    """Return the clippers of these policies and a function that runs them on norms.

    Each norm of a step is a unit of one element, so a step has a single gradient.
    """
    weight = tf.Variable(tf.zeros((1, ROWS)))
    clippers = [Clipper(policy_of(code), scope="unit") for code in codes]
    for clip in clippers:
        clip.build([weight])

    def step(inputs):
        norms, param_norms = inputs
        weight.assign(param_norms[None])
        decisions = []
        for clip in clippers:
            [_] = clip([(norms[None], weight)])
            decisions.append(clip._state.read().decision)
        return [(decision.threshold, decision.scale) for decision in decisions]

    @MODES[mode]
    def replay(norms, param_norms):
        types = [(tf.float32, tf.float32)] * len(clippers)
        return tf.map_fn(step, (norms, param_norms), fn_output_signature=types)

    return clippers, replay


@lru_cache(8)  # policies with equal series share a run
def results_of(codes, mode, norms, param_norms, shape):
    """Return thresholds and scales of each policy; the norms are bytes."""
    clippers, replay = replayer(codes, mode)
    for clip in clippers:
        clip.reset()
    arrays = [np.frombuffer(n, np.float32).reshape(shape) for n in (norms, param_norms)]
    return dict(zip(codes, replay(*map(tf.constant, arrays)), strict=True))


def through_keras(mode, code, codes=None):
    """Return a function for `check_traces` that runs the policy `code` of `codes`."""
    codes = codes or (code,)

    def run(policy, series):
        steps, rows = series.norms.shape
        padding = (0, 0 if mode == "eager" else STEPS - steps), (0, ROWS - rows)
        norms, param_norms = (
            np.pad(array, padding, mode="edge")
            for array in (series.norms, series.param_norms)
        )
        results = results_of(
            codes, mode, norms.tobytes(), param_norms.tobytes(), norms.shape
        )
        return [array.numpy()[:steps, :rows] for array in results[code]]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("code", KINDS)
def test_xla_steps_match_the_golden_traces(code):
    check_traces(through_keras("xla", code, KINDS), code)


def test_graph_steps_match_the_golden_traces():
    check_traces(through_keras("graph", EAGER[0]), EAGER[0])


@pytest.mark.parametrize("code", EAGER)
def test_eager_steps_match_the_golden_traces(code):
    """An eager step takes about 30 ms, so the traces are cut after 25 steps."""
    check_traces(through_keras("eager", code), code, steps=25)


def make_variables():
    return [
        keras.Variable(np.ones((3, 2), "float32"), name="kernel"),
        keras.Variable(np.ones((4,), "float32"), name="gain"),
        keras.Variable(np.ones((2,), "float32"), name="absent"),
    ]


def make_gradients(scale):
    return [
        ops.convert_to_tensor(np.full((3, 2), 2.0 * scale, "float32")),
        ops.cast(ops.convert_to_tensor(np.full((4,), 3.0 * scale)), "float16"),
        None,
    ]


@pytest.mark.parametrize(
    ("name", "mode"),
    # The golden traces compile each policy.
    [(name, "eager") for name in CLIPPERS]
    + [(name, mode) for name in ("QuantileClip", "ValueClip") for mode in COMPILED],
)
def test_pairs_keep_their_order_and_are_scaled_by_the_decision(name, mode):
    weights, clip = make_variables(), CLIPPERS[name](scope="parameter")
    clip.build(weights)
    step = MODES[mode](
        lambda *grads: [g for g, _ in clip(zip([*grads, None], weights, strict=True))]
    )
    for scale in [1.0, 1.5, 0.5, 2.0, 1.0, 1.0, 1.0, 40.0]:
        grads = make_gradients(scale)
        kernel, gain, absent = step(*grads[:2])
    assert absent is None
    assert kernel.dtype == tf.float32
    assert gain.dtype == tf.float16
    decision = clip.decision
    norm = clip.get_config().get("norm", "l2")
    norms = [norm_of([np.float64(g)], norm) for g in grads[:2]]
    np.testing.assert_allclose(decision.norm[:2], norms, rtol=1e-6)
    assert np.isnan(decision.norm[2])
    assert (decision.scale[:2] < 1).all()
    after = [norm_of([np.float64(g)], norm) for g in (kernel, gain)]
    np.testing.assert_allclose(after, decision.scale[:2] * norms, rtol=2e-3)
    if name != "ValueClip":
        wanted = np.float64(grads[0]) * decision.scale[0]
        np.testing.assert_allclose(np.float64(kernel), wanted, rtol=1e-6)
    assert clip.metrics()["clip/steps"] == 8
    assert clip.names == [clip._rows.names[i] for i in range(3)]


@every_mode()
def test_the_numeric_rules_hold_for_one_row(mode):
    cases = {  # gradient, limit, clipped gradient
        "within": ([0.3, 0.4], 1.0, [0.3, 0.4]),
        "equal": ([3.0, 4.0], 5.0, [3.0, 4.0]),
        "tiny": ([3e-7, 4e-7], 1e-7, [6e-8, 8e-8]),
        "zero": ([0.0, 0.0], 1.0, [0.0, 0.0]),
        "overflowing squares": ([3e30, 4e30], 1.0, [0.6, 0.8]),
        "underflowing squares": ([3e-30, 4e-30], 1e-31, [6e-32, 8e-32]),
        "nan": ([np.nan, 1.0], 1.0, [0.0, 0.0]),
        "inf": ([np.inf, 1.0], 1.0, [0.0, 0.0]),
    }
    weight = tf.Variable([0.0, 0.0])
    clips = [NormClip(limit) for _, limit, _ in cases.values()]
    for clip in clips:
        clip.build([weight])

    @MODES[mode]
    def step(gradients):
        pairs = zip(clips, tf.unstack(gradients), strict=True)
        return [clip([(gradient, weight)])[0][0] for clip, gradient in pairs]

    clipped = step(tf.constant([gradient for gradient, _, _ in cases.values()]))
    for name, got, clip in zip(cases, clipped, clips, strict=True):
        gradient, _, wanted = cases[name]
        np.testing.assert_allclose(got, wanted, rtol=2e-7, err_msg=name)
        assert clip.decision.finite[0] == np.isfinite(gradient).all(), name


@every_mode()
def test_a_norm_that_is_not_finite_is_not_recorded_and_changes_no_other_row(mode):
    weights = [tf.Variable([0.0]), tf.Variable([0.0])]
    clip = QuantileClip(quantile=0.5, history_length=4)
    clip.build(weights)

    @MODES[mode]
    def step(*grads):
        return [g for g, _ in clip(zip(grads, weights, strict=True))]

    past = []
    for norm in [1.0, np.nan, 2.0, np.inf, -np.inf, 5.0, 3.0, 9.0]:
        clipped, steady = step(tf.constant([norm]), tf.constant([1.0]))
        limit = np.quantile(past[-4:], 0.5) if past else np.inf
        assert steady.numpy() == 1.0
        if np.isfinite(norm):
            np.testing.assert_allclose(clipped, [min(norm, limit)], rtol=1e-6)
            past.append(norm)
        else:
            assert clipped.numpy() == 0.0
    assert clip.metrics()["clip/nonfinite_total"] == 3


def test_propagate_leaves_a_gradient_that_is_not_finite():
    weight, clip = tf.Variable([0.0, 0.0]), NormClip(1.0, nonfinite="propagate")
    [(gradient, _)] = clip([(tf.constant([np.inf, 2.0]), weight)])
    np.testing.assert_array_equal(gradient, [np.inf, 2.0])
    assert not clip.decision.finite[0]


@every_clipper()
def test_a_gradient_within_its_limit_is_unchanged(name):
    weight, clip = tf.Variable(np.full(6, 100.0, "float32")), CLIPPERS[name]()
    before = tf.constant(np.float32([1e-40, -0.0, 1e-3, -2e-3, 5e-39, 0.0]))
    [(after, _)] = clip([(before, weight)])
    bits = [np.asarray(g).view(np.uint32) for g in (after, before)]
    np.testing.assert_array_equal(*bits)


@every_mode()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_a_gradient_is_unchanged_if_another_one_is_clipped(dtype, mode):
    # Multiplying by 1 is not enough: TensorFlow rounds subnormal products to 0.
    subnormal = 1e-320 if dtype == "float64" else 1e-40
    within = np.tile([subnormal, 1e-3, -3 * subnormal, -0.0], 16)
    within = within.astype(tf.as_dtype(dtype).as_numpy_dtype)
    weights = [tf.Variable(tf.zeros(2)), tf.Variable(tf.zeros(64, dtype))]
    clip = Clipper(Fixed(1.0), scope="parameter")
    clip.build(weights)
    step = MODES[mode](
        lambda *g: [new for new, _ in clip(zip(g, weights, strict=True))]
    )
    clipped, unchanged = step(tf.constant([3.0, 4.0]), tf.constant(within))
    np.testing.assert_allclose(clipped, [0.6, 0.8], rtol=1e-6)
    bits = [g.view(np.uint8) for g in (unchanged.numpy(), within)]
    np.testing.assert_array_equal(*bits)


@every_clipper()
def test_a_dry_run_records_norms_and_changes_no_gradient(name):
    weight, clip = tf.Variable([1.0]), CLIPPERS[name](dry_run=True)
    for norm in [1.0, 2.0, 1.5, 1.0, 2.0, 1.0, 90.0]:
        [(gradient, _)] = clip([(tf.constant([norm]), weight)])
        assert gradient.numpy() == norm
    assert clip.decision.clipped.all()
    assert clip.metrics()["clip/steps"] == 7


def test_excluded_variables_are_neither_measured_nor_scaled():
    weights = [tf.Variable([0.0], name=n) for n in ("head/kernel", "head/bias", "rnn")]
    pairs = [(tf.constant([10.0]), weight) for weight in weights]
    patterns = [
        "head",
        "head/*",
        ["head/kernel", "head/bias"],
        re.compile("^head"),
        lambda path, variable: "head" in path,
    ]
    for exclude in patterns:
        clip = NormClip(1.0, scope="parameter", exclude=exclude)
        got = [float(gradient[0]) for gradient, _ in clip(pairs)]
        assert got == [10.0, 10.0, 1.0]
        assert clip.names == ["rnn"]


def test_exclude_matches_a_layer_name_anywhere_in_a_path():
    layers = [keras.layers.Dense(2, name="a_b"), keras.layers.Dense(1, name="c")]
    model = keras.Sequential([keras.Input((4,)), *layers])
    for exclude in ("a_b", "a_b/kernel", "a_*/*"):
        clip = QuantileClip(exclude=exclude)
        clip.build(model.trainable_variables)
        assert not any("a_b/kernel" in name for name in clip.names)
        assert any("c/kernel" in name for name in clip.names)
    with pytest.raises(ValueError, match="the names are sequential"):
        QuantileClip(exclude="a").build(model.trainable_variables)


def test_the_repr_of_a_clipper_is_the_code_that_makes_it():
    clip = QuantileClip(0.5, exclude=[re.compile("bias")], scope="global")
    copy = eval(repr(clip))
    assert copy.get_config() == clip.get_config()
    bounded = Clipper(Cap(Quantile(0.5), max_norm=9.0), global_clipping=True)
    assert eval(repr(bounded)).get_config()["policy"] == bounded.get_config()["policy"]


def test_a_repr_shows_what_differs_from_the_defaults_and_the_rows_once_built():
    clip = QuantileClip(history_length=8, dry_run=True)
    shown = "QuantileClip(quantile=0.9, history_length=8, scope='parameter', dry_run="
    assert repr(clip) == f"{shown}True)"
    clip.build([tf.Variable([0.0], name=name) for name in ("v", "w")])
    assert repr(clip) == f"{shown}True, rows=2)"
    assert repr(AGC()) == "AGC(clipping=0.01, scope='unit')"
    assert repr(ValueClip(2.0)) == "ValueClip(clip_value=2.0, scope='parameter')"


def test_a_clipper_without_variables_asks_for_build():
    clip = QuantileClip()
    clip.build([])
    assert clip([]) == []
    for read in (clip.metrics, clip.reset, lambda: clip.decision, lambda: clip.names):
        with pytest.raises(ValueError, match=r"build\(model.trainable_variables\)"):
            read()


def test_an_unknown_variable_is_refused_by_name():
    clip = QuantileClip()
    clip([(tf.constant([1.0]), tf.Variable([0.0], name="known"))])
    with pytest.raises(ValueError, match=r"'late'.*built for known.*build\("):
        clip([(tf.constant([1.0]), tf.Variable([0.0], name="late"))])
    assert clip.metrics()["clip/steps"] == 1


def test_reset_clears_the_whole_state():
    weight, clip = tf.Variable([0.0]), QuantileClip(0.5)
    first = [clip([(tf.constant([n]), weight)])[0][0].numpy() for n in [1.0, 5.0, 2.0]]
    clip.reset()
    assert clip.metrics()["clip/steps"] == 0
    again = [clip([(tf.constant([n]), weight)])[0][0].numpy() for n in [1.0, 5.0, 2.0]]
    assert first == again


def test_metrics_report_every_row():
    weights = [tf.Variable([0.0], name="a"), tf.Variable([0.0], name="b")]
    clip = NormClip(2.0, scope="parameter")
    clip([(tf.constant([3.0]), weights[0]), (tf.constant([1.0]), weights[1])])
    metrics = clip.metrics(per_row=True)
    assert metrics["clip/norm"] == pytest.approx(np.sqrt(10.0), rel=1e-6)
    assert metrics["clip/norm_after"] == pytest.approx(np.sqrt(5.0), rel=1e-6)
    assert metrics["clip/clipped"] == 0.5
    assert metrics["clip/scale/a"] == pytest.approx(2 / 3, rel=1e-6)
    assert (metrics["clip/norm/b"], metrics["clip/clip_rate/b"]) == (1.0, 0.0)
    log = ClipLog()
    log.record(metrics)
    [largest] = log.largest
    assert largest.rows == (("a", pytest.approx(1.5)),)


def test_values_are_clamped_and_the_decision_reports_it():
    weights = [tf.Variable([0.0, 0.0]), tf.Variable([0.0])]
    clip = ValueClip(2.0)
    pairs = clip(
        [(tf.constant([3.0, -1.0]), weights[0]), (tf.constant([1.0]), weights[1])]
    )
    np.testing.assert_array_equal(pairs[0][0], [2.0, -1.0])
    np.testing.assert_array_equal(pairs[1][0], [1.0])
    decision = clip.decision
    np.testing.assert_allclose(decision.norm, np.sqrt([10.0, 1.0]), rtol=1e-6)
    np.testing.assert_allclose(decision.scale, [np.sqrt(5 / 10), 1.0], rtol=1e-6)
    assert decision.clipped.tolist() == [True, False]
    assert decision.threshold.tolist() == [2.0, 2.0]
    clip([(tf.constant([np.nan, 9.0]), weights[0]), (tf.constant([9.0]), weights[1])])
    assert clip.decision.scale.tolist() == pytest.approx([0.0, 2 / 9])


@every_clipper()
def test_a_configuration_restores_the_same_clipper(name):
    common = {"scope": "global", "nonfinite": "propagate"}
    limits = {"min_threshold": 0.5, "max_threshold": 7.0}
    if name == "ValueClip":
        limits = {}
    exclude = ["head", re.compile("bias$")]
    clip = CLIPPERS[name](**common, **limits, exclude=exclude, dry_run=True)
    saved = keras.saving.serialize_keras_object(clip)
    restored = keras.saving.deserialize_keras_object(saved)
    assert type(restored) is type(clip)
    assert restored.get_config() == clip.get_config()
    assert restored.policy == clip.policy
    assert repr(restored) == repr(clip)
    assert restored._settings.exclude == exclude


@pytest.mark.parametrize("code", [c for c in STATIC if "skip" not in c])
def test_any_policy_is_restored_from_its_configuration(code):
    clip = Clipper(policy_of(code), scope="global")
    saved = keras.saving.serialize_keras_object(clip)
    restored = keras.saving.deserialize_keras_object(json.loads(json.dumps(saved)))
    assert restored.policy == clip.policy == policy_of(code)


@keras.saving.register_keras_serializable("tests")
def is_bias(path, variable):
    return path.endswith("bias")


def test_a_registered_function_may_exclude_and_is_saved():
    restored = QuantileClip.from_config(QuantileClip(exclude=is_bias).get_config())
    assert restored._settings.exclude == [is_bias]


WRONG = {
    "an unbounded history": (
        lambda: QuantileClip(history_length=None),
        r"history_length must be a number .* got None; set history_length=1000",
    ),
    "a percentile": (lambda: QuantileClip(90), r"quantile must be in \[0, 1\].*0\.9"),
    "skip": (lambda: QuantileClip(nonfinite="skip"), r"nonfinite must be.*TerminateOn"),
    "raise": (lambda: QuantileClip(nonfinite="raise"), r"nonfinite must be.*Terminate"),
    "a policy that cancels updates": (
        lambda: Clipper(Drop(Fixed(1.0), action="skip")),
        r"policy must be without Drop\(action=\"skip\"\).*action=\"zero\"",
    ),
    "groups": (lambda: QuantileClip(scope="group"), r"scope must be.*exclude="),
    "two scopes": (
        lambda: QuantileClip(scope="parameter", global_clipping=True),
        r"global_clipping must be in agreement with scope='parameter'",
    ),
    "axes at another scope": (
        lambda: AGC(scope="global", axes={"k": (0,)}),
        r"axes must be given only at scope",
    ),
    "a rule at another scope": (
        lambda: AGC(scope="global", rule="layer"),
        r"rule must be given only at scope",
    ),
    "no policy": (lambda: Clipper(Quantile), r"policy must be a policy"),
    "a number to exclude": (lambda: QuantileClip(exclude=[3]), r"exclude must hold"),
    "no clip value": (lambda: ValueClip(0.0), r"clip_value must be > 0"),
    "a misspelt keyword": (
        lambda: QuantileClip(quantil=0.9),
        r"quantil is no argument of QuantileClip; it takes quantile, history_length",
    ),
    "a keyword of a policy": (
        lambda: ValueClip(1.0, max_threshold=2.0),
        r"max_threshold is no argument of ValueClip",
    ),
    "a loss policy": (
        lambda: QuantileClip(loss_policy=Fixed(1.0)),
        r"loss_policy is no argument of QuantileClip: .* leave optimizer.apply out",
    ),
    "a loss policy of any policy": (
        lambda: Clipper(Quantile(), loss_policy=Fixed(1.0)),
        r"loss_policy is no argument of Clipper: .* leave optimizer.apply out",
    ),
    "an odd dry run": (lambda: QuantileClip(dry_run=1), r"dry_run must be True or"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_argument_is_named_with_its_way_out(case):
    make, words = WRONG[case]
    with pytest.raises((ValueError, TypeError), match=words):
        make()


def test_nothing_left_to_clip_is_an_error():
    clip = QuantileClip(exclude="*")
    with pytest.raises(ValueError, match="exclude must leave a variable to clip"):
        clip([(tf.constant([1.0]), tf.Variable([0.0], name="w"))])
    with pytest.raises(ValueError, match=r"exclude must match.*'absent'.*names are w"):
        QuantileClip(exclude="absent").build([tf.Variable([0.0], name="w")])


def test_a_custom_policy_must_be_registered():
    config = Clipper(Fixed(1.0)).get_config()
    config["policy"] = {**config["policy"], "type": "CustomPolicy"}
    with pytest.raises(ValueError, match="register your own policy"):
        Clipper.from_config(config)
    with keras.saving.custom_object_scope({"CustomPolicy": Fixed}):
        assert Clipper.from_config(config).policy == Fixed(1.0)


def test_every_clipper_of_the_other_packages_is_exported():
    names = {
        "QuantileClip",
        "StandardClip",
        "AGC",
        "ZClip",
        "AdaGC",
        "NormClip",
        "ValueClip",
        "Clipper",
    }
    assert names <= set(vars(autoclip_tf))
    assert autoclip_tf.__version__ == autoclip_core.__version__


def test_one_trace_serves_every_step():
    weight, clip, traces = tf.Variable([0.0, 0.0]), QuantileClip(0.9), []

    @tf.function
    def step(gradient):
        traces.append(1)
        return clip([(gradient, weight)])[0][0]

    for n in range(100):
        step(tf.constant([float(n), 1.0]))
    assert len(traces) <= 2  # the first trace creates the variables
    assert clip.metrics()["clip/steps"] == 100


def test_a_tensorflow_checkpoint_restores_a_clipper(tmp_path):
    weight, clip = tf.Variable([0.0]), QuantileClip(0.5, history_length=3)
    for n in [1.0, 5.0, 2.0]:
        [_] = clip([(tf.constant([n]), weight)])
    path = tf.train.Checkpoint(clipper=clip).save(tmp_path / "state")
    restored = QuantileClip(0.5, history_length=3)
    restored.build([weight])
    tf.train.Checkpoint(clipper=restored).restore(path).assert_consumed()
    for n in [3.0, 8.0, 1.0]:
        pair = tf.constant([n]), weight
        assert clip([pair])[0][0].numpy() == restored([pair])[0][0].numpy()
    metrics = restored.metrics()
    assert metrics.pop("clip/other_clippers") == 1.0  # the loop calls both
    assert clip.metrics() == metrics
