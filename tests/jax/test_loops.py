"""Loops as people write them: meta-learning, SAM, nnx, float64, old checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np

from autoclip_core import MeanStd, ParamRatio, ZScore, decide
from autoclip_jax import clip_by_policy

POLICIES = [ZScore(2.0, warmup_steps=2), MeanStd(1.0, log=True, history_length=4)]
NORMS = [1.0, 1.0, 0.0, 2.0, 40.0, 3.0]


def test_gradients_through_the_thresholds_are_finite_and_right():
    """Meta-learning differentiates the updates (optax#882, optax#1452).

    If all norms double, so do the applied norms: f'(x) = f(x) / x.
    """

    def total(policy, scale):
        def step(state, norm):
            norms = scale * norm * jnp.ones(1)
            state, decision = decide(policy, state, norms, xp=jnp)
            return state, (decision.scale * norms).sum()

        return jax.lax.scan(step, policy.init(1, jnp), jnp.array(NORMS))[1].sum()

    def totals(scales):
        each = [total(*pair) for pair in zip(POLICIES, scales, strict=True)]
        return sum(each), jnp.stack(each)

    scales = jnp.ones(len(POLICIES))
    slopes, expected = jax.jit(jax.grad(totals, has_aux=True))(scales)
    np.testing.assert_allclose(slopes, expected, rtol=1e-3)


def test_gradients_through_the_norms_are_finite():
    """One row is always 0, and the weights of another are 0."""
    clip = clip_by_policy(ParamRatio(0.01))

    def total(scale, params):
        grads = {"a": scale * jnp.array([0.6, 0.8]), "idle": scale * jnp.zeros(2)}
        updates, _ = clip.update(grads, clip.init(params), params)
        return sum(leaf.sum() for leaf in jax.tree.leaves(updates))

    params = {"a": jnp.zeros(2), "idle": jnp.ones(2)}
    slopes = jax.jit(jax.grad(total, argnums=(0, 1)))(1.0, params)
    for leaf in jax.tree.leaves(slopes):
        np.testing.assert_allclose(leaf, 0.0, atol=1e-8)  # every update is clipped
