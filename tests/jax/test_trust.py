"""`trust_clip`: its arguments, its states, and what it does for a run.

`test_update.py` compares its steps with those of its halves.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from autoclip_core import Drop, Fixed, Quantile
from autoclip_jax import (
    TrustState,
    check_state,
    clip_by_policy,
    clip_metrics,
    skip_steps,
    trust_clip,
    upgrade_state,
)

GRADS = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([12.0])}
PARAMS = {"a": jnp.array([1.0, 1.0]), "b": jnp.array([0.0])}


@partial(jax.jit, static_argnums=0)
def take_steps(tx, sizes):
    """Take steps with multiples of the gradients; return all but the weights."""

    def step(state, size):
        grads = jax.tree.map(lambda leaf: size * leaf, GRADS)
        updates, state = tx.update(grads, state, PARAMS)
        return state, (grads, updates, clip_metrics(state))

    return jax.lax.scan(step, tx.init(PARAMS), sizes)


def test_excluded_leaves_are_neither_measured_nor_scaled_by_both_halves():
    def vectors(tree):
        return jax.tree.map(lambda leaf: leaf.shape == (1,), tree)

    tx = trust_clip(optax.sgd(1.0), exclude={"a": False, "b": True})
    state, (_, updates, metrics) = take_steps(tx, jnp.array([1.0, 2.0]))
    np.testing.assert_array_equal(metrics["clip/norm"], [5.0, 10.0])
    np.testing.assert_array_equal(metrics["clip/norm_after"], [5.0, 5.0])
    rms = 5 / np.sqrt(2.0)
    np.testing.assert_allclose(metrics["clip/update_norm"], [rms, rms], rtol=1e-6)
    bounded = -0.02 * np.array([3.0, 4.0]) / rms
    np.testing.assert_allclose(updates["a"], [bounded, bounded], rtol=1e-6)
    np.testing.assert_array_equal(updates["b"], [[-12.0], [-24.0]])
    check_state(state)
    other = trust_clip(optax.sgd(1.0), exclude=vectors).init(PARAMS)
    assert jax.tree.structure(other) == jax.tree.structure(state)
    assert other.trust_update.inner_state.clip_norm.shape == (1,)


def test_a_dry_run_measures_and_records_and_changes_nothing():
    sizes = jnp.array([1.0, 2.0, jnp.nan])
    state, (grads, updates, metrics) = take_steps(
        trust_clip(optax.sgd(1.0), dry_run=True), sizes
    )
    negated = jax.tree.map(jnp.negative, grads)
    jax.tree.map(np.testing.assert_array_equal, updates, negated)
    assert metrics["clip/threshold"].tolist() == pytest.approx([np.inf, 13.0, 24.7])
    assert metrics["clip/update_norm"].tolist()[:2] == pytest.approx(
        [13 / 3**0.5, 26 / 3**0.5]
    )
    assert state.trust_update.clip_tally.clipped.tolist() == [2, 2]
    assert int(state.trust_update.clip_tally.nonfinite) == 1


def test_an_update_that_is_not_finite_leaves_the_weights():
    """With "propagate", the momentum becomes NaN and the weights stay."""
    for nonfinite in ("zero", "propagate"):
        inner = optax.sgd(1.0, momentum=0.5)
        tx = trust_clip(inner, nonfinite=nonfinite, history_length=4)
        state, (_, updates, metrics) = take_steps(tx, jnp.array([1.0, jnp.inf]))
        moves = nonfinite == "zero"  # by the momentum of the first step
        assert bool(updates["a"][1].any()) is bool(updates["b"][1].any()) is moves
        assert bool(jnp.isfinite(state.inner_state[0].trace["a"]).all()) is moves
        assert metrics["clip/nonfinite_total"].tolist() == [0, 1]
        assert metrics["clip/update_nonfinite_total"].tolist() == [0, not moves]


def test_extra_arguments_reach_the_optimizer():
    inner = optax.polyak_sgd(max_learning_rate=1e-5)
    tx = optax.chain(trust_clip(inner))

    @jax.jit
    def update_both(value):
        return [
            one.update(GRADS, one.init(PARAMS), PARAMS, value=value)[0]
            for one in (inner, tx)
        ]

    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), *update_both(2.0))


def test_one_compilation_with_donated_buffers_and_a_vmapped_ensemble():
    tx = trust_clip(optax.sgd(0.1, momentum=0.9), history_length=8)
    members = jax.vmap(tx.init)(jax.tree.map(lambda x: jnp.stack([x, x]), PARAMS))
    kinds = jax.tree.map(lambda leaf: (leaf.dtype, leaf.weak_type), members)
    every = jax.jit(jax.vmap(tx.update, in_axes=(0, 0, None)), donate_argnums=1)
    for size in (1.0, 3.0, 2.0):
        grads = jax.tree.map(lambda x, size=size: jnp.stack([size * x, x]), GRADS)
        updates, members = every(grads, members, PARAMS)
    assert every._cache_size() == 1
    assert jax.tree.map(lambda leaf: (leaf.dtype, leaf.weak_type), members) == kinds
    check_state(members)
    metrics = jax.vmap(clip_metrics)(members)
    np.testing.assert_allclose(metrics["clip/norm"], [26.0, 13.0], rtol=1e-6)
    np.testing.assert_allclose(metrics["clip/threshold"], [36.4, 13.0], rtol=1e-6)
    rms = np.sqrt((2 * 0.02**2 + 0.0006**2) / 3)
    np.testing.assert_allclose(metrics["clip/update_norm_after"], [rms, rms], rtol=1e-6)
    np.testing.assert_allclose(updates["b"], [[-0.0006]] * 2, rtol=1e-6)


def test_states_that_do_not_fit_are_refused_and_earlier_ones_upgraded():
    tx = trust_clip(optax.sgd(1.0))
    state = tx.init(PARAMS)
    with pytest.raises(
        TypeError, match="must be the TrustState of trust_clip, got tuple"
    ):
        tx.update(GRADS, optax.chain(optax.sgd(1.0)).init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match=r"must fit its policy: .*\(1, 1000\)"):
        trust_clip(optax.sgd(1.0), history_length=9).update(GRADS, state, PARAMS)
    with pytest.raises(ValueError, match="has 2 rows, and the updates make 1"):
        trust_clip(optax.sgd(1.0), scope="global").update(GRADS, state, PARAMS)
    assert upgrade_state(state) is not None
    tally = state.trust_update.clip_tally._replace(dropped=None)
    old = state._replace(trust_update=state.trust_update._replace(clip_tally=tally))
    jax.tree.map(np.testing.assert_array_equal, upgrade_state(old), state)
    broken = state.trust_gradient.clip_policy._replace(
        ring=jnp.full((1, 1000), jnp.nan)
    )
    gradient = state.trust_gradient._replace(clip_policy=broken)
    with pytest.raises(ValueError, match=r"trust_gradient\.clip_policy"):
        check_state(state._replace(trust_gradient=gradient))


def test_arguments_that_break_a_rule_are_named_with_a_way_out():
    sgd = optax.sgd(1.0)
    for call, error, words in [
        (
            lambda: trust_clip(0.1),
            TypeError,
            r"optimizer must be .*trust_clip\(optax\.adam",
        ),
        (lambda: trust_clip(sgd, ratio=0.0), ValueError, "clipping must be"),
        (lambda: trust_clip(sgd, quantile=2.0), ValueError, "quantile must be"),
        (lambda: trust_clip(sgd, history_length=None), ValueError, "history_length"),
        (lambda: trust_clip(sgd, scope="layer"), ValueError, "scope must be"),
        (
            lambda: trust_clip(sgd, nonfinite="skip"),
            ValueError,
            r"skip_steps\(optimizer",
        ),
        (
            lambda: trust_clip(sgd, scope="unit", axis_name="x"),
            ValueError,
            "axis_name must",
        ),
        (
            lambda: trust_clip(sgd, exclude=["*.bias"]).init([jnp.zeros(1)]),
            TypeError,
            "exclude must be a tree of True and False",
        ),
        (
            lambda: trust_clip(sgd, exclude={"b": True}).init(PARAMS),
            ValueError,
            "exclude must be a prefix",
        ),
        (
            lambda: trust_clip(sgd).update(GRADS, trust_clip(sgd).init(PARAMS)),
            ValueError,
            "params must be given to `update`",
        ),
        (
            lambda: optax.chain(sgd, clip_by_policy(Drop(Fixed(1.0), action="skip"))),
            ValueError,
            r"wrap the optimizer: skip_steps",
        ),
    ]:
        with pytest.raises(error, match=words):
            call()


def test_skipped_steps_around_it_change_none_of_its_halves():
    tx = skip_steps(trust_clip(optax.sgd(1.0)), Quantile(1.0, history_length=4))
    _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    spike = jax.tree.map(lambda leaf: 10 * leaf, GRADS)
    updates, after = tx.update(spike, state, PARAMS)
    assert not any(leaf.any() for leaf in jax.tree.leaves(updates))
    jax.tree.map(np.testing.assert_array_equal, after.inner_state, state.inner_state)
    assert int(clip_metrics(after)["clip/update_steps"]) == 1


# Runs: linear regression, with noise in the targets.

STEPS, FEATURES, BATCH = 300, 8, 16
TARGET = np.float32(np.random.default_rng(1).normal(size=FEATURES))


def loss(w, x, y):
    return jnp.mean(jnp.square(x @ w - y))


def train(make, rate, factor, start):
    """Return the weights, and the metrics if there is a clipper, of each step.

    Args:
      make: from a learning rate to an optimizer.
      rate: the learning rate of each step.
      factor: what multiplies the gradient of each step.
      start: the first weights.
    """
    keys = jax.random.split(jax.random.key(0), len(rate))

    def step(run, inputs):
        (w, state), (key, rate, factor) = run, inputs
        x_key, noise_key = jax.random.split(key)
        x = jax.random.normal(x_key, (BATCH, FEATURES))
        y = x @ TARGET + 0.1 * jax.random.normal(noise_key, (BATCH,))
        tx = make(rate)
        updates, state = tx.update(factor * jax.grad(loss)(w, x, y), state, w)
        w = optax.apply_updates(w, updates)
        is_trusted = isinstance(state, TrustState)
        return (w, state), (w, clip_metrics(state) if is_trusted else None)

    return jax.lax.scan(step, (start, make(0.0).init(start)), (keys, rate, factor))[1]


def momentum(rate):
    return optax.sgd(rate, momentum=0.9)


def trusted(rate):
    return trust_clip(momentum(rate), history_length=100)


ones = np.ones(STEPS, np.float32)
number = np.arange(STEPS)
RUNS = {  # the learning rate, and what multiplies the gradient
    "plain": (0.02 * ones, ones),
    "spikes": (0.02 * ones, np.where((number >= 3) & (number % 20 == 3), 300, ones)),
    "rate 100 times too high": (2.0 * ones, ones),
    "x10": (0.02 * ones, np.where(number < 150, ones, 10)),
    "/10": (0.02 * ones, np.where(number < 150, ones, 0.1)),
    "warm-up and cosine": (
        np.float32(optax.warmup_cosine_decay_schedule(0.0, 0.04, 50, STEPS)(number)),
        ones,
    ),
}
START = np.float32(np.random.default_rng(2).normal(size=FEATURES))


@cache
def runs():
    """Return the weights of all runs without and with `trust_clip`, and its metrics."""
    rates, factors = (np.float32(np.stack(x)) for x in zip(*RUNS.values(), strict=True))
    every = [
        jax.jit(jax.vmap(partial(train, make, start=START)))(rates, factors)
        for make in (momentum, trusted)
    ]
    (without, _), (weights, metrics) = jax.device_get(every)
    return {
        name: (
            without[place],
            weights[place],
            {k: v[place] for k, v in metrics.items()},
        )
        for place, name in enumerate(RUNS)
    }
