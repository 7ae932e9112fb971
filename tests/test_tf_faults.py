"""The fault battery in Keras on TensorFlow: eager, in a graph, under XLA.

The clippers, and what is compiled for them, are shared by all cases and reset.
"""

from functools import cache

import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from autoclip_tf import Clipper

from .account import POLICIES, Seen, check
from .cases import few
from .faults import CASES, drawn

MODES = {
    "eager": lambda step: step,
    "graph": tf.function,
    "xla": lambda step: tf.function(step, jit_compile=True),
}


@cache
def clipper_of(policy, scope, shapes):
    weights = [
        tf.Variable(tf.ones(shape), name=f"w{i}") for i, shape in enumerate(shapes)
    ]
    clip = Clipper(POLICIES[policy][0], scope=scope)
    clip.build(weights)
    return clip, weights


@cache
def stepper(mode, present, *clipper):
    """A step for gradients of which these are present."""
    clip, weights = clipper_of(*clipper)

    def step(*given):
        rest = iter(given)
        grads = [next(rest) if here else None for here in present]
        return [g for g, _ in clip(zip(grads, weights, strict=True))]

    return MODES[mode](step)


# Of a step that takes milliseconds to dispatch, the shorter cases will do; and XLA
# computes as a graph does but for fused products, so one policy is enough there.
EAGER = [
    name
    for name in CASES
    if CASES[name].steps <= 30 and not name.endswith(("fills", "middle"))
]
RUNS = [(name, "eager", "quantile", "parameter") for name in EAGER] + [
    (name, mode, policy, scope)
    for name in CASES
    for mode, policy, scope in [
        ("graph", "mean_std", "parameter"),
        ("graph", "quantile", "global"),
        ("xla", "quantile", "parameter"),
    ]
]


@pytest.mark.parametrize(("name", "mode", "policy", "scope"), RUNS)
def test_keras(name, mode, policy, scope):
    run(CASES[name], mode, policy, scope)


@few
@given(drawn(), st.sampled_from([*POLICIES]), st.sampled_from(["parameter", "global"]))
def test_any_series(case, policy, scope):
    run(case, "eager", policy, scope)


def run(case, mode, policy, scope):
    """Take a series through a clipper, and check it."""
    clipper, steps = (policy, scope, tuple(shape for shape, _ in case.layout)), []
    clip, _ = clipper_of(*clipper)
    clip.reset()
    for grads in case.series():
        present = tuple(grad is not None for grad in grads)
        if not any(present):  # Keras does not call a transformer without any gradient
            steps.append(None)
            continue
        given = [
            tf.constant(grad, dtype)
            for grad, (_, dtype) in zip(grads, case.layout, strict=True)
            if grad is not None
        ]
        results = stepper(mode, present, *clipper)(*given)
        memory = clip._on_host()
        steps.append(Seen(memory.decision, memory.tally, list(map(in_numpy, results))))
    check(case, policy, steps, scope)


def in_numpy(gradient):
    """A gradient, in NumPy, which has no bfloat16."""
    if gradient is None:
        return None
    wide = gradient.dtype == tf.bfloat16
    return (tf.cast(gradient, tf.float32) if wide else gradient).numpy()
