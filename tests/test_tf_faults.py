"""The fault battery in Keras on TensorFlow: eager, in a graph, under XLA.

The clippers, and what is compiled for them, are shared by all cases and reset.
"""

from functools import cache

import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from autoclip_tf import Clipper

from . import faults
from .cases import few
from .faults import CASES, POLICIES, SHAPES, drawn

MODES = {
    "eager": lambda step: step,
    "graph": tf.function,
    "xla": lambda step: tf.function(step, jit_compile=True),
}


@cache
def clipper_of(policy):
    weights = [
        tf.Variable(tf.ones(shape), name=f"w{i}") for i, shape in enumerate(SHAPES)
    ]
    clip = Clipper(POLICIES[policy][0])
    clip.build(weights)
    return clip, weights


@cache
def stepper(policy, mode, present):
    """A step for gradients of which these are present."""
    clip, weights = clipper_of(policy)

    def step(*given):
        rest = iter(given)
        grads = [next(rest) if here else None for here in present]
        return [g for g, _ in clip(zip(grads, weights, strict=True))]

    return MODES[mode](step)


# Of a step that takes milliseconds to dispatch, the shorter cases will do; and XLA
# computes as a graph does but for fused products, so one policy is enough there.
EAGER = [name for name in CASES if CASES[name].steps <= 60 and "fills" not in name]
RUNS = [(name, "eager", "quantile") for name in EAGER] + [
    (name, mode, policy)
    for name in CASES
    for mode, policy in [
        ("graph", "quantile"),
        ("graph", "mean_std"),
        ("xla", "quantile"),
    ]
]


@pytest.mark.parametrize(("name", "mode", "policy"), RUNS)
def test_keras(name, mode, policy):
    run(CASES[name], mode, policy)


@few
@given(drawn(), st.sampled_from([("graph", "quantile"), ("graph", "mean_std")]))
def test_any_series(case, how):
    run(case, *how)


def run(case, mode, policy):
    """Take a series through a clipper, and check it."""
    clip, _ = clipper_of(policy)
    clip.reset()
    thresholds, results = [], []
    for grads in case.series():
        present = tuple(grad is not None for grad in grads)
        if any(present):
            step = stepper(policy, mode, present)
            found = step(*(tf.constant(grad) for grad in grads if grad is not None))
            results.append([None if g is None else g.numpy() for g in found])
            thresholds.append(clip.decision.threshold)
        else:  # Keras does not call a transformer without any gradient
            results.append([None] * len(SHAPES))
            thresholds.append(_expected(case, policy, len(results) - 1))
    faults.check(case, POLICIES[policy][1], thresholds, results)


def _expected(case, policy, step):
    """The thresholds of a step in which there is nothing to call."""
    past = [[] for _ in SHAPES]
    for grads, _ in zip(case.series(), range(step), strict=False):
        for norms, grad in zip(past, grads, strict=True):
            if grad is not None and 0 < (norm := faults.norm_of(grad)) < faults.INF:
                norms.append(norm)
    return [POLICIES[policy][1](norms) for norms in past]
