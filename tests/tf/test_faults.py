"""The fault battery in Keras on TensorFlow: under XLA, in a graph, eager.

Graphs and XLA compile again for each type and each pattern of absent gradients, and an
eager step takes 30 ms. Therefore most series, those of one type and pattern, run under
XLA, and the short ones in a graph too, with every pair of policy and scope. The others
run under XLA with two pairs and eagerly with one. All cases share the clippers, which
are reset, and one compiled function for all clippers.
"""

from functools import cache, lru_cache

import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from autoclip_tf import Clipper

from ..support.account import NORMS, POLICIES, SCOPES, StepResult, check
from ..support.cases import fewer_examples
from ..support.faults import CASES, drawn, layout_of

MODES = {
    "eager": lambda step: step,
    "graph": tf.function,
    "xla": lambda step: tf.function(step, jit_compile=True),
}
PAIRS = [(policy, scope) for policy in POLICIES for scope in SCOPES]


def has_usual_pattern(case):
    """Return whether most series have this type and pattern of absent gradients."""
    present = {tuple(grad is not None for grad in grads) for grads in case.series()}
    is_whole = all(len(set(pattern)) == 1 for pattern in present)
    return is_whole and case.layout == layout_of("float32")


USUAL = {name for name, case in CASES.items() if has_usual_pattern(case)}
SHORT = [
    name
    for name in CASES
    if CASES[name].steps <= 30 and not name.endswith(("fills", "middle"))
]
# These resemble "a parameter that comes and goes".
EAGER_ONLY = ["a parameter that appears", "a parameter that vanishes"]


def pairs_of(name):
    """Return the pairs that run a series in compiled steps."""
    return PAIRS if name in USUAL else PAIRS[::3]


COMPILED = [
    *(("graph", name, *pair) for name in SHORT if name in USUAL for pair in PAIRS),
    *(
        ("xla", name, *pair)
        for name in CASES
        if name not in EAGER_ONLY
        for pair in pairs_of(name)
    ),
]
OTHERS = [name for name in CASES if name not in USUAL]
EAGER = [(name, *PAIRS[place % 4]) for place, name in enumerate(OTHERS)]


@cache
def variables(layout):
    return [
        tf.Variable(tf.ones(shape), name=f"w{place}")
        for place, (shape, _) in enumerate(layout)
    ]


@cache
def clipper(policy, scope, layout):
    clip = Clipper(POLICIES[policy][0], scope=scope, norm=NORMS[policy, scope])
    clip.build(variables(layout))
    return clip


@cache
def stepper(mode, present, layout, pairs):
    """Return a step of these clippers for a pattern of present gradients."""
    weights, clippers = variables(layout), [clipper(*pair, layout) for pair in pairs]

    def step(*arrays):
        remaining = iter(arrays)
        grads = [next(remaining) if has_grad else None for has_grad in present]
        return [take_step(clip, grads, weights) for clip in clippers]

    return MODES[mode](step)


def take_step(clip, grads, weights):
    """Return the decision, the tally and the gradients of a step as tensors."""
    results = [grad for grad, _ in clip(zip(grads, weights, strict=True))]
    state = clip._state.read()
    return StepResult(state.decision, state.tally, results)


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
        steps.append(tf.nest.map_structure(to_numpy, results))
    return list(zip(*steps, strict=True))


def to_numpy(tensor):
    """Return a tensor in NumPy, with bfloat16 as float32; None stays None."""
    if tensor is None:
        return None
    wide = tensor.dtype == tf.bfloat16
    return (tf.cast(tensor, tf.float32) if wide else tensor).numpy()


@lru_cache(1)  # the tests of all pairs use it
def compiled(mode, name):
    return results_of(CASES[name], mode, tuple(pairs_of(name)))


@pytest.mark.parametrize(("mode", "name", "policy", "scope"), COMPILED)
def test_compiled_steps(mode, name, policy, scope):
    steps = compiled(mode, name)[pairs_of(name).index((policy, scope))]
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
