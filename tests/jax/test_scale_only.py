"""Tests of `scale_only` in JAX: all leaves are measured, and only the named scaled."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from autoclip_core import Fixed
from autoclip_jax import (
    clip_by_param_ratio,
    clip_by_policy,
    clip_metrics,
    skip_steps,
)

from ..support.scale_only import POLICIES, ROWS, SCALED, SHAPES, expect, make_series

MASK = {name: name in SCALED for name in SHAPES}
SCOPES = {
    "global": {"scope": "global"},
    "group": {"labels": {"w": "body", "v": "body", "u": "head"}},
    "parameter": {"scope": "parameter"},
    "unit of the last axis": {"scope": "unit"},
}


@pytest.mark.parametrize(
    ("scope", "name", "nonfinite", "kind"),
    [
        ("global", "clip and drop", "zero", "max"),
        ("group", "clip", "zero", "rms"),
        ("parameter", "clip", "propagate", "l2"),
        ("unit of the last axis", "clip and drop", "zero", "rms"),
    ],
)
def test_only_these_are_scaled_and_all_are_measured(scope, name, nonfinite, kind):
    """The updates and `clip/norm_after` follow the rules, in one compilation."""
    policy = POLICIES[name]
    how = {"nonfinite": nonfinite, "norm": kind, **SCOPES[scope]}
    tx = clip_by_policy(policy[0], scale_only=MASK, **how)
    params = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
    state, update = tx.init(params), jax.jit(tx.update)
    series = make_series()
    for grads in series if scope == "global" else series[:7] + series[8:]:
        updates, state = update(grads, state, params)
        how = policy, nonfinite, kind
        after, norm, norm_after = expect(grads, ROWS[scope], *how)
        assert {n for n, leaf in updates.items() if leaf is not None} == set(after)
        for n, wanted in after.items():
            np.testing.assert_allclose(updates[n], wanted, rtol=1e-6)
            if n not in SCALED:  # unchanged bit for bit, or 0
                np.testing.assert_array_equal(updates[n], np.float32(wanted))
        metrics = clip_metrics(state)
        numbers = [metrics["clip/norm"], metrics["clip/norm_after"]]
        np.testing.assert_allclose(numbers, [norm, norm_after], rtol=1e-6)
        assert state.clip_norm.shape == tx.init(params).clip_norm.shape


def test_the_mask_may_be_a_prefix_or_a_function_and_matrices_may_be_left_alone():
    """Muon normalizes its update, so its matrices are measured and not scaled."""
    grads = {"muon": [jnp.full((2, 2), 2.0)] * 2, "adam": jnp.full((8,), 2.0)}

    def vectors(tree):
        return jax.tree.map(lambda leaf: leaf.ndim == 1, tree)

    for mask in ({"muon": False, "adam": True}, vectors):
        tx = clip_by_policy(Fixed(1.0), scope="global", scale_only=mask)
        updates, state = tx.update(grads, tx.init(grads))
        assert state.clip_norm.tolist() == pytest.approx([8.0])
        assert updates["adam"].tolist() == pytest.approx([0.25] * 8)
        assert all((leaf == 2.0).all() for leaf in updates["muon"])
        norm_after = (32 + 8 * 0.25**2) ** 0.5
        assert float(state.clip_scale[0]) == pytest.approx(norm_after / 8)


def test_the_parameters_of_both_parts_are_measured():
    grads = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([12.0])}
    params = {"a": jnp.array([0.0, 5.0]), "b": jnp.array([12.0])}
    tx = clip_by_param_ratio(0.5, scope="global", scale_only={"a": True, "b": False})
    updates, state = tx.update(grads, tx.init(params), params)
    assert state.clip_norm.tolist() == pytest.approx([13.0])
    assert state.clip_threshold.tolist() == pytest.approx([6.5])
    assert updates["a"].tolist() == pytest.approx([1.5, 2.0])
    assert updates["b"].tolist() == [12.0]


def test_a_mask_that_does_not_fit_is_refused():
    grads = {"a": jnp.zeros(2), "b": jnp.zeros(1)}
    for mask, error, message in [
        ({"a": True}, ValueError, "scale_only must be a prefix of the tree"),
        ({"a": True, "b": "no"}, TypeError, "scale_only must be a tree of True and F"),
        ("a", TypeError, "scale_only must be a tree of True and False"),
    ]:
        tx = clip_by_policy(Fixed(1.0), scale_only=mask)
        with pytest.raises(error, match=message):
            tx.init(grads)
    with pytest.raises(TypeError, match="'scale_only'; it scales nothing"):
        skip_steps(optax.sgd(1.0), Fixed(1.0), scale_only={"a": True})
