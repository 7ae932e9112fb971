"""Measure the gradient norms of a JAX model before training, and suggest a threshold.

Run it: `python examples/find_threshold_jax.py`. Parameters and random keys are values
in JAX: nothing has to be put back.
"""

from itertools import islice

import jax
import jax.numpy as jnp

from autoclip_core import suggest_threshold


def find_clipping_threshold(params, batches, loss, num_batches=100):
    """Return what `suggest_threshold` says of the norms; loss(params, batch)."""

    @jax.jit
    def norm_of(batch):
        gradients = jax.tree.leaves(jax.grad(loss)(params, batch))
        return jnp.sqrt(sum(jnp.vdot(g, g) for g in gradients))

    norms = [norm_of(batch) for batch in islice(batches, num_batches)]
    return suggest_threshold(jax.device_get(jnp.stack(norms)))


def squared_error(params, batch):
    inputs, target = batch
    return jnp.mean((inputs @ params["weight"] + params["bias"] - target) ** 2)


def main():
    params = {"weight": jnp.full(4, 0.1), "bias": jnp.zeros(())}
    keys = jax.random.split(jax.random.key(0), 100)
    inputs = [jax.random.normal(key, (32, 4)) for key in keys]
    batches = [(batch, batch[:, 0]) for batch in inputs]
    print(find_clipping_threshold(params, batches, squared_error))


if __name__ == "__main__":
    main()
