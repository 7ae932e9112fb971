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
    check_state,
    clip_by_policy,
    clip_metrics,
    skip_steps,
    trust_clip,
)

GRADS = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([12.0])}
PARAMS = {"a": jnp.array([1.0, 1.0]), "b": jnp.array([0.0])}


@partial(jax.jit, static_argnums=0)
def take_steps(tx, sizes):
    """Take steps with multiples of the gradients; return what each step has."""

    def step(state, size):
        grads = jax.tree.map(lambda leaf: size * leaf, GRADS)
        updates, state = tx.update(grads, state, PARAMS)
        return state, (state, grads, updates, clip_metrics(state))

    return jax.lax.scan(step, tx.init(PARAMS), sizes)[1]


def last(tree):
    return jax.tree.map(lambda leaf: leaf[-1], tree)


def test_excluded_leaves_are_left_alone_and_an_infinite_update_leaves_the_weights():
    """Neither half measures or scales "b". In the third step the gradient is infinite;
    with "propagate", so is the momentum."""

    def vectors(tree):
        return jax.tree.map(lambda leaf: leaf.shape == (1,), tree)

    tx = trust_clip(
        optax.sgd(1.0, momentum=0.0),
        exclude={"a": False, "b": True},
        nonfinite="propagate",
    )
    states, _, updates, metrics = take_steps(tx, jnp.array([1.0, 2.0, jnp.inf]))
    np.testing.assert_array_equal(metrics["clip/norm"], [5.0, 10.0, np.nan])
    np.testing.assert_array_equal(metrics["clip/norm_after"], [5.0, 5.0, np.nan])
    rms = 5 / np.sqrt(2.0)
    np.testing.assert_allclose(
        metrics["clip/update_norm"], [rms, rms, np.nan], rtol=1e-6
    )
    bounded = -0.01 * np.array([3.0, 4.0]) / rms
    np.testing.assert_allclose(updates["a"], [bounded, bounded, [0, 0]], rtol=1e-6)
    np.testing.assert_array_equal(updates["b"], [[-12.0], [-24.0], [-np.inf]])
    assert not jnp.isfinite(states.trust_inner_state[0].trace["a"][-1]).any()
    for name in ("clip/nonfinite_total", "clip/update_nonfinite_total"):
        assert metrics[name].tolist() == [0, 0, 1]
    check_state(states)
    other = trust_clip(optax.sgd(1.0, momentum=0.0), exclude=vectors).init(PARAMS)
    assert jax.tree.structure(other) == jax.tree.structure(states)
    assert other.trust_update.inner_state.clip_norm.shape == (1,)


def test_a_dry_run_measures_and_records_and_changes_nothing():
    sizes = jnp.array([1.0, 2.0, jnp.nan])
    states, grads, updates, metrics = take_steps(
        trust_clip(optax.sgd(1.0), dry_run=True), sizes
    )
    negated = jax.tree.map(jnp.negative, grads)
    jax.tree.map(np.testing.assert_array_equal, updates, negated)
    assert metrics["clip/threshold"].tolist() == pytest.approx([np.inf, 13.0, 24.7])
    assert metrics["clip/update_norm"].tolist()[:2] == pytest.approx(
        [13 / 3**0.5, 26 / 3**0.5]
    )
    tally = last(states.trust_update.clip_tally)
    assert tally.tally_clipped.tolist() == [2, 2]
    assert int(tally.tally_nonfinite) == 1


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
    rms = np.sqrt((2 * 0.01**2 + 0.002**2) / 3)
    np.testing.assert_allclose(metrics["clip/update_norm_after"], [rms, rms], rtol=1e-6)
    np.testing.assert_allclose(updates["b"], [[-0.002]] * 2, rtol=1e-6)


def test_states_that_do_not_fit_are_refused():
    tx = trust_clip(optax.sgd(1.0))
    state = tx.init(PARAMS)
    with pytest.raises(
        TypeError, match="must be the TrustState of trust_clip, got tuple"
    ):
        tx.update(GRADS, optax.chain(optax.sgd(1.0)).init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match=r"must fit its policy: .*\(1, 1000\)"):
        trust_clip(optax.sgd(1.0), history_length=9).update(GRADS, state, PARAMS)
    with pytest.raises(ValueError, match="has 2 rows, and the updates make 1"):
        jax.eval_shape(
            trust_clip(optax.sgd(1.0), scope="global").update, GRADS, state, PARAMS
        )
    broken = state.trust_gradient.clip_policy._replace(
        policy_ring=jnp.full((1, 1000), jnp.nan)
    )
    gradient = state.trust_gradient._replace(clip_policy=broken)
    with pytest.raises(ValueError, match=r"trust_gradient\.clip_policy"):
        check_state(state._replace(trust_gradient=gradient))


KEEPS_WEIGHTS = {
    optax.contrib.schedule_free_sgd(0.1): r"present ones.*\.schedule_free\(trust_clip",
    optax.chain(
        optax.masked(optax.contrib.schedule_free_adamw(0.1), {"a": True, "b": False})
    ): r"the state ScheduleFreeState; put trust_clip inside",
    optax.lookahead(optax.sgd(0.1), 5, 0.5): r"optax\.lookahead\(trust_clip",
    optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.1)): r"contrib\.sam\(trust_clip",
    optax.contrib.cocob(): r"COCOBState; clip its gradients instead",
}


HAS_CLIPPER = "without a clipper, got one that has one.*; leave that one out"


def test_arguments_that_break_a_rule_are_named_with_a_way_out():
    sgd = optax.sgd(1.0)
    for call, error, words in [
        (
            lambda: trust_clip(0.1),
            TypeError,
            r"optimizer must be .*trust_clip\(optax\.adam",
        ),
        (lambda: trust_clip(sgd, ratio=0.0), ValueError, "ratio must be"),
        (lambda: trust_clip(sgd, quantile=2.0), ValueError, "quantile must be"),
        (lambda: trust_clip(sgd, history_length=None), ValueError, "history_length"),
        (lambda: trust_clip(sgd, scope="layer"), ValueError, "scope must be"),
        (
            lambda: trust_clip(sgd, nonfinite="skip"),
            ValueError,
            r"skip_steps\(optimizer",
        ),
        (
            lambda: trust_clip(sgd, dry_run=2),
            TypeError,
            "dry_run must be True or False",
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
        *(
            (
                lambda inner=inner: trust_clip(inner).init(PARAMS),
                ValueError,
                HAS_CLIPPER,
            )
            for inner in (
                optax.chain(trust_clip(sgd)),
                optax.chain(sgd, clip_by_policy(Fixed(1.0))),
                optax.chain(clip_by_policy(Fixed(1.0)), sgd),
                skip_steps(trust_clip(sgd), Fixed(1.0)),
            )
        ),
        *(
            (lambda inner=inner: trust_clip(inner).init(PARAMS), ValueError, words)
            for inner, words in KEEPS_WEIGHTS.items()
        ),
        (
            lambda: optax.chain(sgd, clip_by_policy(Drop(Fixed(1.0), action="skip"))),
            ValueError,
            r"wrap the optimizer: skip_steps",
        ),
    ]:
        with pytest.raises(error, match=words):
            call()


def test_it_may_stand_inside_schedule_free_and_skip_steps():
    """The weights that `schedule_free` keeps are bounded; a skipped step changes no
    half."""
    inner = optax.contrib.schedule_free(trust_clip(optax.sgd(1.0)), learning_rate=1.0)
    tx = skip_steps(inner, Quantile(1.0, history_length=4))
    states, _, updates, metrics = take_steps(tx, jnp.array([1.0, 0.5, 10.0]))
    for name, bound in (("a", 0.01), ("b", 0.002)):
        weights = np.stack([PARAMS[name], *states.skip_inner_state.z[name]])
        rms = np.sqrt(np.mean(np.diff(weights, axis=0) ** 2, axis=1))
        np.testing.assert_allclose(rms, [bound, bound, 0.0], rtol=1e-3)
        assert not updates[name][-1].any()
    for leaf in jax.tree.leaves(states.skip_inner_state):
        np.testing.assert_array_equal(leaf[1], leaf[2])
    assert metrics["clip/update_steps"].tolist() == [1, 2, 2]


def test_the_suggested_places_inside_lookahead_and_sam_bound_the_update():
    """A synchronization of `lookahead` averages, so it may move the weights further."""
    sgd, vector = trust_clip(optax.sgd(100.0)), PARAMS["a"]
    pair = optax.LookaheadParams.init_synced(vector)
    tx = optax.lookahead(sgd, 5, 0.5)
    fast = tx.update(vector, tx.init(pair), pair)[0].fast
    sam = optax.contrib.sam(sgd, optax.sgd(0.1), opaque_mode=True)
    gradient = {"grad_fn": lambda w, step: 3 * w}
    outer, _ = sam.update(vector, sam.init(vector), vector, **gradient)
    for update in (fast, outer):
        np.testing.assert_allclose(update, [-0.01, -0.01], rtol=1e-5)


# Runs: linear regression, with noise in the targets. One compilation for all.

STEPS, FEATURES, BATCH = 300, 8, 16
TARGET, START = (
    np.float32(np.random.default_rng(seed).normal(size=FEATURES)) for seed in (1, 2)
)
ONES, NUMBER = np.ones(STEPS), np.arange(STEPS)
WARM_UP = optax.warmup_cosine_decay_schedule(0.0, 0.04, 50, STEPS)
ZERO = 0 * START
RUNS = {  # the learning rate, what multiplies the gradient, and the first weights
    "plain": (0.02 * ONES, ONES, START),
    "spikes": (0.02 * ONES, np.where(NUMBER % 20 == 3, 300, 1), START),
    "rate x100": (2.0 * ONES, ONES, START),
    "x10": (0.02 * ONES, np.where(NUMBER < 150, 1, 10), START),
    "/10": (0.02 * ONES, np.where(NUMBER < 150, 1, 0.1), START),
    "warm-up and cosine": (np.asarray(WARM_UP(NUMBER)), ONES, START),
    "from 0, rate 0.002": (0.002 * ONES, ONES, ZERO),
    "from 0, rate 0.01": (0.01 * ONES, ONES, ZERO),
    "from 0, rate 0.02": (0.02 * ONES, ONES, ZERO),
}


def loss(w, x, y):
    return jnp.mean(jnp.square(x @ w - y))


def train(rates, factors, start):
    """Return the weights of each step without and with `trust_clip`, and its metrics.

    Args:
      rates: the learning rate of each step.
      factors: what multiplies the gradient of each step.
      start: the first weights.
    """

    def transformations(rate):
        optimizer = optax.sgd(rate, momentum=0.9)
        return [optimizer, trust_clip(optimizer, history_length=100)]

    def step(runs, inputs):
        key, rate, factor = inputs
        x_key, noise_key = jax.random.split(key)
        x = jax.random.normal(x_key, (BATCH, FEATURES))
        y = x @ TARGET + 0.1 * jax.random.normal(noise_key, (BATCH,))
        after = []
        for tx, (w, state) in zip(transformations(rate), runs, strict=True):
            grads = factor * jax.grad(loss)(w, x, y)
            updates, state = tx.update(grads, state, w)
            after.append((optax.apply_updates(w, updates), state))
        (without, _), (trusted, state) = after
        return after, (without, trusted, clip_metrics(state))

    keys = jax.random.split(jax.random.key(0), STEPS)
    begin = [(start, tx.init(start)) for tx in transformations(0.0)]
    return jax.lax.scan(step, begin, (keys, rates, factors))[1]


@cache
def run(name):
    """Return the distance from the target without and with `trust_clip`, its weights
    and its metrics, after each step."""
    without, trusted, metrics = (
        jax.tree.map(lambda leaf: leaf[[*RUNS].index(name)], part)
        for part in every_run()
    )
    distances = [norm_of_rows(weights - TARGET) for weights in (without, trusted)]
    return *distances, trusted, metrics


@cache
def every_run():
    inputs = (np.float32(np.stack(x)) for x in zip(*RUNS.values(), strict=True))
    return jax.device_get(jax.jit(jax.vmap(train))(*inputs))


def norm_of_rows(values):
    """Return the root mean square of each row."""
    with np.errstate(over="ignore"):
        return np.sqrt(np.mean(np.square(np.float64(values)), axis=-1))


@pytest.mark.parametrize("name", RUNS)
def test_no_update_exceeds_its_bound(name):
    _, _, weights, metrics = run(name)
    before = np.vstack([RUNS[name][2][None], weights[:-1]])
    bound = 0.01 * np.maximum(norm_of_rows(before), 0.2)
    np.testing.assert_allclose(metrics["clip/update_threshold"], bound, rtol=1e-5)
    assert (norm_of_rows(weights - before) <= bound * (1 + 1e-4)).all()
    assert int(metrics["clip/update_nonfinite_total"][-1]) == 0


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("plain", 0.02),
        ("spikes", 0.02),
        ("rate x100", 0.08),
        ("x10", 0.08),
        ("/10", 0.01),
        ("warm-up and cosine", 0.01),
    ],
)
def test_a_run_reaches_its_target(name, most):
    """The distance starts at 0.77; without a clipper three of the runs are lost."""
    without, trusted, _, _ = run(name)
    assert trusted[-50:].mean() < most
    if name in ("spikes", "rate x100", "x10"):
        assert not without[-50:].mean() < 0.2
    else:
        assert trusted[-50:].mean() < 1.5 * without[-50:].mean()


def test_weights_at_0_reach_the_level_of_an_unbounded_run_in_three_times_its_steps():
    for name in (name for name in RUNS if name.startswith("from 0")):
        without, trusted, _, _ = run(name)
        assert without[0] > 0.5
        # At a constant rate, the noise of the targets decides the last steps.
        assert trusted[290:300].mean() < 1.5 * without[90:100].mean()


def test_the_filter_scales_spikes_and_follows_a_lasting_change():
    metrics = run("spikes")[3]
    assert (metrics["clip/clipped"][103::20] == 1).all()
    ratio = metrics["clip/norm_after"] / metrics["clip/threshold"]
    assert (ratio[1:] <= 1 + 1e-6).all()
    plain, higher, lower = (
        run(name)[3]["clip/threshold"][-1] for name in ("plain", "x10", "/10")
    )
    assert higher > 5 * plain
    assert lower < 0.2 * plain


def test_a_learning_rate_of_0_changes_no_weight_and_clips_nothing():
    _, _, weights, metrics = run("warm-up and cosine")
    np.testing.assert_array_equal(weights[0], START)
    assert metrics["clip/norm"][0] > 1
    assert metrics["clip/update_norm"][0] == metrics["clip/update_clipped"][0] == 0
    assert metrics["clip/update_clipped"][-1] == 0
