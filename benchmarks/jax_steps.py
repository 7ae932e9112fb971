"""Time a training step in JAX: each clipper against `optax.clip_by_global_norm`.

Run it as `python benchmarks/jax_steps.py`; `--help` tells the options. All contenders
train in one process, a jitted step each in every round, in a new random order, their
parameters and states donated; what is shown is the median of the ratio to the
reference in the same round (for AGC, to optax's). Each window is full from the start.
"""

import random
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import command
from autoclip_core import Fixed
from autoclip_core.window import Window
from autoclip_jax import clip_by_param_ratio, clip_by_policy, clip_by_quantile

REFERENCE = "optax.clip_by_global_norm"
AGC_REFERENCE = "optax.adaptive_grad_clip"
HISTORY = 1000
WORDS, WIDTH, HIDDEN, LENGTH, BATCH = 500, 64, 256, 20, 16
LEAVES, SIDE = 300, 128

CLIPPERS = {
    REFERENCE: lambda: optax.clip_by_global_norm(1e-3),
    "the same again": lambda: optax.clip_by_global_norm(1e-3),
    "optax, does not clip": lambda: optax.clip_by_global_norm(1e6),
    "no clipping": lambda: optax.identity(),
    "Fixed(1e-3), clips": lambda: clip_by_policy(Fixed(1e-3), scope="global"),
    "Fixed(1e6), does not clip": lambda: clip_by_policy(Fixed(1e6), scope="global"),
    "quantile, global, clips": lambda: clip_by_quantile(0.0, scope="global"),
    "quantile, global, does not": lambda: clip_by_quantile(1.0, scope="global"),
    "quantile, per leaf, clips": lambda: clip_by_quantile(0.0),
    "quantile, per leaf, does not": lambda: clip_by_quantile(1.0),
    AGC_REFERENCE: lambda: optax.adaptive_grad_clip(0.01),
    "AGC, rule nfnets": lambda: clip_by_param_ratio(0.01, rule="nfnets"),
    "AGC": lambda: clip_by_param_ratio(0.01),
}


def normal(key, *shape):
    return jax.random.normal(jax.random.key(key), shape) / shape[0] ** 0.5


def lstm():
    """Return loss and weights of a word model: 1.0M parameters in 9 leaves."""

    def layer(key, inputs):
        shapes = {"inputs": (inputs, 4 * HIDDEN), "state": (HIDDEN, 4 * HIDDEN)}
        weights = {name: normal(key, *shape) for name, shape in shapes.items()}
        return weights | {"bias": jnp.zeros(4 * HIDDEN)}

    def run(weights, x):
        def cell(carry, part):
            state, memory = carry
            summed = part + state @ weights["state"] + weights["bias"]
            put, keep, show, new = jnp.split(summed, 4, axis=1)
            memory = jax.nn.sigmoid(keep) * memory + jax.nn.sigmoid(put) * jnp.tanh(new)
            state = jax.nn.sigmoid(show) * jnp.tanh(memory)
            return (state, memory), state

        start = jnp.zeros((BATCH, HIDDEN)), jnp.zeros((BATCH, HIDDEN))
        return lax.scan(cell, start, x @ weights["inputs"])[1]

    def loss(params):
        x = params["words"][jnp.arange(LENGTH * BATCH).reshape(LENGTH, BATCH) % WORDS]
        top = run(params["second"], run(params["first"], x))[-1]
        logits = top @ params["head"]["kernel"] + params["head"]["bias"]
        names = jnp.arange(BATCH)
        return optax.softmax_cross_entropy_with_integer_labels(logits, names).mean()

    head = {"kernel": normal(4, HIDDEN, WORDS), "bias": jnp.zeros(WORDS)}
    layers = {"first": layer(1, WIDTH), "second": layer(2, HIDDEN)}
    return loss, {"words": normal(3, WORDS, WIDTH), "head": head} | layers


def leaves():
    """Return loss and weights of 300 matrices of 128 x 128: many leaves."""
    x = normal(0, BATCH, SIDE)

    def loss(params):
        return sum(jnp.mean(jnp.square(x @ weight - x)) for weight in params)

    return loss, [normal(key, SIDE, SIDE) for key in range(LEAVES)]


def make_step(network, name):
    """Return a function that takes one training step, and the seconds of compiling."""
    loss, params = network()
    tx = optax.chain(CLIPPERS[name](), optax.adam(1e-4))
    state = with_full_window(tx.init(params), 1e6 if "does not" in name else 1e-6)

    def update(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    start = time.perf_counter()
    compiled = jax.jit(update, donate_argnums=(0, 1)).lower(params, state).compile()
    seconds = time.perf_counter() - start
    carry = compiled(params, state)

    def step():
        nonlocal carry
        carry = jax.block_until_ready(compiled(*carry))

    return step, seconds


def with_full_window(state, size):
    """Return an optimizer state whose clipper has seen 1000 norms around a size."""
    clip, *others = state
    if not isinstance(getattr(clip, "clip_policy", None), Window):
        return state
    rng = np.random.default_rng(0)
    ring = size * rng.uniform(0.5, 1.5, size=clip.clip_policy.ring.shape)
    ends = [np.full((len(ring), 1), end) for end in (-np.inf, np.inf)]
    ordered = np.concatenate([ends[0], np.sort(ring, axis=1), ends[1]], axis=1)
    window = Window(
        jnp.asarray(ring, jnp.float32),
        jnp.asarray(ordered, jnp.float32),
        jnp.full(len(ring), HISTORY, jnp.int32),
    )
    return clip._replace(clip_policy=window), *others


def compare(network, seconds):
    """Print a line per clipper, and return it: seconds to compile, ms, ratio."""
    # Compiling many leaves takes long, and what does not clip costs the same.
    names = [n for n in CLIPPERS if network is lstm or "does not" not in n]
    made = {name: make_step(network, name) for name in names}
    taken = {name: [] for name in made}
    order, end = list(made), time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken[REFERENCE]) < 5:
        random.shuffle(order)
        for name in order:
            start = time.perf_counter()
            made[name][0]()
            taken[name].append(time.perf_counter() - start)
    print(f"\n{network.__name__}, {len(taken[REFERENCE])} rounds")
    print(f"{'':30}{'compile':>8}{'ms':>8}{'ratio':>7}{'(quartiles)':>14}{'best':>6}")
    found = []
    for name, times in taken.items():
        to = taken[AGC_REFERENCE if "AGC" in name else REFERENCE]
        ratios = (a / b for a, b in zip(times, to, strict=True))
        low, ratio, high = statistics.quantiles(ratios, n=4)
        median, best = 1e3 * statistics.median(times), min(times) / min(to)
        spread = f"({low:.2f}–{high:.2f})"
        print(f"{name:30}{made[name][1]:8.2f}{median:8.2f}", end="")
        print(f"{ratio:7.2f}{spread:>14}{best:6.2f}", flush=True)
        case = {"model": network.__name__, "contender": name, "milliseconds": median}
        quartiles = {"low": low, "median": ratio, "high": high}
        found.append(case | {"seconds_to_compile": made[name][1], "ratio": quartiles})
    return found


def main():
    options = command.parse(command.parser(__doc__, seconds=15.0))
    networks = (lstm,) if options.quick else (lstm, leaves)
    found = [case for network in networks for case in compare(network, options.seconds)]
    command.save(options.json, "jax", "optax", results=found)


if __name__ == "__main__":
    main()
