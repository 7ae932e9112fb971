"""Equinox: clip each output unit of a layer by the size of its weights (AGC).

Equinox's weights lie as (out, in), which `rule="equinox"` says. One batch in ten has
targets a hundred times too large. Run it: `python examples/equinox_training.py`.
"""

import argparse

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from autoclip_jax import clip_by_param_ratio, clip_metrics

State = tuple[eqx.nn.MLP, optax.OptState]


def batch(step: int) -> tuple[jax.Array, jax.Array]:
    x = jax.random.normal(jax.random.key(step), (32, 8))
    return x, x.sum(1) * (100 if step % 10 == 9 else 1)


def squared_error(model: eqx.nn.MLP, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.square(jax.vmap(model)(x) - y).mean()


def train(clipping: optax.GradientTransformation, steps: int) -> State:
    model = eqx.nn.MLP(8, "scalar", 32, depth=1, key=jax.random.key(0))
    optimizer = optax.chain(clipping, optax.sgd(0.05))
    # The optimizer gets the arrays alone: activations are no parameters.
    opt_state = optimizer.init(eqx.filter(model, eqx.is_array))

    @eqx.filter_jit
    def train_step(model: eqx.nn.MLP, opt_state: optax.OptState, batch) -> State:
        gradients = eqx.filter_grad(squared_error)(model, *batch)
        params = eqx.filter(model, eqx.is_array)  # AGC compares gradients to them
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return eqx.apply_updates(model, updates), opt_state

    for step in range(steps):
        model, opt_state = train_step(model, opt_state, batch(step))
    return model, opt_state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    free, _ = train(optax.identity(), steps)
    clipped, opt_state = train(clip_by_param_ratio(0.2, rule="equinox"), steps)
    for name, model in {"unclipped": free, "clipped": clipped}.items():
        print(f"{name:22} loss {squared_error(model, *batch(0)):10.3f}")
    rows = optax.tree.get(opt_state, "clip_threshold").size
    print(f"{'rows':22} {rows:15}")
    for name, value in clip_metrics(opt_state).items():
        print(f"{name:22} {value:15.3f}")


if __name__ == "__main__":
    main()
