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


def test_rms_clipping_of_each_parameter_is_that_of_optax():
    (params,) = trees(1, 1.0)
    states = compare(
        clip_by_policy(Fixed(1.0), norm="rms"),
        optax.clip_by_block_rms(1.0),
        params,
        trees(60, 0.7),
    )
    rate = np.mean([state.clip_scale < 1 for state in states])
    assert 0.1 < rate < 0.9


def test_rms_clipping_after_adam_is_the_update_clipping_of_stable_adamw():
    """Shazeer and Stern 2018: an update is divided by max(1, RMS(update) / d)."""
    tx = optax.chain(optax.scale_by_adam(), clip_by_policy(Fixed(1.0), norm="rms"))
    (params,) = trees(1, 1.0)
    state, update = tx.init(params), jax.jit(tx.update)
    means = {name: (0.0, 0.0) for name in SHAPES}
    scales = []
    for step, grads in enumerate(trees(240, 1.0), start=1):
        level = 100.0 if step > 200 else 1.0  # the second moment follows slowly
        grads = jax.tree.map(lambda g, level=level: g * level, grads)
        updates, state = update(grads, state)
        for name, grad in jax.tree.map(np.float64, grads).items():
            first, second = means[name]
            first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad**2
            means[name] = first, second
            root = np.sqrt(second / (1 - 0.999**step)) + 1e-8
            adam = first / (1 - 0.9**step) / root
            expected = adam / max(1.0, np.sqrt(np.mean(adam**2)))
            np.testing.assert_allclose(updates[name], expected, rtol=1e-4, atol=1e-7)
        scales.append(state[1].clip_scale)
    assert 0.02 < np.mean(np.array(scales) < 1) < 0.9


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
