"""Clippers behind an optimizer, which clip the update, and the names of their metrics.

`tests/support/update_reference.py` says what follows from 100 steps, for every
framework.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from autoclip_core import Fixed, Quantile
from autoclip_core.clipper.norms import NORMS
from autoclip_jax import (
    clip_by_mean_std,
    clip_by_param_ratio,
    clip_by_policy,
    clip_by_quantile,
    clip_metrics,
    skip_steps,
    trust_clip,
)

from ..support.account import norm_of
from ..support.update_reference import (
    CASES,
    LEARNING_RATE,
    MOMENTUM,
    SHAPES,
    STEPS,
    assert_agrees,
    gradients,
    run,
    weights,
)

SGD = optax.sgd(LEARNING_RATE, momentum=MOMENTUM)
GRADIENTS = jax.tree.map(lambda *steps: jnp.stack(steps), *gradients())


def clip(case):
    return clip_by_policy(case.policy, scope=case.scope, norm=case.norm)


TRUST = CASES["trust"]
TRANSFORMATIONS = {name: optax.chain(SGD, clip(case)) for name, case in CASES.items()}
INJECTED = optax.inject_hyperparams(
    lambda learning_rate: optax.chain(
        optax.sgd(learning_rate, momentum=MOMENTUM), clip(TRUST)
    )
)(LEARNING_RATE)
PARTS = optax.partition(
    {"all": INJECTED}, lambda tree: jax.tree.map(lambda _: "all", tree)
)
WRAPPED = optax.MultiSteps(
    optax.masked(PARTS, lambda tree: dict.fromkeys(tree, True)), 1
)
HALVES = {
    "trust_clip": trust_clip(SGD, quantile=0.5, history_length=10),
    "its halves in a chain": optax.chain(
        clip_by_quantile(0.5, history_length=10, scope="global"), SGD, clip(TRUST)
    ),
}


@cache
def scanned():
    """Return the weights, and the state of the last link, after each step.

    One compilation takes the steps of all transformations.
    """
    transformations = TRANSFORMATIONS | HALVES | {"wrapped": WRAPPED}

    def step(runs, gradient):
        after = {}
        for name, tx in transformations.items():
            current, state = runs[name]
            updates, state = tx.update(gradient, state, current)
            after[name] = optax.apply_updates(current, updates), state
        records = {
            name: (current, state[-1] if name in CASES else None)
            for name, (current, state) in after.items()
        }
        return after, (records, clip_metrics(after["trust_clip"][1]))

    start = {
        name: (weights(), tx.init(weights())) for name, tx in transformations.items()
    }
    take_steps = jax.jit(lambda: jax.lax.scan(step, start, GRADIENTS)[1])
    # Without optimization it compiles faster.
    compiled = take_steps.lower().compile({"xla_backend_optimization_level": 0})
    return jax.device_get(compiled())


@pytest.mark.parametrize("name", CASES)
def test_100_steps_agree_with_the_reference(name):
    after, state = scanned()[0][name]
    names = [parts[0][0] for parts in CASES[name].rows]
    order = np.argsort(np.argsort(names, kind="stable"))  # JAX sorts the parameters
    for number, step in enumerate(run(CASES[name])):
        assert_agrees({key: after[key][number] for key in SHAPES}, step)
        for field, wanted in (
            (state.clip_norm, step.norms),
            (state.clip_threshold, step.thresholds),
            (state.clip_scale, step.scales),
        ):
            np.testing.assert_allclose(field[number][order], wanted, rtol=1e-4)
    clipped = state.clip_clipped
    assert clipped.any()
    assert not clipped.all()
    assert clipped.shape == (STEPS, len(order))


def test_wrappers_take_the_same_steps():
    after, _ = scanned()[0]["wrapped"]
    for number, step in enumerate(run(TRUST)):
        assert_agrees({key: after[key][number] for key in SHAPES}, step)


def test_trust_clip_is_the_chain_of_its_halves():
    """XLA compiles each link in its own way, so a last bit may differ."""
    records, metrics = scanned()
    one, other = (records[name][0] for name in HALVES)
    assert_close = partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7)
    jax.tree.map(assert_close, one, other)
    norms = [norm_of(gradient.values()) for gradient in gradients()]
    np.testing.assert_allclose(metrics["clip/norm"], norms, rtol=1e-6)
    medians = [np.median(norms[max(0, n - 10) : n]) for n in range(1, STEPS)]
    np.testing.assert_allclose(metrics["clip/threshold"][1:], medians, rtol=1e-6)
    before = [weights()] + [
        jax.tree.map(lambda w, n=n: w[n], one) for n in range(STEPS)
    ]
    for number in range(STEPS):
        moved = jax.tree.map(np.subtract, before[number + 1], before[number])
        sizes = [len(moved[key].ravel()) for key in SHAPES]
        rms = [norm_of([moved[key]], "rms") for key in SHAPES]
        np.testing.assert_allclose(
            metrics["clip/update_norm_after"][number],
            np.sqrt(np.average(np.square(rms), weights=sizes)),
            rtol=1e-4,
        )
    assert 0 < metrics["clip/update_clip_rate"][-1] < 1


@pytest.mark.parametrize("norm", NORMS)
def test_any_scope_and_norm_bounds_the_update_by_the_weights_before_it(norm):
    """One compilation for all scopes; the expected rows are written out."""
    rng = np.random.default_rng(0)
    params = {"a": np.float32(rng.normal(size=(3, 2))), "b": np.float32([0.0, 0.0])}
    grads = jax.tree.map(lambda p: np.float32(rng.normal(size=p.shape)), params)
    rows = {
        "unit": [[("a", (..., 0))], [("a", (..., 1))], [("b", ...)]],
        "parameter": [[("a", ...)], [("b", ...)]],
        "global": [[("a", ...), ("b", ...)]],
    }
    rows["group"] = rows["global"]
    how = {scope: {"scope": scope} for scope in rows}
    how["group"] = {"labels": dict.fromkeys(params, "all")}
    made = {
        scope: optax.chain(
            optax.sgd(0.5), clip_by_param_ratio(0.1, eps=0.01, norm=norm, **how[scope])
        )
        for scope in rows
    }

    @jax.jit
    def update_all(grads):
        return {
            k: tx.update(grads, tx.init(params), params)[0] for k, tx in made.items()
        }

    for scope, updates in update_all(grads).items():
        for row in rows[scope]:
            change = [-0.5 * grads[name][where] for name, where in row]
            size = norm_of([params[name][where] for name, where in row], norm)
            scale = min(1.0, 0.1 * max(size, 0.01) / norm_of(change, norm))
            assert scale < 1
            for (name, where), part in zip(row, change, strict=True):
                np.testing.assert_allclose(
                    updates[name][where], scale * part, rtol=1e-6
                )


@partial(jax.jit, static_argnums=0)
def take_step(tx, grads, params):
    """Return the updates of the first step, and the metrics."""
    updates, state = tx.update(grads, tx.init(params), params)
    return updates, clip_metrics({"params": params, "opt_state": [state]})


def test_zeros_nan_subnormals_and_updates_within_the_bound():
    """Only the row above the bound changes; a row that is not finite becomes 0."""
    updates = {
        "above": [3.0, 4.0],
        "infinite": [1.0, np.inf],
        "nan": [1e-3, np.nan],
        "subnormal": [1e-40, -1e-42],
        "within": [1e-3, -3e-3],
        "zero": [0.0, -0.0],
    }
    updates = {name: np.float32(value) for name, value in updates.items()}
    params = {name: np.ones(2, np.float32) for name in updates}
    params["within"] *= 0  # the floor alone lets it move: 0.02 * 0.3 > 0.0032
    tx = optax.chain(
        optax.identity(), clip_by_param_ratio(0.02, eps=0.3, scope="parameter")
    )
    got, metrics = jax.device_get(take_step(tx, updates, params))
    for name in ("subnormal", "within", "zero"):
        np.testing.assert_array_equal(
            got[name].view(np.int32), updates[name].view(np.int32)
        )
    for name in ("infinite", "nan"):
        np.testing.assert_array_equal(got[name].view(np.int32), [0, 0])
    wanted = 0.02 * np.sqrt(2.0) * np.array([0.6, 0.8])
    np.testing.assert_allclose(got["above"], wanted, rtol=1e-6)
    assert int(metrics["clip/update_nonfinite_total"]) == 1
    assert float(metrics["clip/update_clipped"]) == pytest.approx(1 / 6)


CLIP, OPTIMIZER = clip_by_policy(Fixed(1.0)), optax.sgd(0.1)
BEHIND = optax.chain(optax.adam(0.1), CLIP)
FIRST, UPDATE = "clip/norm", "clip/update_norm"
NUMBERED = ["clip/0/norm", "clip/1/norm"]
NAMES = {
    "alone": (CLIP, [FIRST]),
    "before": (optax.chain(CLIP, OPTIMIZER), [FIRST]),
    "behind": (optax.chain(OPTIMIZER, CLIP), [UPDATE]),
    "between": (optax.chain(optax.scale_by_adam(), CLIP, optax.scale(0.1)), [FIRST]),
    "both": (optax.chain(CLIP, OPTIMIZER, CLIP), [FIRST, UPDATE]),
    "two behind": (
        optax.chain(OPTIMIZER, CLIP, optax.masked(CLIP, True)),
        ["clip/0/update_norm", "clip/1/update_norm"],
    ),
    "two before, one behind": (
        optax.chain(CLIP, optax.chain(CLIP), OPTIMIZER, CLIP),
        [*NUMBERED, UPDATE],
    ),
    "chain in a chain": (optax.chain(BEHIND), [UPDATE]),
    "chain before a link": (optax.chain(BEHIND, optax.scale(0.1)), [FIRST]),
    "clippers behind in a chain": (optax.chain(OPTIMIZER, optax.chain(CLIP)), [UPDATE]),
    "named chain": (optax.named_chain(("z", OPTIMIZER), ("a", CLIP)), [UPDATE]),
    "named chain, before": (optax.named_chain(("z", CLIP), ("a", OPTIMIZER)), [FIRST]),
    "MultiSteps": (optax.MultiSteps(BEHIND, 2), [UPDATE]),
    "apply_if_finite": (optax.apply_if_finite(BEHIND, 2), [UPDATE]),
    "partition behind": (
        optax.chain(
            OPTIMIZER,
            CLIP,
            optax.partition({0: CLIP, 1: optax.identity()}, {"a": 0, "b": 1}),
        ),
        ["clip/0/update_norm", "clip/1/update_norm"],
    ),
    "partition": (
        optax.partition({0: BEHIND, 1: optax.chain(CLIP, OPTIMIZER)}, {"a": 0, "b": 1}),
        [FIRST, UPDATE],
    ),
    "skip_steps": (skip_steps(BEHIND, Quantile(0.9)), [FIRST, UPDATE]),
    "skip_steps before": (
        optax.chain(skip_steps(OPTIMIZER, Fixed(1.0)), CLIP),
        [FIRST, UPDATE],
    ),
    "behind trust_clip": (
        optax.chain(trust_clip(OPTIMIZER), CLIP),
        [FIRST, "clip/0/update_norm", "clip/1/update_norm"],
    ),
    "trust_clip, masked, before a link": (
        optax.chain(
            trust_clip(OPTIMIZER, exclude={"a": True, "b": False}), optax.scale(0.1)
        ),
        [FIRST, UPDATE],
    ),
    "skip_steps around trust_clip": (
        skip_steps(trust_clip(OPTIMIZER), Fixed(1.0)),
        [*NUMBERED, UPDATE],
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_clipper_behind_the_optimizer_has_names_of_its_own(name):
    tx, expected = NAMES[name]
    state = tx.init({"a": jnp.zeros(1), "b": jnp.zeros(1)})
    names = jax.eval_shape(clip_metrics, state)
    assert sorted(n for n in names if n.endswith("norm")) == sorted(expected)
    names = [n for n in names if not n.endswith("other_clippers")]
    assert len(names) == 11 * len(expected)


def test_the_metrics_of_both_kinds_are_those_of_gradient_and_update():
    """`clip_by_mean_std` last in the chain is the clipper of levanter."""
    tx = optax.chain(
        clip_by_quantile(0.9, scope="global"),
        optax.sgd(0.5),
        clip_by_mean_std(3.0, history_length=128, scope="global"),
    )
    grads = {"w": jnp.array([3.0, 4.0])}
    _, metrics = take_step(tx, grads, grads)
    assert float(metrics["clip/norm"]) == 5.0
    assert float(metrics["clip/update_norm"]) == 2.5
    assert int(metrics["clip/update_steps"]) == 1
