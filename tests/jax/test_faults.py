"""The fault battery in JAX: jitted steps, and all steps in one `lax.scan`.

Every series runs with every pair of policy and scope. One compiled step contains all
pairs.
"""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

from autoclip_core import Decision
from autoclip_jax import clip_by_policy
from autoclip_jax.state import restore_names

from ..support.account import NORMS, POLICIES, StepResult, check
from ..support.cases import fewer_examples
from ..support.faults import CASES, drawn

NARROW = [  # by default JAX has no float64
    name
    for name, case in CASES.items()
    if all(dtype != "float64" for _, dtype in case.layout)
]
WHOLE = [
    name
    for name in NARROW
    if all(grad is not None for grads in CASES[name].series() for grad in grads)
]
"""Cases for `lax.scan`, which needs the same structure, without None, in every step."""
STEPWISE = [name for name in NARROW if name not in WHOLE] + ["nothing"]
"""Cases for jitted steps: those with None, and one that also runs in `lax.scan`."""
LONGEST = max(CASES[name].steps for name in WHOLE)

CLIPPERS = {
    (policy, scope): clip_by_policy(POLICIES[policy][0], scope=scope, norm=norm)
    for (policy, scope), norm in NORMS.items()
}
every_pair = pytest.mark.parametrize(("policy", "scope"), CLIPPERS)


def initial_states(case):
    """Return the initial states of all clippers."""
    params = [jnp.zeros(shape, dtype) for shape, dtype in case.layout]
    return [tx.init(params) for tx in CLIPPERS.values()]


def update(states, grads):
    """Run a step of all clippers; return the states, and pairs of state and update."""
    pairs = zip(CLIPPERS.values(), states, strict=True)
    results = [tx.update(grads, state)[::-1] for tx, state in pairs]
    return [state for state, _ in results], results


jitted = jax.jit(update)
scanned = jax.jit(lambda states, series: lax.scan(update, states, series)[1])


def updates_of(case):
    """Yield the gradients of each step in the types of the case."""
    for grads in case.series():
        pairs = zip(grads, case.layout, strict=True)
        yield [
            None if grad is None else grad.astype(jnp.dtype(dtype))
            for grad, (_, dtype) in pairs
        ]


@lru_cache(1)  # the tests of all clippers use it
def one_by_one(name):
    """Return the results of each jitted step."""
    states, steps = initial_states(CASES[name]), []
    for grads in updates_of(CASES[name]):
        states, results = jitted(states, grads)
        steps.append(jax.device_get(results))
    return steps


@lru_cache(1)
def in_one_scan(name):
    """Return the results of each step of a scan.

    The last step is repeated until all series have one length, to compile once.
    """
    steps = list(updates_of(CASES[name]))
    padded = steps + [steps[-1]] * (LONGEST - len(steps))
    series = [np.stack(grads) for grads in zip(*padded, strict=True)]
    results = jax.device_get(scanned(initial_states(CASES[name]), series))
    return [
        jax.tree.map(lambda leaf: leaf[step], results)  # noqa: B023
        for step in range(len(steps))
    ]


def check_one(name, policy, scope, steps):
    """Compare the results of one of the clippers with the account."""
    place = [*CLIPPERS].index((policy, scope))
    numpy_steps = [in_numpy(*results[place]) for results in steps]
    check(CASES[name], policy, numpy_steps, scope)


def in_numpy(state, updates):
    """Return the results of a step in NumPy."""
    no = np.zeros_like(state.clip_finite)
    decision = Decision(*state[1:6], skipped=no, dropped=no)
    tally = restore_names(state.clip_tally)
    return StepResult(decision, tally, list(map(to_numpy, updates)))


def to_numpy(update):
    """Return an update in NumPy, with bfloat16 as float32."""
    if update is None:
        return None
    update = np.asarray(update)
    return update.astype(np.float32) if update.dtype == jnp.bfloat16 else update


@every_pair
@pytest.mark.parametrize("name", STEPWISE)
def test_jitted_steps(name, policy, scope):
    check_one(name, policy, scope, one_by_one(name))


@every_pair
@pytest.mark.parametrize("name", WHOLE)
def test_one_scan(name, policy, scope):
    check_one(name, policy, scope, in_one_scan(name))


@fewer_examples
@given(drawn(), st.sampled_from([*CLIPPERS]))
def test_any_series(case, pair):
    """The steps are not jitted: each pattern of None would be compiled again."""
    tx, steps = CLIPPERS[pair], []
    state = tx.init([jnp.zeros(shape, dtype) for shape, dtype in case.layout])
    for grads in updates_of(case):
        updates, state = tx.update(grads, state)
        steps.append(in_numpy(jax.device_get(state), updates))
    check(case, pair[0], steps, pair[1])
