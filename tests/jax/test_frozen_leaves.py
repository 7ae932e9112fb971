"""A norm that has the gradients of leaves that a partition freezes: a warning."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from autoclip_core import Fixed
from autoclip_jax import (
    clip_by_policy,
    clip_by_quantile,
    clip_metrics,
    skip_steps,
    trust_clip,
)

PARAMS = {"train": jnp.array([1.0, 2.0]), "freeze": jnp.ones(3)}
GRADS = {"train": jnp.array([3.0, 4.0]), "freeze": jnp.full(3, 100.0)}
LABELS = {name: name for name in PARAMS}
CLIP = clip_by_policy(Fixed(10.0), scope="global")
ADAM = optax.adam(0.1)


def freeze(optimizer):
    parts = {"train": optimizer, "freeze": optax.set_to_zero()}
    return optax.partition(parts, LABELS)


MEASURED = {
    "before the partition": optax.chain(CLIP, freeze(ADAM)),
    "before multi_transform": optax.chain(
        CLIP,
        optax.multi_transform({"train": ADAM, "freeze": optax.set_to_zero()}, LABELS),
    ),
    "before others": optax.chain(CLIP, optax.zero_nans(), freeze(optax.sgd(0.1))),
    "around the partition": trust_clip(freeze(ADAM)),
    "in a wrapper": optax.MultiSteps(optax.chain(CLIP, freeze(ADAM)), 2),
    "in skip_steps": skip_steps(optax.chain(CLIP, freeze(ADAM)), Fixed(9.0)),
    "in a schedule": optax.inject_hyperparams(
        lambda rate: optax.chain(CLIP, freeze(optax.adam(rate)))
    )(0.1),
}
"""maxtext#5285: frozen leaves make the norm larger than that of the trained ones."""

MASKED = optax.masked(CLIP, {"train": True, "freeze": False})
UNMEASURED = {
    "inside": freeze(optax.chain(CLIP, ADAM)),
    "trust_clip inside": freeze(trust_clip(ADAM)),
    "a mask": optax.chain(MASKED, freeze(ADAM)),
    "a norm for each leaf": optax.chain(clip_by_quantile(0.9), freeze(ADAM)),
    "an update": optax.chain(freeze(ADAM), CLIP),
    "two optimizers": optax.chain(
        CLIP, optax.partition({"train": ADAM, "freeze": optax.sgd(0.1)}, LABELS)
    ),
    "no partition": optax.chain(CLIP, optax.adamw(0.1, mask=LABELS == PARAMS)),
    "no clipper in the chain": optax.chain(optax.zero_nans(), freeze(trust_clip(ADAM))),
}


def read(tx):
    """Take a step, and return the texts of the warnings of `clip_metrics`."""
    _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        clip_metrics(state)
    return [str(each.message) for each in caught]


@pytest.mark.parametrize("name", MEASURED)
def test_frozen_leaves_in_the_norm_warn(name):
    (text,) = read(MEASURED[name])
    assert "clip inside of the partition" in text


@pytest.mark.parametrize("name", UNMEASURED)
def test_other_positions_are_silent(name):
    assert read(UNMEASURED[name]) == []


def test_the_way_out_measures_the_trained_leaves():
    pairs = (CLIP, np.sqrt(25 + 3 * 100**2)), (UNMEASURED["inside"], 5.0)
    for tx, norm in pairs:
        _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
        assert clip_metrics(state)["clip/norm"] == pytest.approx(norm)


def test_it_warns_inside_jit_when_the_step_is_traced():
    tx = MEASURED["before the partition"]

    @jax.jit
    def step(state):
        return clip_metrics(tx.update(GRADS, state, PARAMS)[1])

    with pytest.warns(RuntimeWarning, match="clip inside of the partition"):
        step(tx.init(PARAMS))
