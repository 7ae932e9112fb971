"""The fault battery in JAX: each step jitted, and all of them in one `lax.scan`."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

from autoclip_core import Decision
from autoclip_jax import clip_by_policy

from .account import POLICIES, Seen, check
from .cases import few
from .faults import CASES, drawn

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

RUNS = [("mean_std", "parameter"), ("quantile", "global")]
"""And `lax.scan` takes the quantile of each parameter."""


@cache
def updater(policy, scope):
    """The transformation and its jitted update, which all cases share."""
    tx = clip_by_policy(POLICIES[policy][0], scope=scope)
    return tx, jax.jit(tx.update)


def started(tx, case):
    return tx.init([jnp.zeros(shape, dtype) for shape, dtype in case.layout])


def updates_of(case):
    """The gradients of each step in the types of the case."""
    for grads in case.series():
        pairs = zip(grads, case.layout, strict=True)
        yield [
            None if grad is None else grad.astype(jnp.dtype(dtype))
            for grad, (_, dtype) in pairs
        ]


def seen(state, updates):
    """What a step made, in NumPy."""
    _, *fields, tally = jax.device_get(state)
    decision = Decision(*fields, skipped=np.zeros_like(state.clip_finite))
    return Seen(decision, tally, list(map(in_numpy, updates)))


def in_numpy(update):
    """An update, in NumPy, which has no bfloat16."""
    if update is None:
        return None
    update = np.asarray(update)
    return update.astype(np.float32) if update.dtype == jnp.bfloat16 else update


def run(case, policy, scope, jit=True):
    """Take a series through the update, and check it."""
    tx, update = updater(policy, scope)
    state, steps = started(tx, case), []
    for grads in updates_of(case):
        updates, state = (update if jit else tx.update)(grads, state)
        steps.append(seen(state, updates))
    check(case, policy, steps, scope)


@pytest.mark.parametrize(("policy", "scope"), RUNS)
@pytest.mark.parametrize("name", NARROW)
def test_jit(name, policy, scope):
    run(CASES[name], policy, scope)


@few
@given(drawn(), st.sampled_from(RUNS))
def test_any_series(case, how):
    """What is jitted anew for each None would take long; `learn` is in any case."""
    run(case, *how, jit=False)


@cache
def scanner():
    tx, _ = updater("quantile", "parameter")

    def step(state, grads):
        updates, state = tx.update(grads, state)
        return state, (state, updates)

    return jax.jit(lambda state, series: lax.scan(step, state, series)[1])


@pytest.mark.parametrize("name", WHOLE)
def test_scan(name):
    case, (tx, _) = CASES[name], updater("quantile", "parameter")
    steps = list(updates_of(case))
    same = steps + [steps[-1]] * (LONGEST - len(steps))  # one compilation for all
    series = [np.stack(grads) for grads in zip(*same, strict=True)]
    states, updates = jax.device_get(scanner()(started(tx, case), series))
    found = [
        seen(*jax.tree.map(lambda leaf: leaf[step], (states, updates)))  # noqa: B023
        for step in range(len(steps))
    ]
    check(case, "quantile", found)
