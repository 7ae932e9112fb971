"""Comparison with the transformations of optax, jitted, over many steps."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from autoclip_core import Fixed
from autoclip_jax import clip_by_param_ratio, clip_by_policy

SHAPES = {"kernel": (4, 3), "bias": (3,), "conv": (3, 3, 2, 4), "gain": ()}


def trees(steps, level):
    """Yield trees of updates whose norms have heavy tails."""
    rng = np.random.default_rng(3)
    for _ in range(steps):
        yield {
            name: jnp.asarray(level * np.exp(rng.normal()) * rng.normal(size=shape))
            for name, shape in SHAPES.items()
        }


def compare(tx, reference, params, series):
    """Compare each step of two transformations; return the states of the first one."""
    # Both start each step from the same weights, so rounding does not add up.
    state, reference_state = tx.init(params), reference.init(params)
    states = []
    for updates in series:
        got, state = jax.jit(tx.update)(updates, state, params)
        wanted, reference_state = jax.jit(reference.update)(
            updates, reference_state, params
        )
        jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-6), got, wanted)
        params = optax.apply_updates(params, jax.tree.map(lambda u: -0.05 * u, wanted))
        states.append(state)
    return states


def test_global_norm_clipping_is_that_of_optax():
    """`Fixed(c)` with `scope="global"` equals `clip_by_global_norm(c)`."""
    (params,) = trees(1, 1.0)
    states = compare(
        clip_by_policy(Fixed(3.0), scope="global"),
        optax.clip_by_global_norm(3.0),
        params,
        trees(60, 0.3),
    )
    rate = np.mean([state.clip_scale[0] < 1 for state in states])
    assert 0.1 < rate < 0.9


@pytest.mark.parametrize("clipping", [0.05, 0.5])
def test_agc_is_that_of_optax(clipping):
    """`rule="nfnets"` uses the axes of optax; both have `eps=1e-3` by default."""
    (params,) = trees(1, 1.0)
    params["kernel"] = params["kernel"].at[:, 0].set(0.0)  # limited by eps
    states = compare(
        clip_by_param_ratio(clipping, rule="nfnets"),
        optax.adaptive_grad_clip(clipping),
        params,
        trees(60, 0.1),
    )
    scales = np.concatenate([state.clip_scale for state in states])
    assert 0.05 < np.mean(scales < 1) < 1
