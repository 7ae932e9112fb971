"""Flax and optax: clipping is one more transformation in the chain.

One batch in ten has targets a hundred times too large. Run it:
`python examples/flax_training.py`. The clipper's history is part of the optimizer's
state, so that what saves the one saves the other.
"""

import argparse

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import serialization
from flax.training.train_state import TrainState

from autoclip_jax import clip_by_quantile, clip_metrics


class Network(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(1)(nn.tanh(nn.Dense(32)(x)))


def make_state(clip: bool) -> TrainState:
    network = Network()
    clipping = clip_by_quantile(0.5, scope="global") if clip else optax.identity()
    return TrainState.create(
        apply_fn=network.apply,
        params=network.init(jax.random.key(0), jnp.ones((1, 8))),
        tx=optax.chain(clipping, optax.sgd(0.05)),
    )


def batch(step: int) -> tuple[jax.Array, jax.Array]:
    x = jax.random.normal(jax.random.key(step), (32, 8))
    return x, x.sum(1, keepdims=True) * (100 if step % 10 == 9 else 1)


@jax.jit
def train_step(state: TrainState, x: jax.Array, y: jax.Array) -> TrainState:
    gradients = jax.grad(squared_error)(state.params, state, x, y)
    return state.apply_gradients(grads=gradients)


def squared_error(
    params: optax.Params, state: TrainState, x: jax.Array, y: jax.Array
) -> jax.Array:
    return jnp.square(state.apply_fn(params, x) - y).mean()


def train(state: TrainState, first: int, last: int) -> TrainState:
    for step in range(first, last):
        state = train_step(state, *batch(step))
    return state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    free = train(make_state(clip=False), 0, steps)
    half = train(make_state(clip=True), 0, steps // 2)
    saved = serialization.to_bytes(half)
    clipped = serialization.from_bytes(make_state(clip=True), saved)
    clipped = train(clipped, steps // 2, steps)
    for name, state in {"unclipped": free, "clipped": clipped}.items():
        loss = squared_error(state.params, state, *batch(0))
        print(f"{name:22} loss {loss:10.3f}")
    for name, value in clip_metrics(clipped.opt_state).items():
        print(f"{name:22} {value:15.3f}")


if __name__ == "__main__":
    main()
