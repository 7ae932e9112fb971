"""The fault battery in JAX: each step jitted, and all of them in one `lax.scan`.

Every pair of policy and scope takes every series. One compiled step holds them all.
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

from ..support.account import POLICIES, SCOPES, Seen, check
from ..support.cases import fewer_examples
from ..support.faults import CASES, drawn

NARROW = [  # JAX has no float64 unless it is told to
    name
    for name, case in CASES.items()
    if all(dtype != "float64" for _, dtype in case.layout)
]
WHOLE = [
    name
    for name in NARROW
    if all(grad is not None for grads in CASES[name].series() for grad in grads)
]
"""Cases that `lax.scan` can take: a None would be another structure."""
LONGEST = max(CASES[name].steps for name in WHOLE)

CLIPPERS = {
    (policy, scope): clip_by_policy(POLICIES[policy][0], scope=scope)
    for policy in POLICIES
    for scope in SCOPES
}
every_pair = pytest.mark.parametrize(("policy", "scope"), CLIPPERS)


def fresh(case):
    """The states of all clippers."""
    params = [jnp.zeros(shape, dtype) for shape, dtype in case.layout]
    return [tx.init(params) for tx in CLIPPERS.values()]


def update(states, grads):
    """A step of all clippers: the states, and the states with the updates."""
    pairs = zip(CLIPPERS.values(), states, strict=True)
    made = [tx.update(grads, state)[::-1] for tx, state in pairs]
    return [state for state, _ in made], made


jitted = jax.jit(update)
scanned = jax.jit(lambda states, series: lax.scan(update, states, series)[1])


def updates_of(case):
    """The gradients of each step in the types of the case."""
    for grads in case.series():
        pairs = zip(grads, case.layout, strict=True)
        yield [
            None if grad is None else grad.astype(jnp.dtype(dtype))
            for grad, (_, dtype) in pairs
        ]


@lru_cache(1)  # a test for each clipper asks
def one_by_one(name):
    """What each jitted step made."""
    states, steps = fresh(CASES[name]), []
    for grads in updates_of(CASES[name]):
        states, made = jitted(states, grads)
        steps.append(jax.device_get(made))
    return steps


@lru_cache(1)
def in_one_scan(name):
    """What each step made, after all of them; the last is repeated.

    So all series are of one length, which is one compilation.
    """
    steps = list(updates_of(CASES[name]))
    same = steps + [steps[-1]] * (LONGEST - len(steps))
    series = [np.stack(grads) for grads in zip(*same, strict=True)]
    made = jax.device_get(scanned(fresh(CASES[name]), series))
    return [
        jax.tree.map(lambda leaf: leaf[step], made)  # noqa: B023
        for step in range(len(steps))
    ]


def check_one(name, policy, scope, steps):
    """Compare what one of the clippers made with the account."""
    place = [*CLIPPERS].index((policy, scope))
    check(CASES[name], policy, [seen(*made[place]) for made in steps], scope)


def seen(state, updates):
    """What a step made, in NumPy."""
    _, *fields, tally = state
    decision = Decision(*fields, skipped=np.zeros_like(state.clip_finite))
    return Seen(decision, tally, list(map(in_numpy, updates)))


def in_numpy(update):
    """An update, in NumPy, which has no bfloat16."""
    if update is None:
        return None
    update = np.asarray(update)
    return update.astype(np.float32) if update.dtype == jnp.bfloat16 else update


@every_pair
@pytest.mark.parametrize("name", NARROW)
def test_jitted_steps(name, policy, scope):
    check_one(name, policy, scope, one_by_one(name))


@every_pair
@pytest.mark.parametrize("name", WHOLE)
def test_one_scan(name, policy, scope):
    check_one(name, policy, scope, in_one_scan(name))


@fewer_examples
@given(drawn(), st.sampled_from([*CLIPPERS]))
def test_any_series(case, how):
    """What is jitted anew for each None would take long; `learn` is in any case."""
    tx, steps = CLIPPERS[how], []
    state = tx.init([jnp.zeros(shape, dtype) for shape, dtype in case.layout])
    for grads in updates_of(case):
        updates, state = tx.update(grads, state)
        steps.append(seen(jax.device_get(state), updates))
    check(case, how[0], steps, how[1])
