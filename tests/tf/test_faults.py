"""The fault battery in Keras on TensorFlow: eager, in a graph, under XLA.

Compiled steps run every series with every pair of policy and scope. An eager step
takes milliseconds and runs the same kernels as a graph. Therefore only every other
short series runs eagerly, with one pair. All cases share the clippers, which are reset,
and one compiled function for all clippers.
"""

from functools import cache, lru_cache

import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from autoclip_tf import Clipper

from ..support.account import POLICIES, SCOPES, StepResult, check
from ..support.cases import fewer_examples
from ..support.faults import CASES, drawn

MODES = {
    "eager": lambda step: step,
    "graph": tf.function,
    "xla": lambda step: tf.function(step, jit_compile=True),
}
PAIRS = [(policy, scope) for policy in POLICIES for scope in SCOPES]
SHORT = [
    name
    for name in CASES
    if CASES[name].steps <= 30 and not name.endswith(("fills", "middle"))
]
EAGER = [(name, *PAIRS[place % 4]) for place, name in enumerate(SHORT[::2])]


@cache
def variables(layout):
    return [
        tf.Variable(tf.ones(shape), name=f"w{place}")
        for place, (shape, _) in enumerate(layout)
    ]


@cache
def clipper(policy, scope, layout):
    clip = Clipper(POLICIES[policy][0], scope=scope)
    clip.build(variables(layout))
    return clip


@cache
def stepper(mode, present, layout, pairs):
    """Return a step of these clippers for a pattern of present gradients."""
    weights, clippers = variables(layout), [clipper(*pair, layout) for pair in pairs]

    def step(*arrays):
        remaining = iter(arrays)
        grads = [next(remaining) if has_grad else None for has_grad in present]
        return [
            [grad for grad, _ in clip(zip(grads, weights, strict=True))]
            for clip in clippers
        ]

    return MODES[mode](step)


def results_of(case, mode, pairs):
    """Return the results of all steps for each clipper."""
    clippers, steps = [clipper(*pair, case.layout) for pair in pairs], []
    for clip in clippers:
        clip.reset()
    for grads in case.series():
        present = tuple(grad is not None for grad in grads)
        if not any(present):  # Keras does not call a transformer without any gradient
            steps.append([None] * len(pairs))
            continue
        arrays = [
            tf.constant(grad, dtype)
            for grad, (_, dtype) in zip(grads, case.layout, strict=True)
            if grad is not None
        ]
        results = stepper(mode, present, case.layout, pairs)(*arrays)
        steps.append(list(map(in_numpy, clippers, results)))
    return list(zip(*steps, strict=True))


def in_numpy(clip, results):
    """Return the results of a step in NumPy."""
    state = clip._read_numpy()
    return StepResult(state.decision, state.tally, list(map(to_numpy, results)))


def to_numpy(gradient):
    """Return a gradient in NumPy, with bfloat16 as float32."""
    if gradient is None:
        return None
    wide = gradient.dtype == tf.bfloat16
    return (tf.cast(gradient, tf.float32) if wide else gradient).numpy()


@lru_cache(1)  # the tests of all pairs use it
def compiled(mode, name):
    return results_of(CASES[name], mode, tuple(PAIRS))


@pytest.mark.parametrize(("policy", "scope"), PAIRS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("mode", ["graph", "xla"])
def test_compiled_steps(mode, name, policy, scope):
    steps = compiled(mode, name)[PAIRS.index((policy, scope))]
    check(CASES[name], policy, steps, scope)


@pytest.mark.parametrize(("name", "policy", "scope"), EAGER)
def test_eager_steps(name, policy, scope):
    run(CASES[name], (policy, scope))


@fewer_examples
@given(drawn(), st.sampled_from(PAIRS))
def test_any_series(case, pair):
    run(case, pair)


def run(case, pair):
    """Run a series eagerly through one clipper and check the results."""
    [steps] = results_of(case, "eager", (pair,))
    check(case, pair[0], steps, pair[1])
