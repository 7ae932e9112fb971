"""Changes of a JAX model during a run: freezing, masks, dtypes, later leaves, threads.

Each step compares thresholds and updates with plain lists of norms, one list per leaf.
The lists continue after every change. A change that needs another state is refused.
"""

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from autoclip_core import Fixed
from autoclip_jax import clip_by_policy

from ..support.account import POLICIES

POLICY, threshold_of = POLICIES["quantile"]
ROUNDING = {"float32": 2e-6, "bfloat16": 1e-2}
PARAMS = {"b": jnp.ones(3), "w": jnp.ones((4, 3))}
CLIP = clip_by_policy(POLICY)


class Run:
    """A jitted run with a list of past norms for each leaf.

    Args:
      tx: the rows of its clippers, one after the other, begin with those of the leaves.
      params: a dict of arrays.
      max_norm: the limit of a second clipper, which comes after the first.
    """

    def __init__(self, tx=CLIP, params=PARAMS, max_norm=np.inf):
        self.params, self.max_norm, self.steps = dict(params), max_norm, 0
        self.past = {name: [] for name in params}
        self.frozen = ""
        """The leaf whose update is set to 0 after the clipper."""
        self.state = tx.init(self.params)
        self.continue_with(tx)

    def continue_with(self, tx):
        """Use another transformation with the same state."""
        self.update = jax.jit(tx.update)

    def train(self, steps, gradient_of=None, dtype=jnp.float32):
        """Train for this many steps and check each of them."""
        for _ in range(steps):
            self.steps += 1
            grads = {
                name: (gradient_of or draw)(self.steps, name, leaf.shape)
                for name, leaf in self.params.items()
            }
            grads = jax.tree.map(lambda grad: grad.astype(dtype), grads)
            updates, self.state = self.update(grads, self.state, self.params)
            self.check(grads, updates)

    def check(self, grads, updates):
        """Compare the thresholds and the updates with the lists."""
        clippers = clippers_of(self.state)
        assert clippers[0].clip_tally.tally_steps == self.steps
        thresholds = np.concatenate([clip.clip_threshold for clip in clippers])
        for name, threshold in zip(sorted(self.params), thresholds, strict=False):
            past, grad = self.past.setdefault(name, []), grads[name]
            limit = threshold_of(past)
            np.testing.assert_allclose(threshold, limit, rtol=2e-6)
            if grad is None:
                assert updates[name] is None
            elif name == self.frozen:
                assert not updates[name].any()
            else:
                check_update(grad, updates[name], min(limit, self.max_norm))
            if grad is not None and grad.any():
                past.append(norm_of(grad))


def clippers_of(state):
    """Return the states of the clippers in an optimizer state, in order."""
    return [clip for _, clip in optax.tree.get_all_with_path(state, "ClipState")]


def norm_of(grad):
    return np.linalg.norm(np.float64(grad).ravel())


def check_update(before, after, limit):
    """Check that a gradient is unchanged or is scaled to its limit."""
    assert after.dtype == before.dtype
    norm = norm_of(before)
    if norm < limit * (1 - 1e-6):
        np.testing.assert_array_equal(after, before)
    elif norm > limit * (1 + 1e-6):
        wanted = np.float64(before) * (limit / norm)
        rtol = ROUNDING[before.dtype.name]
        np.testing.assert_allclose(np.float64(after), wanted, rtol)


def draw(step, name, shape):
    """Return a gradient with heavy tails."""
    rng = np.random.default_rng([step, ord(name)])
    return jnp.float32(rng.lognormal() * rng.standard_normal(shape))


def test_a_model_that_does_not_change():
    Run().train(30)


# Tied parameters.


def gradient_of_tied_table(step, name, shape):
    """Return the gradient of an embedding table that is also the output layer."""
    tokens = np.random.default_rng(step).integers(shape[0], size=(2, 5))

    def loss(table):
        scores = table[tokens[0]] @ table.T
        return (scores * draw(step, name, scores.shape)).sum()

    return jax.grad(loss)(PARAMS[name])


def test_a_leaf_that_is_used_twice_is_one_row():
    run = Run(params={"w": PARAMS["w"]})
    run.train(20, gradient_of_tied_table)
    assert clippers_of(run.state)[0].clip_norm.shape == (1,)


def test_an_array_in_two_places_has_two_gradients_and_two_rows():
    Run(params=dict.fromkeys("bw", PARAMS["w"])).train(20)


@pytest.mark.needs("stacks")
def test_a_weight_that_a_library_ties_is_one_row():
    import equinox
    from flax import nnx

    class Tied(nnx.Module):
        def __init__(self):
            self.first = nnx.Linear(3, 3, use_bias=False, rngs=nnx.Rngs(0))
            self.second = nnx.Linear(3, 3, use_bias=False, rngs=nnx.Rngs(1))
            self.second.kernel = self.first.kernel

    layers = [
        equinox.nn.Linear(3, 3, use_bias=False, key=jax.random.key(i)) for i in (0, 1)
    ]
    shared = equinox.nn.Shared(
        layers, where=lambda both: both[1].weight, get=lambda both: both[0].weight
    )
    for model in (
        nnx.state(Tied(), nnx.Param),
        equinox.filter(shared, equinox.is_array),
    ):
        _, state = CLIP.update(model, CLIP.init(model))
        assert (
            state.clip_tally.tally_observed.sum() == 1
        )  # a leaf that is not an array counts as None


# Parameters that are frozen and unfrozen.


def without_b(step, name, shape):
    """Return no gradient for one of the leaves."""
    return None if name == "b" else draw(step, name, shape)


def stopped_at_b(step, name, shape):
    """Return a gradient of 0 for one of the leaves, as `stop_gradient` does."""
    return jnp.zeros(shape) if name == "b" else draw(step, name, shape)


@pytest.mark.parametrize("gradient_of", [without_b, stopped_at_b])
def test_an_unfrozen_leaf_keeps_its_history(gradient_of):
    run = Run()
    run.train(10)
    run.train(10, gradient_of)
    run.train(10)


def test_a_leaf_frozen_after_the_clipper_is_still_recorded():
    """The clipper receives every gradient, so its state fits any mask."""

    def all_but(frozen):
        mask = {name: name == frozen for name in PARAMS}
        return optax.chain(CLIP, optax.masked(optax.set_to_zero(), mask))

    run = Run(all_but("none"))
    for frozen in ("none", "b", "none"):
        run.continue_with(all_but(frozen))
        run.frozen = frozen
        run.train(10)


@pytest.mark.parametrize("wrapper", ["masked", "partition"])
def test_a_leaf_unfrozen_by_a_mask_around_the_clipper_needs_another_state(wrapper):
    """A mask selects the rows, and a state with other rows is refused."""

    def freeze(*names):
        if wrapper == "masked":
            return optax.masked(CLIP, {name: name not in names for name in PARAMS})
        parts = {"trained": CLIP, "frozen": optax.set_to_zero()}
        labels = {name: "frozen" if name in names else "trained" for name in PARAMS}
        return optax.partition(parts, labels)

    state = freeze("b").init(PARAMS)
    with pytest.raises(
        ValueError, match=r"has 1 rows, and the updates make 2; init it"
    ):
        jax.jit(freeze().update)(PARAMS, state, PARAMS)
    Run(freeze()).train(10)


def test_the_norm_counts_the_leaves_inside_the_partition_only():
    """In front of the partition, frozen leaves count too (maxtext#5290)."""
    sgd = optax.chain(clip_by_policy(Fixed(1.0), scope="global"), optax.sgd(1.0))
    labels = {"b": "train", "w": "freeze"}
    freeze = {"freeze": optax.set_to_zero()}
    inside = optax.partition({"train": sgd, **freeze}, labels)
    before = optax.chain(
        sgd, optax.partition({"train": optax.identity(), **freeze}, labels)
    )
    grads = {"b": jnp.array([0.0, 3.0, 4.0]), "w": jnp.full((4, 3), 100.0)}
    for tx, expected in (inside, 1.0), (before, 5 / np.sqrt(25 + 12 * 100**2)):
        updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
        np.testing.assert_allclose(np.linalg.norm(updates["b"]), expected, rtol=1e-6)
        assert not updates["w"].any()


# Parameters that are added later.


def clip_by_group():
    """Return a partition with one clipper for old leaves and one for later leaves."""
    groups = {"b": "first", "w": "first", "z": "later"}
    return optax.partition(
        {"first": CLIP, "later": CLIP},
        lambda tree: {name: groups[name] for name in tree},
    )


def test_a_later_leaf_is_refused_by_the_state_of_the_others():
    state, more = CLIP.init(PARAMS), PARAMS | {"z": jnp.ones(5)}
    with pytest.raises(
        ValueError, match=r"has 2 rows, and the updates make 3; init it"
    ):
        jax.jit(CLIP.update)(more, state)


def test_a_later_group_starts_with_an_empty_history():
    """A partition has a state per label; the old one replaces that of the new state."""
    run = Run(clip_by_group())
    run.train(10)
    run.params["z"] = jnp.ones(5)
    old = run.state.inner_states["first"]
    state = clip_by_group().init(run.params)
    run.state = state._replace(inner_states=state.inner_states | {"first": old})
    run.train(15)


# Other changes.


def test_another_dtype_keeps_the_history():
    run = Run()
    run.train(12, dtype=jnp.bfloat16)
    run.train(12)
    run.train(6, dtype=jnp.bfloat16)


def test_two_clippers_in_one_chain_clip_one_after_the_other():
    second = clip_by_policy(Fixed(0.8))
    run = Run(optax.chain(CLIP, second), max_norm=0.8)
    run.train(30)
    first, second = clippers_of(run.state)
    after = np.minimum(first.clip_norm, first.clip_threshold)
    np.testing.assert_allclose(second.clip_norm, after, rtol=2e-6)


def test_runs_in_parallel_threads_are_independent():
    """Run one transformation in eight threads and check each run."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: Run().train(30), range(8)))
