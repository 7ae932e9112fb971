"""Time a training step in JAX: each clipper against optax's own.

Run it as `python benchmarks/jax_steps.py`; `--help` lists the options. All contenders
train in one process, a jitted step each in every round, their parameters and states
donated. AGC is compared with `optax.adaptive_grad_clip`, all others with
`optax.clip_by_global_norm`. Each window is full from the start. The time to compile
is CPU time, because XLA has several threads, and the smallest of the rounds.
"""

import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import command
from autoclip_core import Fixed, Quantile
from autoclip_jax import (
    clip_by_param_ratio,
    clip_by_policy,
    clip_by_quantile,
    trust_clip,
)
from shares import (
    EACH,
    FIXED,
    GLOBAL,
    NO_CLIPPING,
    SMALLEST,
    TRUST,
    UNIT,
    find_shares,
)
from timing import alternate, clock, compare

REFERENCE = "optax.clip_by_global_norm"
AGC_REFERENCE = "optax.adaptive_grad_clip"
HISTORY = 1000
WORDS, WIDTH, HIDDEN, LENGTH, BATCH = 500, 64, 256, 20, 16
SIDE = 128
ROUNDS_OF_COMPILING = {30: 3, 300: 1, 1000: 1}

CLIPPERS = {
    REFERENCE: lambda: optax.clip_by_global_norm(1e-3),
    "the same again": lambda: optax.clip_by_global_norm(1e-3),
    "optax, does not clip": lambda: optax.clip_by_global_norm(1e6),
    NO_CLIPPING: lambda: optax.identity(),
    "Fixed, global, clips": lambda: clip_by_policy(Fixed(1e-3), scope="global"),
    "Fixed, global, does not": lambda: clip_by_policy(Fixed(1e6), scope="global"),
    "quantile, global, clips": lambda: clip_by_quantile(0.0, scope="global"),
    "quantile, global, does not": lambda: clip_by_quantile(1.0, scope="global"),
    "quantile, per leaf, clips": lambda: clip_by_quantile(0.0),
    "quantile, per leaf, does not": lambda: clip_by_quantile(1.0),
    "Fixed, per unit, clips": lambda: clip_by_policy(Fixed(1e-3), scope="unit"),
    TRUST: None,  # it wraps the optimizer
    AGC_REFERENCE: lambda: optax.adaptive_grad_clip(0.01),
    "AGC, rule nfnets": lambda: clip_by_param_ratio(0.01, rule="nfnets"),
    "AGC": lambda: clip_by_param_ratio(0.01),
}

SHARES = {
    FIXED: [REFERENCE],
    GLOBAL: ["quantile, global, clips"],
    EACH: ["quantile, per leaf, clips"],
    UNIT: ["AGC"],
    TRUST: [TRUST],
}
"""The contenders whose share of the step is in the docs."""


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


def linear():
    """Return loss and weights of a layer: 10 500 parameters in 2 leaves."""
    x, labels = normal(0, BATCH, 20), jnp.arange(BATCH)

    def loss(params):
        logits = x @ params["kernel"] + params["bias"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return loss, {"kernel": normal(1, 20, WORDS), "bias": jnp.zeros(WORDS)}


def leaves(count, side=SIDE):
    """Return loss and weights of so many square matrices."""
    x = normal(0, BATCH, side)

    def loss(params):
        return sum(jnp.mean(jnp.square(x @ weight - x)) for weight in params)

    return loss, [normal(key, side, side) for key in range(count)]


def make_step(network, name):
    """Return a function that takes one training step, and CPU seconds of compiling."""
    loss, params = network()
    adam = optax.adam(1e-4)
    tx = trust_clip(adam) if name == TRUST else optax.chain(CLIPPERS[name](), adam)
    state = with_full_window(tx.init(params), 1e6 if "does not" in name else 1e-6)

    def update(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    start = time.process_time()
    compiled = jax.jit(update, donate_argnums=(0, 1)).lower(params, state).compile()
    seconds = time.process_time() - start
    carry = compiled(params, state)

    def step():
        nonlocal carry
        carry = jax.block_until_ready(compiled(*carry))

    return step, seconds


def with_full_window(state, size):
    """Return an optimizer state whose clipper has seen 1000 norms around a size."""
    clip, *others = state
    if not hasattr(getattr(clip, "clip_policy", None), "policy_ring"):
        return state
    policy = Quantile(history_length=HISTORY)
    window = policy.init(len(clip.clip_policy.policy_count))
    rng = np.random.default_rng(0)
    for norms in rng.uniform(0.5, 1.5, size=(HISTORY, len(window.count))):
        window = policy.record(window, np.float32(size * norms), policy.limit(window))
    full = type(clip.clip_policy)(*map(jnp.asarray, window))
    numbers = jax.tree.leaves((clip._replace(clip_policy=full), *others))
    return jax.tree.unflatten(jax.tree.structure(state), numbers)


def measure(model, network, names, seconds, rounds=1):
    """Return a line per clipper, the CPU seconds to compile each, and the shares."""
    compiling = {name: [] for name in names}
    for _ in range(rounds):
        made = {name: make_step(network, name) for name in names}
        for name, (_, taken) in made.items():
            compiling[name].append(taken)
    taken = alternate({name: clock(step) for name, (step, _) in made.items()}, seconds)
    lines = []
    for reference, others in {REFERENCE: False, AGC_REFERENCE: True}.items():
        of_kind = {name: t for name, t in taken.items() if is_agc(name) == others}
        lines += compare(of_kind, taken[reference], model=model, regime=reference)
    print(f"{model}: {lines[0]['rounds']} rounds", flush=True)
    shares = find_shares(taken, SHARES) if NO_CLIPPING in taken else None
    return lines, {name: min(times) for name, times in compiling.items()}, shares


def is_agc(name):
    return name == AGC_REFERENCE or name.startswith("AGC")


def main():
    options = command.parse(command.parser(__doc__, seconds=8.0))
    # Compiling many leaves takes long, and these cost what others do.
    clipping = [name for name in CLIPPERS if "does not" not in name]
    clipping.remove("AGC, rule nfnets")
    each_scope = [REFERENCE, "quantile, global, clips", "quantile, per leaf, clips"]
    each_scope += ["Fixed, per unit, clips", AGC_REFERENCE, "AGC"]
    cases = [
        ("LSTM", lstm, list(CLIPPERS), 1),
        ("300 leaves", partial(leaves, 300), clipping, 1),
        (SMALLEST, linear, clipping, 1),
    ]
    for count, rounds in ROUNDS_OF_COMPILING.items():
        network = partial(leaves, count, 32)
        cases.append((f"{count} leaves of 32 × 32", network, each_scope, rounds))
    if options.quick:
        names = [REFERENCE, NO_CLIPPING, "quantile, global, clips"]
        names += [AGC_REFERENCE, "AGC"]
        cases = [("tiny", partial(leaves, 2), names, 1)]
    results, compiling, shares = [], {}, {}
    for model, network, names, rounds in cases:
        lines, compiling[model], of_model = measure(
            model, network, names, options.seconds, rounds
        )
        results += lines
        if of_model:
            shares[model] = of_model
    numbers = {"results": results, "seconds_to_compile": compiling, "shares": shares}
    command.finish(options, "jax_steps", "jax", "optax", **numbers)


if __name__ == "__main__":
    main()
