"""The wrappers of optax, and models of Flax, Haiku and Equinox."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from autoclip_core import Cap, ClipLog, Drop, Fixed, Quantile, Scheduled, Warmup, ZScore
from autoclip_jax import (
    OptaxSchedule,
    check_skips,
    clip_by_param_ratio,
    clip_by_policy,
    clip_by_quantile,
    clip_metrics,
    skip_steps,
    trust_clip,
)
from autoclip_jax.state import init_state

from ..support.cases import STATIC, policy_of

STEPS = jnp.asarray(np.random.default_rng(0).lognormal(size=(30, 2)), jnp.float32)


@pytest.fixture(autouse=True)
def strict():
    """Make implicit promotion of types and ranks an error."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def lenient():
    """Allow implicit promotion for libraries that need it."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def assert_same(one, other):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    for left, right in pairs:
        np.testing.assert_array_equal(left, right)


def test_a_state_of_another_history_or_policy_is_refused_when_the_step_is_traced():
    grads = {"w": STEPS[0]}
    state = clip_by_quantile(history_length=8).init(grads)
    for other in (clip_by_quantile(history_length=9), clip_by_policy(Fixed(1.0))):
        with pytest.raises(ValueError, match=r"must fit its policy: .*\(1, 8\)"):
            jax.jit(other.update)(grads, state)


def optax_names():
    """Return the field names of all states of optax."""
    kinds = [*vars(optax).values(), *vars(optax.contrib).values()]
    tuples = [kind for kind in kinds if hasattr(kind, "_fields")]
    return {name for kind in tuples for name in kind._fields}


def field_names(state):
    """Return the field names of a state and of all states inside it."""
    if not isinstance(state, tuple):
        return set()
    return set(getattr(state, "_fields", ())).union(*map(field_names, state))


def test_no_state_has_a_field_name_of_optax():
    names, params = set(), jnp.zeros(2)
    for code in STATIC:
        names |= field_names(init_state(policy_of(code), rows=1, norm="rms"))
    losses = skip_steps(optax.identity(), Fixed(1.0), loss_policy=ZScore(3.0))
    names |= field_names(trust_clip(losses).init(params))
    assert {"count", "mu", "inner_state", "z", "trace", "key"} < optax_names()
    assert {"policy_count", "loss_mean", "tally_steps", "totals_norm"} < names
    assert not names & (optax_names() | {"mean", "inner", "norm", "steps"})


def test_optax_reads_and_sets_the_count_of_the_optimizer(lenient):
    """The count of a clipper is another one, at each place of a chain."""
    clip, params = clip_by_policy(Warmup(ZScore(), steps=2)), jnp.ones(2)
    tx = optax.chain(clip, optax.adam(0.1), clip)
    _, state = tx.update(params, tx.init(params), params)
    assert optax.tree.get(state, "count") == 1
    changed = optax.tree.set(state, count=jnp.int32(7))
    assert optax.tree.get(changed, "count") == 7
    assert_same((changed[0], changed[2]), (state[0], state[2]))
    assert state[0].clip_policy.policy_recorded.tolist() == [1]


def test_the_lbfgs_loop_of_optax_runs_with_a_clipper(lenient):
    """https://optax.readthedocs.io/en/latest/_collections/examples/lbfgs.html"""

    def loss(params):
        return jnp.sum(100.0 * (params[1:] - params[:-1] ** 2) ** 2)

    params = jnp.array([-1.0, 1.5])
    tx = optax.chain(clip_by_quantile(0.9), optax.lbfgs())
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry):
        params, state = carry
        value, grad = value_and_grad(params, state=state)
        extra = {"value": value, "grad": grad, "value_fn": loss}
        updates, state = tx.update(grad, state, params, **extra)
        return optax.apply_updates(params, updates), state

    def is_unfinished(carry):
        _, state = carry
        iteration = optax.tree.get(state, "count")
        gradient_norm = optax.tree.norm(optax.tree.get(state, "grad"))
        return (iteration == 0) | ((iteration < 20) & (gradient_norm >= 1e-3))

    solution, state = jax.lax.while_loop(is_unfinished, step, (params, tx.init(params)))
    assert loss(solution) < 1e-6
    assert clip_metrics(state)["clip/steps"] == optax.tree.get(state, "count") > 2


def test_multisteps_observes_the_mean_gradient_of_each_update(lenient):
    tx = optax.MultiSteps(clip_by_quantile(0.5, history_length=20), 3)
    state = tx.init({"w": STEPS[0]})
    update, log = jax.jit(tx.update), ClipLog()
    for grad in STEPS:
        _, state = update({"w": grad}, state)
        log.record(clip_metrics(state))
    assert int(clip_metrics(state)["clip/steps"]) == len(log) == 10
    assert log.summary().repeated == 20
    means = np.asarray(STEPS).reshape(10, 3, 2).mean(axis=1)
    ordered = optax.tree.get(state, "policy_ordered")[0, 1:11]
    norms = np.sort(np.linalg.norm(means, axis=1))
    np.testing.assert_allclose(ordered, norms, rtol=1e-5)


def test_apply_if_finite_keeps_the_history():
    tx = optax.apply_if_finite(clip_by_quantile(history_length=8), 5)
    state = tx.init({"w": STEPS[0]})
    _, state = tx.update({"w": STEPS[0]}, state)
    _, after = tx.update({"w": STEPS[0] * jnp.nan}, state)
    assert_same(state.inner_state, after.inner_state)


@pytest.mark.parametrize("wrapper", ["masked", "partition"])
def test_only_the_leaves_that_reach_the_clipper_have_rows(wrapper):
    clip = clip_by_policy(Fixed(1.0))
    if wrapper == "masked":
        tx = optax.masked(clip, {"a": True, "b": False})
    else:
        parts = {"clip": clip, "leave": optax.identity()}
        tx = optax.partition(parts, {"a": "clip", "b": "leave"})
    grads = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([3.0, 4.0])}
    updates, state = jax.jit(tx.update)(grads, tx.init(grads), grads)
    np.testing.assert_allclose(updates["a"], [0.6, 0.8], rtol=1e-6)
    np.testing.assert_array_equal(updates["b"], [3.0, 4.0])
    assert optax.tree.get(state, "clip_threshold").shape == (1,)


def test_only_hyperparameters_around_the_clipper_are_injected():
    def make(learning_rate):
        return optax.chain(clip_by_policy(Fixed(1.0)), optax.sgd(learning_rate))

    tx = optax.inject_hyperparams(make)(learning_rate=0.5)
    grads = {"w": jnp.array([3.0, 4.0])}
    updates, _ = jax.jit(tx.update)(grads, tx.init(grads), grads)
    np.testing.assert_allclose(updates["w"], [-0.3, -0.4], rtol=1e-6)

    inject = optax.inject_hyperparams
    static = ("quantile", "history_length", "include_current")
    tx = inject(clip_by_quantile, static_args=static)(0.5, history_length=4)
    _, state = jax.jit(tx.update)(grads, tx.init(grads), grads)
    assert float(clip_metrics(state)["clip/norm"]) == 5.0
    tx = inject(clip_by_quantile, static_args=static[1:])(0.5, history_length=4)
    with pytest.raises(TypeError, match=r"quantile must be .* static_args"):
        tx.init(grads)


def test_every_member_of_a_vmapped_ensemble_has_its_own_history():
    tx = clip_by_quantile(0.5, history_length=8)
    members = jnp.stack([STEPS, 10 * STEPS])
    state = jax.vmap(tx.init)(members[:, 0])
    update_all, update_one = jax.jit(jax.vmap(tx.update)), jax.jit(tx.update)
    for step in range(10):
        _, state = update_all(members[:, step], state)
    for member in range(2):
        alone = tx.init(members[member, 0])
        for step in range(10):
            _, alone = update_one(members[member, step], alone)
        np.testing.assert_allclose(
            state.clip_threshold[member], alone.clip_threshold, rtol=1e-6
        )


def test_one_compilation_with_donated_buffers_serves_100_steps():
    tx = clip_by_quantile(0.5, history_length=8)
    state = tx.init({"w": STEPS[0]})
    kinds = jax.tree.map(lambda leaf: (leaf.dtype, leaf.weak_type), state)
    update = jax.jit(tx.update, donate_argnums=1)
    read, previous = jax.jit(clip_metrics), []
    for step in range(100):
        previous = clip_metrics(state), read(state)
        _, state = update({"w": STEPS[step % 30]}, state)
    for metrics in previous:  # the counters of the donated state are deleted
        assert metrics["clip/steps"] == 99
        assert metrics["clip/nonfinite_total"] == 0
    assert update._cache_size() == 1
    assert jax.tree.map(lambda leaf: (leaf.dtype, leaf.weak_type), state) == kinds


def test_init_and_update_accept_shapes_and_empty_trees():
    shape = jax.ShapeDtypeStruct((2,), jnp.float32)
    assert_same(*[clip_by_quantile().init(x) for x in (shape, jnp.zeros(2))])
    for scope in ("parameter", "global", "unit"):
        tx = clip_by_policy(Fixed(1.0), scope=scope)
        for tree in ({}, {"a": None}, {"a": optax.MaskedNode()}):
            updates, _ = jax.jit(tx.update)(tree, tx.init(tree))
            assert updates == tree
    tx = trust_clip(optax.sgd(1.0))
    updates, state = tx.update({}, tx.init({}), {})
    assert updates == {}
    assert clip_metrics(state)["clip/update_steps"] == 1


@pytest.mark.parametrize("norm", ["l2", "max"])
def test_a_leaf_without_units_has_no_row(norm):
    """At scope "unit" a leaf of shape (2, 0) has none; the next leaf has three."""
    tx = clip_by_policy(Fixed(1.0), scope="unit", norm=norm)
    tree = {"a": jnp.zeros((2, 0)), "b": 3.0 * jnp.ones((4, 3))}
    updates, state = tx.update(tree, tx.init(tree))
    assert updates["a"].shape == (2, 0)
    expected = 0.5 if norm == "l2" else 1.0
    np.testing.assert_allclose(updates["b"], np.full((4, 3), expected), rtol=1e-6)
    assert state.clip_norm.shape == (3,)
    only = {"a": tree["a"]}
    assert tx.update(only, tx.init(only))[0]["a"].shape == (2, 0)


def test_an_absent_gradient_keeps_its_units():
    tx = clip_by_param_ratio()
    params = {"a": jnp.ones((2, 3)), "c": jnp.ones((2, 3))}
    state = tx.init(params)
    updates, state = tx.update({"a": None, "c": params["c"]}, state, params)
    assert updates["a"] is None
    np.testing.assert_array_equal(np.isnan(state.clip_norm), [True] * 3 + [False] * 3)


def test_an_optax_schedule_counts_recorded_norms_and_resumes(lenient):
    """A row that is idle or not finite does not advance; `Scheduled` says the same."""
    schedule = optax.piecewise_interpolate_schedule("linear", 4.0, {10: 0.25, 20: 2.0})
    grads = {"a": STEPS.at[5:9].set(0.0), "b": 3 * STEPS.at[4].set(jnp.nan)}

    def run(policy, half=None):
        tx = clip_by_policy(Cap(Drop(Fixed(50.0), clip=policy), max_norm=3.0))

        def step(state, grad):
            updates, state = tx.update(grad, state)
            return state, (updates, state.clip_threshold)

        state, steps = tx.init({"a": STEPS[0], "b": STEPS[0]}), jnp.arange(30)
        parts = [steps] if half is None else [steps[:half], steps[half:]]
        taken = []
        for part in parts:
            part = jax.tree.map(lambda leaf, part=part: leaf[part], grads)
            state, result = jax.lax.scan(step, state, part)
            taken.append(result)
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *taken)

    points = [(0, 4.0), (10, 1.0), (20, 2.0)]
    updates, threshold = run(OptaxSchedule(schedule))
    assert_same(run(OptaxSchedule(schedule), half=7), (updates, threshold))
    _, expected = run(Scheduled(points))
    np.testing.assert_allclose(threshold, expected, rtol=1e-6)
    of_b = np.interp(np.r_[:5, 4:29], *zip(*points, strict=True))
    np.testing.assert_allclose(threshold[:, 1], np.minimum(of_b, 3.0), rtol=1e-6)
    assert (threshold[8, 0], threshold[9, 0]) == (threshold[5, 0], threshold[5, 0])
    with pytest.raises(TypeError, match=r"an optax schedule, got 3\.0"):
        OptaxSchedule(3.0)


def test_debug_nans_finds_nothing_in_a_step():
    tx = clip_by_quantile(0.5, history_length=4, scope="global")
    with jax.debug_nans(True), jax.numpy_rank_promotion("raise"):
        state = tx.init({"w": STEPS[0]})
        update = jax.jit(tx.update)
        for grad in STEPS[:5]:
            _, state = update({"w": grad}, state)
    assert int(clip_metrics(state)["clip/steps"]) == 5


def test_skips_and_metrics_are_read_deep_in_a_state_and_inside_jit():
    tx = optax.MultiSteps(skip_steps(optax.sgd(1.0), Quantile(0.5)), 1)
    state = tx.init({"w": STEPS[0]})
    check_skips(state)
    assert "clip/norm" in jax.jit(clip_metrics)(state)


SHAPES = [(), (1,), (5,), (3, 4), (1, 4), (3, 2, 4), (3, 3, 2, 4)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_nfnets_rule_is_that_of_optax(shape):
    rng = np.random.default_rng(0)
    params = jnp.asarray(rng.normal(size=shape), jnp.float32)
    grads = jnp.asarray(rng.normal(size=shape), jnp.float32)
    tx = clip_by_param_ratio(0.5, rule="nfnets")
    reference = optax.adaptive_grad_clip(0.5)
    updates, state = tx.update(grads, tx.init(params), params)
    expected, _ = reference.update(grads, reference.init(params), params)
    # XLA compiles what clips a leaf, and rounds differently than single operations.
    np.testing.assert_allclose(updates, expected, rtol=3e-7)
    assert (np.asarray(state.clip_scale) < 1).any()


def units(params, rule="flax"):
    """Return the number of units of parameters; shapes suffice."""
    return len(clip_by_param_ratio(rule=rule).init(params).clip_norm)


def test_flax_linen_units(lenient):
    nn = pytest.importorskip("flax.linen")
    image = jnp.ones((1, 8, 8, 4))
    modules = [
        (7 + 1, nn.Dense(7), jnp.ones((1, 3))),
        (6 + 1, nn.Conv(6, (3, 3)), image),
        (8 + 1, nn.Conv(8, (3, 3), feature_group_count=4), image),
        (6 + 1, nn.ConvTranspose(6, (3, 3)), image),
        (11, nn.Embed(11, 5), jnp.array([1])),
        # query, key and value have 2 heads of 4 outputs each, and out has 8 outputs.
        (
            3 * 8 + 8,
            nn.MultiHeadDotProductAttention(num_heads=2, use_bias=False),
            jnp.ones((1, 5, 8)),
        ),
    ]
    for count, module, inputs in modules:
        assert units(jax.eval_shape(module.init, jax.random.key(0), inputs)) == count


def test_flax_nnx_units(lenient):
    nnx = pytest.importorskip("flax.nnx")
    modules = {
        7 + 1: lambda rngs: nnx.Linear(3, 7, rngs=rngs),
        6 + 1: lambda rngs: nnx.Conv(4, 6, (3, 3), rngs=rngs),
        11: lambda rngs: nnx.Embed(11, 5, rngs=rngs),
    }
    for count, make in modules.items():
        module = nnx.eval_shape(lambda make=make: make(nnx.Rngs(0)))
        assert units(nnx.state(module, nnx.Param)) == count


def test_haiku_units(lenient):
    hk = pytest.importorskip("haiku")
    image = jnp.ones((1, 8, 8, 4))
    modules = [
        (7 + 1, lambda x: hk.Linear(7)(x)),
        (6 + 1, lambda x: hk.Conv2D(6, 3)(x)),
        (6 + 1, lambda x: hk.Conv2DTranspose(6, 3)(x)),
        (8 + 1, lambda x: hk.DepthwiseConv2D(2, 3)(x)),
    ]
    for count, function in modules:
        init = hk.transform(function).init
        assert units(jax.eval_shape(init, jax.random.key(0), image)) == count


def shapes_of(make):
    """Return the shapes of an Equinox module in place of its arrays."""
    eqx = pytest.importorskip("equinox")
    module = eqx.filter_eval_shape(make, key=jax.random.key(0))
    return eqx.filter(module, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))


def test_equinox_units(lenient):
    eqx = pytest.importorskip("equinox")
    modules = {
        7 + 1: partial(eqx.nn.Linear, 3, 7),
        6 + 1: partial(eqx.nn.Conv2d, 4, 6, 3),
        11: partial(eqx.nn.Embedding, 11, 5),
    }
    for count, make in modules.items():
        assert units(shapes_of(make), "equinox") == count


def test_equinox_and_haiku_norms_run_over_the_inputs_of_each_output(lenient):
    eqx, hk = pytest.importorskip("equinox"), pytest.importorskip("haiku")
    attention = shapes_of(partial(eqx.nn.MultiheadAttention, 2, 8, output_size=6))
    upwards = shapes_of(partial(eqx.nn.ConvTranspose2d, 4, 6, 3, use_bias=False))
    embed = hk.transform(lambda x: hk.Embed(11, 5)(x)).init
    table = jax.eval_shape(embed, jax.random.key(0), jnp.array([1]))
    rng = np.random.default_rng(0)
    # In Equinox the outputs come first; in a table each word has a vector.
    for shapes, rule in (
        (attention.output_proj, "equinox"),
        (upwards, "equinox"),
        (table, "flax"),
    ):
        arrays = jax.tree.map(lambda x: np.float32(rng.normal(size=x.shape)), shapes)
        tx = clip_by_param_ratio(rule=rule)
        _, state = jax.jit(tx.update)(arrays, tx.init(arrays), arrays)
        weight = jax.tree.leaves(arrays)[0]
        wanted = np.linalg.norm(np.reshape(weight, (weight.shape[0], -1)), axis=1)
        np.testing.assert_allclose(state.clip_norm[: len(wanted)], wanted, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_leaves_have_float32_norms_and_keep_their_type(dtype):
    tx = clip_by_policy(Fixed(1.0), scope="global")
    grads = {"a": jnp.full((48,), 2000.0, dtype), "b": jnp.full((1,), 2000.0, dtype)}
    updates, state = jax.jit(tx.update)(grads, tx.init(grads))
    value = float(grads["a"][0])
    np.testing.assert_allclose(state.clip_norm, [7 * value], rtol=1e-6)
    assert updates["a"].dtype == dtype
    np.testing.assert_allclose(np.float64(updates["a"]), 1 / 7, rtol=4e-3)


def linen(key, x):
    nn = pytest.importorskip("flax.linen")
    model = nn.Dense(1)
    return model.init(key, x), model.apply


def nnx(key, x):
    module = pytest.importorskip("flax.nnx")
    graph, params = module.split(module.Linear(3, 1, rngs=module.Rngs(0)))
    return params, lambda params, x: module.merge(graph, params)(x)


def equinox(key, x):
    eqx = pytest.importorskip("equinox")
    params, rest = eqx.partition(eqx.nn.Linear(3, 1, key=key), eqx.is_array)
    return params, lambda params, x: jax.vmap(eqx.combine(params, rest))(x)


@pytest.mark.parametrize("library", [linen, nnx, equinox], ids=lambda f: f.__name__)
def test_a_library_trains_with_the_thresholds_of_its_history(library, lenient):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(10, 8, 3)), jnp.float32)
    params, apply = library(jax.random.key(0), x[0])
    tx = optax.chain(clip_by_quantile(0.5, scope="global"), optax.sgd(0.1))

    @jax.jit
    def step(params, state, x):
        def loss(params):
            return jnp.mean(jnp.square(apply(params, x) - x.sum(1, keepdims=True)))

        grads = jax.grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, grads

    state, past = tx.init(params), []
    for batch in x:
        params, state, grads = step(params, state, batch)
        limit = np.quantile(past, 0.5) if past else np.inf
        np.testing.assert_allclose(state[0].clip_threshold, [limit], rtol=1e-5)
        squares = [np.sum(np.square(leaf)) for leaf in jax.tree.leaves(grads)]
        past.append(np.sqrt(sum(squares)))
