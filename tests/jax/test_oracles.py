"""Transformations against those of optax, jitted, over many steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from autoclip_core import Fixed
from autoclip_jax import clip_by_param_ratio, clip_by_policy

SHAPES = {"kernel": (4, 3), "bias": (3,), "conv": (3, 3, 2, 4), "gain": ()}


def trees(steps, level):
    """Updates whose norms have heavy tails, in a tree."""
    rng = np.random.default_rng(3)
    for _ in range(steps):
        yield {
            name: jnp.asarray(level * np.exp(rng.normal()) * rng.normal(size=shape))
            for name, shape in SHAPES.items()
        }


def train(ours, theirs, params, given):
    """Update twice the same parameters; compare each step; return our states."""
    # Both from the same weights: rounding adds up over none.
    mine, other = ours.init(params), theirs.init(params)
    states = []
    for updates in given:
        one, mine = jax.jit(ours.update)(updates, mine, params)
        two, other = jax.jit(theirs.update)(updates, other, params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), one, two)
        params = optax.apply_updates(params, jax.tree.map(lambda u: -0.05 * u, two))
        states.append(mine)
    return states


def test_global_norm_clipping_is_that_of_optax():
    """Fixed(c) with scope="global" is clip_by_global_norm(c)."""
    (params,) = trees(1, 1.0)
    states = train(
        clip_by_policy(Fixed(3.0), scope="global"),
        optax.clip_by_global_norm(3.0),
        params,
        trees(60, 0.3),
    )
    rate = np.mean([state.clip_scale[0] < 1 for state in states])
    assert 0.1 < rate < 0.9


@pytest.mark.parametrize("clipping", [0.05, 0.5])
def test_agc_is_that_of_optax(clipping):
    """rule="nfnets" has its axes, and eps=1e-3 is its default, too."""
    (params,) = trees(1, 1.0)
    params["kernel"] = params["kernel"].at[:, 0].set(0.0)  # limited by eps
    states = train(
        clip_by_param_ratio(clipping, rule="nfnets"),
        optax.adaptive_grad_clip(clipping),
        params,
        trees(60, 0.1),
    )
    scales = np.concatenate([state.clip_scale for state in states])
    assert 0.05 < np.mean(scales < 1) < 1
