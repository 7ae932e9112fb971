"""Loops as people write them: meta-learning, SAM, nnx, float64, old checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from autoclip_core import (
    Cap,
    ClipLog,
    EmaRatio,
    Fixed,
    MeanStd,
    ParamRatio,
    Quantile,
    StreamingQuantile,
    ZScore,
    decide,
)
from autoclip_jax import (
    check_skips,
    check_state,
    clip_by_param_ratio,
    clip_by_policy,
    clip_metrics,
    skip_steps,
)
from autoclip_jax.gradients import namespace as XP

SIZES = [0.0, 1e-30, 1e-20, 1.0, 1e20]
NORMS = [1.0, 1.0, 0.0, 2.0, 40.0, 3.0]
FOLLOWING = [  # if all norms double, so do the applied norms
    ZScore(2.0, warmup_steps=2, log=True),
    MeanStd(1.0, history_length=4),
    MeanStd(1.0, log=True, history_length=4),
    Quantile(0.5, history_length=4),
    StreamingQuantile(0.5),
]
POLICIES = [
    *FOLLOWING,
    Fixed(1e-30),
    Cap(EmaRatio(1.5, warmup_steps=1), max_norm=1.0),
    ParamRatio(0.01),
]


def compile_quickly(function, *args):
    """Compile without optimizations, which take most of the time."""
    options = {"xla_backend_optimization_level": 0}
    options["xla_llvm_disable_expensive_passes"] = True
    return jax.jit(function).lower(*args).compile(compiler_options=options)


def test_gradients_through_the_thresholds_are_finite_and_right():
    """Meta-learning differentiates the updates (optax#882, optax#1452).

    If the updates are a function f of degree 1 of the gradients, f'(x) = f(x) / x.
    """
    weights = jnp.ones(len(SIZES))

    def total(policy, sizes):
        def step(state, norm):
            norms = norm * sizes
            state, decision = decide(policy, state, norms, param_norms=weights, xp=XP)
            return state, decision.scale * norms

        return jax.lax.scan(step, policy.init(len(SIZES), XP), jnp.array(NORMS))[1]

    def totals(sizes):
        pairs = zip(POLICIES, sizes, strict=True)
        each = jnp.stack([total(*pair).sum(axis=0) for pair in pairs])
        return each.sum(), each

    sizes = jnp.array([SIZES] * len(POLICIES))
    slopes, expected = compile_quickly(jax.grad(totals, has_aux=True), sizes)(sizes)
    assert jnp.isfinite(slopes).all()
    follows = np.s_[: len(FOLLOWING), 1:]
    ratios = (expected / sizes)[follows]
    np.testing.assert_allclose(slopes[follows], ratios, rtol=1e-3)


def test_gradients_through_the_norms_are_finite():
    """One row is always 0, and the weights of another are 0."""
    sizes = {"a": 1.0, "idle": 0.0, "b": 1e-30, "c": 1e-20, "d": 1e20}
    clips = [
        clip_by_policy(ParamRatio(1e-33)),
        clip_by_policy(Fixed(1e-36), norm="rms"),
        clip_by_policy(Fixed(1e-36), norm="max"),
    ]

    def total(scale, params):
        grads = {key: scale * x * jnp.array([0.6, 0.8]) for key, x in sizes.items()}
        all_updates = [clip.update(grads, clip.init(params), params) for clip in clips]
        return sum(leaf.sum() for leaf in jax.tree.leaves([u for u, _ in all_updates]))

    params = {key: jnp.full(2, float(key != "a")) for key in sizes}
    function, args = jax.grad(total, argnums=(0, 1)), (1.0, params)
    for leaf in jax.tree.leaves(compile_quickly(function, *args)(*args)):
        np.testing.assert_allclose(leaf, 0.0, atol=1e-8)  # every update is clipped


def test_the_functions_read_the_state_of_an_nnx_optimizer():
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    clip = clip_by_policy(Quantile(0.5, history_length=4))
    tx = skip_steps(optax.chain(clip, optax.sgd(0.1)), Fixed(100.0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for state in (optimizer.opt_state, optimizer):
        check_state(state)
        check_skips(state)
    assert clip_metrics(optimizer.opt_state)["clip/1/steps"] == 0
    count = optimizer.opt_state.skip_inner_state[0].clip_policy.policy_count
    count[...] = count[...] - 1
    with pytest.raises(ValueError, match=r"counts -1 norms"):
        check_state(optimizer)


def test_a_bound_that_the_optimizer_undoes_is_a_warning():
    """`schedule_free` computes the weights from those in its state."""
    bound, params = clip_by_param_ratio(0.01), jnp.ones(2)
    free = optax.contrib.schedule_free_sgd(0.1)
    madgrad = optax.masked(optax.contrib.madgrad(0.1), True)
    for tx in (optax.chain(free, bound), optax.chain(optax.chain(madgrad), bound)):
        with pytest.warns(RuntimeWarning, match=r"State, which .* undoes the bound"):
            clip_metrics(tx.init(params))
    inside = optax.contrib.schedule_free(optax.chain(optax.sgd(0.1), bound), 0.1)
    for tx in (optax.chain(bound, free), optax.chain(bound, inside)):
        clip_metrics(tx.init(params))  # a warning would be an error


@pytest.fixture(params=[False, True], ids=["float32", "x64"])
def x64(request):
    jax.config.update("jax_enable_x64", request.param)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.mark.usefixtures("x64")
def test_sam_trains_as_with_its_opaque_mode():
    """Without that mode, it selects states by arithmetic, also booleans and inf."""
    outer, params = optax.sgd(0.1), jnp.array([1.0, -2.0])
    clip = clip_by_policy(Quantile(0.5, history_length=3))
    adversary = optax.sgd(0.05)

    def make(opaque):
        optimizer = optax.chain(clip, outer)
        return optax.contrib.sam(optimizer, adversary, opaque_mode=opaque)

    def grad_of(scale):
        return jax.grad(lambda w, _: scale * jnp.sum(w**2))

    @jax.jit
    def visible(weights, state, scale):
        grads = grad_of(scale)(weights, 0)
        updates, state = make(False).update(grads, state, weights)
        return optax.apply_updates(weights, updates), state

    @jax.jit
    def opaque(weights, state, scale):
        grad_fn = grad_of(scale)
        grads = grad_fn(weights, 0)
        updates, state = make(True).update(grads, state, weights, grad_fn=grad_fn)
        return optax.apply_updates(weights, updates), state

    state, expected = make(False).init(params), params
    wanted_state, weights = make(True).init(params), params
    for scale in (1.0, 3.0, 0.5, 9.0):
        for _ in range(2):
            weights, state = visible(weights, state, scale)
        expected, wanted_state = opaque(expected, wanted_state, scale)
        np.testing.assert_allclose(weights, expected, rtol=1e-5)
    check_state(state)
    metrics, wanted = clip_metrics(state), clip_metrics(wanted_state)
    assert metrics["clip/clip_rate"] == wanted["clip/clip_rate"] > 0
    np.testing.assert_allclose(metrics["clip/norm"], wanted["clip/norm"], rtol=1e-5)


def test_the_log_shows_that_each_step_begins_with_a_new_state():
    """maxtext#138: `init` in each step, so that no history forms."""
    clip, log = clip_by_policy(Quantile(0.9), scope="global"), ClipLog()

    @jax.jit
    def step(grads):
        _, state = clip.update(grads, clip.init(grads))
        return clip_metrics(state)

    text = "of step 1 again and again, with other norms: each step begins with a new"
    metrics = [step(jnp.array([1.0 + index, 1.0])) for index in range(120)]
    with pytest.warns(RuntimeWarning, match=text) as warned:
        list(map(log.record, metrics))
    assert len(warned) == 1
    [light] = [text for text in log.summary().advice if "Red light" in text]
    assert "the last 119 records repeat one step" in light
    assert "each step begins with a new state of the clipper" in light
