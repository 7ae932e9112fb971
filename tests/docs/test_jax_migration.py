"""The rows about JAX of the page on other clippers; test_migration.py lists them.

Each transformation runs over 500 updates in one `lax.scan`. A NaN goes to ours alone,
because it would spread through the other's updates and state.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from autoclip_core import Fixed, MeanStd, Warmup
from autoclip_jax import clip_by_param_ratio, clip_by_policy, skip_steps

from ..support import other_rules
from ..support.other_rules import series

SHAPES = {"kernel": (4, 3), "bias": (3,), "conv": (3, 3, 2, 4)}
NORMS = series()
IS_FINITE = np.isfinite(NORMS)


def make_params(shapes):
    rng = np.random.default_rng(1)
    return {n: jnp.float32(rng.standard_normal(s)) for n, s in shapes.items()}


def make_updates(norms=NORMS, shapes=SHAPES):
    """Return trees stacked over the steps; the norm of a step is that of all leaves."""
    rng = np.random.default_rng(2)
    trees = {n: rng.standard_normal((len(norms), *s)) for n, s in shapes.items()}
    squares = [np.square(v).reshape(len(norms), -1).sum(1) for v in trees.values()]
    factor = norms / np.sqrt(sum(squares))
    return {
        name: np.float32(value * factor.reshape(-1, *[1] * (value.ndim - 1)))
        for name, value in trees.items()
    }


def run(transformation, updates, params):
    """Return the stacked results of all steps, and the stacked states."""

    def step(state, given):
        result, state = transformation.update(given, state, params)
        return state, (result, state)

    _, results = jax.jit(lambda: lax.scan(step, transformation.init(params), updates))()
    return results


def select(tree, mask):
    return jax.tree.map(lambda array: np.asarray(array)[mask], tree)


def compare(ours, theirs, shapes=SHAPES, rtol=3e-6, norms=NORMS):
    """Compare both at the finite steps; return our states there."""
    params, updates = make_params(shapes), make_updates(norms, shapes)
    result, states = run(ours, updates, params)
    assert not any(np.any(leaf) for leaf in select(result, ~IS_FINITE).values())
    expected, _ = run(theirs, select(updates, IS_FINITE), params)
    result = select(result, IS_FINITE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol), result, expected)
    changed = [
        np.abs(np.asarray(expected[n]) / updates[n][IS_FINITE] - 1).max() > 2 * rtol
        for n in shapes
    ]
    assert any(changed)
    return states


def check_rate(states):
    """Check that some rows are clipped at finite steps, and not all."""
    assert 0.005 < np.asarray(states.clip_clipped)[IS_FINITE].mean() < 0.995


def test_a_constant_is_that_of_optax():
    ours = clip_by_policy(Fixed(12.0), scope="global")
    states = compare(ours, optax.clip_by_global_norm(12.0))
    check_rate(states)
    np.testing.assert_allclose(
        states.clip_norm[:, 0][IS_FINITE], NORMS[IS_FINITE], 2e-6
    )


def test_a_root_mean_square_is_that_of_optax():
    ours = clip_by_policy(Fixed(1.5), norm="rms")
    states = compare(ours, optax.clip_by_block_rms(1.5))
    check_rate(states)


@pytest.mark.parametrize(
    ("shapes", "axis"),
    [
        (SHAPES, None),
        ({"kernel": (4, 3), "other": (2, 5)}, 0),
        ({"conv": (3, 3, 2, 4)}, (0, 1, 2)),
    ],
)
def test_units_are_those_of_optax(shapes, axis):
    """An axis that does not exist in a bias is an error there."""
    keywords = {"rule": "nfnets"} if axis is None else {}
    ours = clip_by_param_ratio(4.0, eps=1e-3, **keywords)
    check_rate(
        compare(ours, optax.adaptive_grad_clip(4.0, eps=1e-3, axis=axis), shapes)
    )
    if axis == (0, 1, 2):
        bias = {"bias": jnp.ones(3)}
        with pytest.raises(ValueError, match="axis"):
            optax.adaptive_grad_clip(4.0, axis=axis).update(bias, (), bias)


def test_steps_that_are_not_finite_are_those_of_optax():
    """The same updates, also of Adam's moments, and the same number of bad steps."""
    params, updates = make_params(SHAPES), make_updates()
    ours = skip_steps(optax.adam(1e-3), Fixed(1e30), max_consecutive=5)
    theirs = optax.apply_if_finite(optax.adam(1e-3), 5)
    result, states = run(ours, updates, params)
    expected, others = run(theirs, updates, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 2e-5), result, expected)
    np.testing.assert_array_equal(states.skip_total, others.total_notfinite)
    assert int(states.skip_total[-1]) == (~IS_FINITE).sum()


def test_a_mask_is_that_of_optax():
    mask = {"kernel": True, "bias": False, "conv": True}
    ours = optax.masked(clip_by_policy(Fixed(12.0), scope="global"), mask)
    theirs = optax.masked(optax.clip_by_global_norm(12.0), mask)
    params, updates = make_params(SHAPES), select(make_updates(), IS_FINITE)
    result, states = run(ours, updates, params)
    expected, _ = run(theirs, updates, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 3e-6), result, expected)
    np.testing.assert_array_equal(result["bias"], updates["bias"])
    assert 0.005 < np.mean(states.inner_state.clip_clipped) < 0.995


def test_skipped_steps_are_those_of_maxtext():
    """The norm half of its rule, around an optimizer whose steps stand still."""
    policy = Warmup(MeanStd(6.0, history_length=128), steps=63)
    ours = skip_steps(optax.sgd(1.0), policy)
    params, updates = make_params(SHAPES), make_updates()
    result, states = run(ours, updates, params)
    rule = other_rules.skip_step(NORMS[IS_FINITE].tolist())
    thresholds, scales = np.array(list(rule)).T
    clip = states.skip_clip
    found = np.asarray(clip.clip_threshold)[IS_FINITE, 0]
    np.testing.assert_allclose(found, thresholds, 3e-6)
    is_zero = ~np.asarray(result["kernel"]).any(axis=(1, 2))
    np.testing.assert_array_equal(is_zero[IS_FINITE], scales == 0)
    assert is_zero[~IS_FINITE].all()
    assert 3 < (scales == 0).sum() < 100


def test_steps_clipped_and_skipped_are_those_of_axlearn():
    """A skipped step changes neither the parameters nor the state of the optimizer."""
    clipped = optax.chain(clip_by_policy(Fixed(12.0), scope="global"), optax.trace(0.9))
    ours = skip_steps(clipped, Fixed(150.0))
    params, updates = make_params(SHAPES), make_updates()
    result, states = run(ours, updates, params)
    rule = other_rules.clip_and_skip(NORMS.tolist(), 12.0, 150.0, eps=1e-8)
    _, scales = np.array(list(rule)).T
    is_skipped = np.diff(np.asarray(states.skip_total), prepend=0) == 1
    np.testing.assert_array_equal(is_skipped, scales == 0)
    trace, expected = np.zeros(3), []
    for gradient, scale in zip(updates["bias"], scales, strict=True):
        trace = scale * gradient + 0.9 * trace if scale else trace
        expected.append(trace if scale else np.zeros(3))
    np.testing.assert_allclose(result["bias"], expected, rtol=2e-5, atol=1e-6)
    assert 5 < is_skipped.sum() < 100


def test_clipped_updates_are_those_of_levanter():
    """After Adam: the norms of its updates, which need 64 steps, follow the rule."""
    historical = Warmup(MeanStd(3.0, history_length=128, ddof=0), steps=64)
    ours = optax.chain(
        optax.scale_by_adam(),
        clip_by_policy(historical, scope="global"),
        optax.scale_by_learning_rate(1e-3),
    )
    params, updates = make_params(SHAPES), select(make_updates(), IS_FINITE)
    adam, _ = run(optax.scale_by_adam(), updates, params)
    squares = [
        np.square(np.float64(v)).reshape(len(v), -1).sum(1) for v in adam.values()
    ]
    norms = np.float32(np.sqrt(sum(squares)))
    thresholds, scales = np.array(list(other_rules.levanter(norms.tolist()))).T
    result, states = run(ours, updates, params)
    np.testing.assert_allclose(states[1].clip_threshold[:, 0], thresholds, 1e-5)
    np.testing.assert_allclose(states[1].clip_scale[:, 0], scales, 2e-5)
    np.testing.assert_allclose(
        result["bias"], -1e-3 * scales[:, None] * np.asarray(adam["bias"]), 2e-5
    )
    assert np.isposinf(thresholds[:64]).all()
    assert 0.005 < (scales < 1).mean() < 0.995
