"""Trees that a clipper could cut along a wrong axis: examples, and Equinox modules."""

import re
import warnings

import jax
import jax.numpy as jnp
import optax
import pytest

from autoclip_core import Fixed
from autoclip_jax import (
    clip_by_param_ratio,
    clip_by_policy,
    clip_by_quantile,
    row_names,
    skip_steps,
    trust_clip,
)

PARAMS = {"a": jnp.ones((2, 3)), "b": jnp.ones(3), "c": jnp.ones(())}
X = jnp.asarray([[1.0, 2.0, 3.0]] * 5 + [[1e3, 0.0, 0.0]])
FIXED = clip_by_policy(Fixed(1.0), scope="global")
TEXT = "each gradient has an axis of size 6 in front that its parameter lacks"


def loss(params, x):
    return jnp.sum(params["a"] @ x) + params["b"] @ x + params["c"]


def grads_of_examples(params):
    return jax.vmap(jax.grad(loss), (None, 0))(params, X)


TRANSFORMATIONS = {
    "fixed": FIXED,
    "quantile": clip_by_quantile(0.9, scope="global"),
    "parameter": clip_by_quantile(0.9),
    "chain": optax.chain(optax.zero_nans(), FIXED, optax.sgd(0.1)),
    "masked": optax.masked(FIXED, {"a": True, "b": False, "c": False}),
    "partition": optax.partition(
        {0: FIXED, 1: optax.sgd(0.1)}, {"a": 0, "b": 1, "c": 0}
    ),
    "skip_steps": skip_steps(optax.sgd(0.1), Fixed(1.0)),
    "trust_clip": trust_clip(optax.sgd(0.1)),
}


@pytest.mark.parametrize(
    ("name", "is_jitted"),
    [*((name, True) for name in TRANSFORMATIONS), ("chain", False)],
)
def test_gradients_of_single_examples_are_one_warning(name, is_jitted):
    """optax#50: all but the largest would nearly vanish."""
    tx = TRANSFORMATIONS[name]

    def step(params, state):
        return tx.update(grads_of_examples(params), state, params)

    state = tx.init(PARAMS)
    step = jax.jit(step) if is_jitted else step
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            step(PARAMS, state)
    [warning] = caught
    assert TEXT in str(warning.message)
    assert warning.filename == __file__


def test_the_ways_out_of_single_examples_are_silent():
    with pytest.warns(RuntimeWarning, match=TEXT) as caught:
        FIXED.update(grads := grads_of_examples(PARAMS), FIXED.init(PARAMS), PARAMS)
    text = str(caught[0].message)
    names = {"jax": jax, "optax": optax, "grads": grads}
    mean = eval(re.search(r"jax\.tree\.map\(.*?\), grads\)", text)[0], names)
    FIXED.update(mean, FIXED.init(PARAMS), PARAMS)
    total, count = eval(re.search(r"optax\.per.*\)$", text)[0], names)
    assert int(count) == 6
    assert float(jnp.linalg.norm(total[0])) <= 6.0


def stacked(params):
    return jax.tree.map(lambda p: jnp.stack([p] * 6), params)


def test_trees_with_an_axis_of_their_own_are_silent():
    """A warning is an error in these tests."""
    tx, many = trust_clip(optax.adam(0.1)), stacked(PARAMS)
    tx.update(many, tx.init(many), many)  # layers for `lax.scan`
    states = jax.vmap(tx.init)(many)
    jax.jit(jax.vmap(tx.update))(many, states, many)  # an ensemble
    # Each example on its own, with the same parameters and state.
    grads, state = grads_of_examples(PARAMS), tx.init(PARAMS)
    jax.vmap(tx.update, (0, None, None))(grads, state, PARAMS)
    mean = jax.tree.map(lambda g: g.mean(axis=0), grads)
    tx.update(mean, state, PARAMS)
    FIXED.update(mean, FIXED.init(PARAMS))
    FIXED.update(grads, FIXED.init(PARAMS))  # no parameters, so no shapes
    flat = optax.flatten(FIXED)
    flat.update(mean, flat.init(PARAMS), PARAMS)
    vectors = {"a": jnp.ones(3), "b": jnp.ones(())}
    FIXED.update(vectors, FIXED.init(vectors), vectors)
    masked = optax.masked(FIXED, {"a": True, "b": False, "c": False})
    masked.update(mean, masked.init(PARAMS), PARAMS)


def ratio_norms(params, rule="flax"):
    """Return the norms that AGC takes of a tree."""
    tx = clip_by_param_ratio(rule=rule)
    _, state = jax.jit(tx.update)(params, tx.init(params), params)
    assert len(row_names(params, scope="unit", rule=rule)) == state.clip_norm.size
    return state.clip_norm


def test_a_weight_of_an_equinox_module_has_its_outputs_in_front():
    """asi#439: with the default rule, the rows were the inputs."""
    eqx = pytest.importorskip("equinox")

    class Own(eqx.Module):
        weight: jax.Array
        layers: dict

    key, plain = jax.random.key(0), jnp.ones((3, 4))
    linear = eqx.nn.Linear(4, 3, key=key)
    for module in (
        linear,
        eqx.nn.Conv2d(4, 6, 3, key=key),
        eqx.nn.LSTMCell(4, 3, key=key),
        Own(jnp.ones((3, 4)), {"a": [linear]}),
        [linear, {"b": eqx.nn.Sequential([linear])}],
    ):
        params = eqx.filter(module, eqx.is_array)
        norms, wanted = ratio_norms(params), ratio_norms(params, "equinox")
        assert norms.tolist() == wanted.tolist()
    # A tree that is of no Equinox module keeps its rule.
    for params in ([plain], {"weight": plain}, {"w": plain}):
        assert ratio_norms(params).size == 4


def test_the_weight_of_another_class_keeps_its_rule():
    struct = pytest.importorskip("flax.struct")

    @struct.dataclass
    class Layer:
        weight: jax.Array

    assert ratio_norms(Layer(jnp.ones((3, 4)))).size == 4
