"""The fault battery in Keras on TensorFlow: eager, in a graph, under XLA.

Compiled, every pair of policy and scope takes every series. An eager step takes
milliseconds and runs the kernels of a graph, so every other short series runs eagerly,
with one pair each. All cases share the clippers, which are reset, and the function
that is compiled for all of them together.
"""

from functools import cache, lru_cache

import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from autoclip_tf import Clipper

from ..support.account import POLICIES, SCOPES, Seen, check
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
BY_TURNS = [(name, *PAIRS[place % 4]) for place, name in enumerate(SHORT[::2])]


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
    """A step of these clippers for gradients of which these are present."""
    weights, clippers = variables(layout), [clipper(*pair, layout) for pair in pairs]

    def step(*given):
        rest = iter(given)
        grads = [next(rest) if here else None for here in present]
        return [
            [grad for grad, _ in clip(zip(grads, weights, strict=True))]
            for clip in clippers
        ]

    return MODES[mode](step)


def taken(case, mode, pairs):
    """What each clipper made of each step."""
    clippers, steps = [clipper(*pair, case.layout) for pair in pairs], []
    for clip in clippers:
        clip.reset()
    for grads in case.series():
        present = tuple(grad is not None for grad in grads)
        if not any(present):  # Keras does not call a transformer without any gradient
            steps.append([None] * len(pairs))
            continue
        given = [
            tf.constant(grad, dtype)
            for grad, (_, dtype) in zip(grads, case.layout, strict=True)
            if grad is not None
        ]
        results = stepper(mode, present, case.layout, pairs)(*given)
        steps.append([seen(*one) for one in zip(clippers, results, strict=True)])
    return list(zip(*steps, strict=True))


def seen(clip, results):
    """What a step made, in NumPy."""
    state = clip._read_numpy()
    return Seen(state.decision, state.tally, list(map(in_numpy, results)))


def in_numpy(gradient):
    """A gradient, in NumPy, which has no bfloat16."""
    if gradient is None:
        return None
    wide = gradient.dtype == tf.bfloat16
    return (tf.cast(gradient, tf.float32) if wide else gradient).numpy()


@lru_cache(1)  # a test for each pair asks
def compiled(mode, name):
    return taken(CASES[name], mode, tuple(PAIRS))


@pytest.mark.parametrize(("policy", "scope"), PAIRS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("mode", ["graph", "xla"])
def test_compiled_steps(mode, name, policy, scope):
    steps = compiled(mode, name)[PAIRS.index((policy, scope))]
    check(CASES[name], policy, steps, scope)


@pytest.mark.parametrize(("name", "policy", "scope"), BY_TURNS)
def test_eager_steps(name, policy, scope):
    run(CASES[name], (policy, scope))


@fewer_examples
@given(drawn(), st.sampled_from(PAIRS))
def test_any_series(case, pair):
    run(case, pair)


def run(case, pair):
    """Take a series through one clipper eagerly, and check it."""
    [steps] = taken(case, "eager", (pair,))
    check(case, pair[0], steps, pair[1])
