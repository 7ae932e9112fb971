"""The fault battery in JAX: each step jitted, and all of them in one `lax.scan`."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

from autoclip_jax import clip_by_policy

from . import faults
from .cases import few
from .faults import CASES, POLICIES, SHAPES, drawn

WHOLE = [
    name
    for name, case in CASES.items()
    if all(grad is not None for grads in case.series() for grad in grads)
]
"""Cases that `lax.scan` can take: a None would be another structure."""


@cache
def updater(policy):
    """The transformation and its jitted update, which all cases share."""
    tx = clip_by_policy(POLICIES[policy][0])
    return tx, jax.jit(tx.update)


def started(tx, case):
    return tx.init([jnp.zeros(shape, case.dtype) for shape in SHAPES])


def run(case, policy):
    """Take a series through the jitted update, and check it."""
    tx, update = updater(policy)
    state, thresholds, results = started(tx, case), [], []
    for grads in case.series():
        updates, state = update(grads, state)
        thresholds.append(np.asarray(state.clip_threshold))
        results.append(updates)
    faults.check(case, POLICIES[policy][1], thresholds, results)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", CASES)
def test_jit(name, policy):
    run(CASES[name], policy)


@few
@given(drawn(), st.sampled_from([*POLICIES]))
def test_any_series(case, policy):
    run(case, policy)


@cache
def scanner(policy):
    tx, _ = updater(policy)

    def step(state, grads):
        updates, state = tx.update(grads, state)
        return state, (state.clip_threshold, updates)

    return jax.jit(lambda state, series: lax.scan(step, state, series)[1])


@pytest.mark.parametrize("name", WHOLE)
def test_scan(name):
    case, (tx, _) = CASES[name], updater("quantile")
    steps = list(case.series())
    series = [jnp.stack(grads) for grads in zip(*steps, strict=True)]
    thresholds, updates = scanner("quantile")(started(tx, case), series)
    results = [[grads[step] for grads in updates] for step in range(len(steps))]
    faults.check(case, POLICIES["quantile"][1], thresholds, results)
