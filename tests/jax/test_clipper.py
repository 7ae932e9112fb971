"""The optax transformations: golden traces, numeric rules, chains, skipped steps."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import autoclip_jax
from autoclip_core import Cap, Drop, Fixed, Quantile, ZScore
from autoclip_core.clipper.norms import NORMS
from autoclip_jax import (
    check_skips,
    clip_by_ema_ratio,
    clip_by_mean_std,
    clip_by_param_ratio,
    clip_by_policy,
    clip_by_quantile,
    clip_by_zscore,
    clip_metrics,
    skip_steps,
)

from ..support.account import norm_of
from ..support.cases import policy_of
from ..support.traces import check_traces, traced_policies

TWO_LEAVES = {"a": np.ones(1, np.float32), "b": np.ones(1, np.float32)}
NESTED = {"x": dict(TWO_LEAVES)}
FACTORIES = {
    "quantile": lambda **k: clip_by_quantile(0.9, history_length=20, **k),
    "mean_std": lambda **k: clip_by_mean_std(2.0, history_length=20, **k),
    "zscore": lambda **k: clip_by_zscore(warmup_steps=5, **k),
    "ema_ratio": lambda **k: clip_by_ema_ratio(warmup_steps=0, **k),
    "param_ratio": lambda **k: clip_by_param_ratio(0.1, **k),
}
KINDS = {
    type(policy_of(code).init(1)): code
    for code in traced_policies()
    if "None" not in code and "skip" not in code
}
"""A policy for each class of state. `core/test_parity.py` compiles every policy."""


@pytest.fixture(autouse=True)
def strict():
    """Make implicit promotion of types and ranks an error."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


MOST_ROWS = 11
"""The number of rows of every compilation; the last rows may be unused."""


@lru_cache(1)  # all traces of a policy use one compilation
def compiled(policy):
    """Return a transformation and its jitted step on leaves of one element."""
    tx = clip_by_policy(policy)

    @jax.jit
    def step(norms, param_norms, state):
        leaves, params = jnp.split(norms, MOST_ROWS), jnp.split(param_norms, MOST_ROWS)
        return tx.update(leaves, state, params)[1]

    return tx, step


def through_optax(policy, series):
    """Run jitted steps; each norm of a step is a leaf of one element."""
    tx, step = compiled(policy)
    rows = series.norms.shape[1]
    unused = [(0, 0), (0, MOST_ROWS - rows)]
    norms, param_norms = (np.pad(x, unused) for x in (series.norms, series.param_norms))
    state = tx.init([jnp.zeros(1)] * MOST_ROWS)
    thresholds, scales = [], []
    for inputs in zip(norms, param_norms, strict=True):
        state = step(*inputs, state)
        thresholds.append(np.asarray(state.clip_threshold)[:rows])
        scales.append(np.asarray(state.clip_scale)[:rows])
    return np.stack(thresholds), np.stack(scales)


@pytest.mark.slow
@pytest.mark.parametrize("code", KINDS.values())
def test_jitted_steps_match_the_golden_traces(code):
    check_traces(through_optax, code)


def tree(scale=1.0):
    """Return leaves of several types, including an absent one and integers."""
    return {
        "kernel": jnp.full((3, 2), 2.0 * scale),
        "half": jnp.full((4,), 3.0 * scale, jnp.bfloat16),
        "absent": None,
        "complex": jnp.array([3 + 4j]) * jnp.complex64(scale),
        "count": jnp.arange(2),
    }


def norms_of(leaves):
    return [float(np.sqrt(np.sum(np.abs(np.complex128(leaf)) ** 2))) for leaf in leaves]


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("name", FACTORIES)
def test_leaves_keep_their_types_and_are_scaled_by_the_state(name, jit):
    tx = FACTORIES[name](scope="parameter")
    params = tree()
    state = tx.init(params)
    update = jax.jit(tx.update) if jit else tx.update
    for scale in [1.0, 1.5, 0.5, 2.0, 1.0, 1.0, 1.0, 40.0]:
        grads = tree(scale)
        updates, state = update(grads, state, params)
    assert updates["absent"] is None
    np.testing.assert_array_equal(updates["count"], grads["count"])
    order = sorted(grads)  # a dict's leaves come in the order of its keys
    scales = dict(zip(order, np.asarray(state.clip_scale), strict=True))
    norms = dict(zip(order, np.asarray(state.clip_norm), strict=True))
    for key in ("kernel", "half", "complex"):
        assert updates[key].dtype == grads[key].dtype
        assert norms[key] == pytest.approx(norms_of([grads[key]])[0], rel=1e-6)
        wanted = np.complex128(grads[key]) * scales[key]
        tolerance = 4e-3 if key == "half" else 1e-6
        np.testing.assert_allclose(np.complex128(updates[key]), wanted, rtol=tolerance)
        assert scales[key] < 1
    assert np.isnan([norms["absent"], norms["count"]]).all()


def test_a_chain_clips_to_the_median_of_the_past():
    tx = optax.chain(clip_by_quantile(0.5, scope="global"), optax.sgd(1.0))
    params = {"w": jnp.zeros(2), "b": jnp.zeros(())}
    state = tx.init(params)

    @jax.jit
    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    past = []
    rng = np.random.default_rng(0)
    for _ in range(30):
        grads = {"w": np.float32(rng.normal(size=2)), "b": np.float32(rng.normal())}
        before = params
        params, state = step(grads, state, params)
        norm = np.sqrt(np.sum(grads["w"] ** 2) + grads["b"] ** 2)
        limit = np.quantile(np.float32(past), 0.5) if past else np.inf
        scale = min(1.0, limit / norm)
        np.testing.assert_allclose(
            before["w"] - params["w"], scale * grads["w"], rtol=1e-5, atol=1e-7
        )
        past.append(norm)
    assert float(clip_metrics(state)["clip/norm"]) == pytest.approx(norm, rel=1e-6)
    assert int(clip_metrics(state)["clip/steps"]) == 30


def test_one_compilation_serves_every_step_and_scan_agrees():
    tx = clip_by_quantile(0.9, history_length=10)
    grads = jnp.asarray(np.random.default_rng(0).normal(size=(50, 3)), jnp.float32)
    traces = []

    @jax.jit
    def step(state, grad):
        traces.append(None)
        updates, state = tx.update(grad, state)
        return state, updates

    state = tx.init(grads[0])
    steps = []
    for grad in grads:
        state, updates = step(state, grad)
        steps.append(updates)
    assert len(traces) == 1
    last, scanned = jax.lax.scan(step, tx.init(grads[0]), grads)
    np.testing.assert_array_equal(scanned, jnp.stack(steps))
    np.testing.assert_array_equal(last.clip_threshold, state.clip_threshold)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_becomes_zero_and_is_not_recorded(bad):
    tx = clip_by_quantile(0.5, history_length=10)
    state = tx.init([jnp.zeros(2), jnp.zeros(2)])
    for norm in [1.0, 2.0, 3.0]:
        grads = [jnp.array([norm, 0.0]), jnp.array([norm, 0.0])]
        _, state = tx.update(grads, state)
    updates, after = tx.update([jnp.array([bad, 1.0]), jnp.array([1.0, 0.0])], state)
    np.testing.assert_array_equal(updates[0], [0.0, 0.0])
    np.testing.assert_array_equal(updates[1], [1.0, 0.0])
    ordered, old = (s.clip_policy.policy_ordered for s in (after, state))
    np.testing.assert_array_equal(ordered[0], old[0])
    assert (np.asarray(ordered[1]) != np.asarray(old[1])).any()
    assert int(after.clip_tally.tally_nonfinite) == 1
    unchanged, _ = clip_by_policy(Fixed(1.0), nonfinite="propagate").update(
        jnp.array([bad, 1.0]), clip_by_policy(Fixed(1.0)).init(jnp.zeros(2))
    )
    np.testing.assert_array_equal(unchanged, [bad, 1.0])


@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_the_norm_is_right_if_its_squares_overflow_or_vanish(size):
    grads = {"a": jnp.full((10,), size), "b": jnp.full((6,), size)}
    for norm, expected in (("l2", 4 * size), ("rms", size), ("max", size)):
        tx = clip_by_policy(Fixed(1.0), scope="global", norm=norm)
        _, state = jax.jit(tx.update)(grads, tx.init(grads))
        assert float(state.clip_norm[0]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_each_norm_of_units_of_groups_and_of_all_rows(norm):
    """A parameter without a gradient does not count, neither in rows nor in metrics."""
    rng = np.random.default_rng(0)
    grads = {"a": rng.normal(size=(3, 4)), "b": rng.normal(size=5), "c": None}
    grads["d"] = 3 * rng.normal(size=(2, 2)) + 4j
    params = jax.tree.map(jnp.ones_like, grads | {"c": np.ones(7)})
    labels = {"a": 0, "b": 1, "c": 0, "d": 1}
    columns = [*grads["a"].T, grads["b"], *grads["d"].T]
    expected = {
        "unit": [*columns[:5], [], *columns[5:]],
        "group": [grads["a"].ravel(), np.append(grads["b"], grads["d"])],
    }
    updates = jax.tree.map(jnp.asarray, grads)
    for scope, rows in expected.items():
        where = {"labels": labels} if scope == "group" else {"scope": scope}
        tx = clip_by_policy(Fixed(1.0), norm=norm, **where)
        scaled, state = tx.update(updates, tx.init(params), params)
        wanted = [norm_of([np.abs(row)], norm) for row in rows]
        wanted = [
            w if len(row) else np.nan for w, row in zip(wanted, rows, strict=True)
        ]
        np.testing.assert_allclose(state.clip_norm, wanted, rtol=1e-6)
        measured = clip_metrics(state)
        for name, tree in (("clip/norm", updates), ("clip/norm_after", scaled)):
            every = [np.abs(leaf) for leaf in jax.tree.leaves(tree)]
            wanted = norm_of(every, norm)
            np.testing.assert_allclose(measured[name], wanted, rtol=1e-6)


def test_half_precision_norms_are_computed_in_float32():
    grads = [jnp.full((40,), 1000.0, jnp.float16)] * 10
    tx = clip_by_policy(Fixed(1.0), scope="global")
    updates, state = tx.update(grads, tx.init(grads))
    assert float(state.clip_norm[0]) == pytest.approx(20000.0, rel=1e-6)
    assert updates[0].dtype == jnp.float16
    assert float(updates[0][0]) == pytest.approx(0.05, rel=1e-3)


def test_labels_make_groups_of_leaves():
    labels = {"encoder": "slow", "decoder": "fast"}
    grads = {
        "encoder": [jnp.array([3.0]), jnp.array([4.0])],
        "decoder": [jnp.array([6.0]), jnp.array([8.0])],
    }
    for argument in (labels, lambda tree: labels):
        tx = clip_by_policy(Fixed(1.0), labels=argument)
        _, state = tx.update(grads, tx.init(grads))
        np.testing.assert_allclose(state.clip_norm, [10.0, 5.0], rtol=1e-6)


def test_an_absent_gradient_has_the_label_of_its_parameter_or_none():
    def by_rank(tree):
        return jax.tree.map(lambda leaf: "matrix" if leaf.ndim == 2 else 1, tree)

    params = {"bias": jnp.ones(1), "kernel": jnp.ones((1, 1)), "frozen": None}
    tx = clip_by_policy(Fixed(1.0), labels=by_rank)
    state = tx.init(params)
    grads = {"bias": jnp.full(1, 5.0), "kernel": None, "frozen": None}
    for _ in range(2):
        updates, state = tx.update(grads, state, params)
    np.testing.assert_array_equal(state.clip_norm, [5.0, np.nan])
    assert updates["bias"] == 1.0
    assert updates["kernel"] is updates["frozen"] is None
    labels = {"bias": "a", "kernel": "a", "frozen": None}
    tx = clip_by_policy(Fixed(1.0), labels=labels)
    _, state = tx.update(grads, tx.init(params), params)
    np.testing.assert_array_equal(state.clip_norm, [5.0])


def test_labels_of_equal_text_and_different_types_are_two_groups():
    grads = {"a": jnp.array([3.0]), "b": jnp.array([4.0]), "c": jnp.array([4.0])}
    tx = clip_by_policy(Fixed(1.0), labels={"a": 1, "b": "1", "c": 1})
    _, state = tx.update(grads, tx.init(grads))
    np.testing.assert_array_equal(np.sort(state.clip_norm), [4.0, 5.0])


def test_agc_uses_the_units_of_flax_layouts():
    kernel = jnp.array([[3.0, 0.0], [4.0, 1.0]])  # (inputs, outputs)
    tx = clip_by_param_ratio(0.5)
    params = {"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
    grads = {"dense": {"kernel": kernel, "bias": jnp.array([3.0, 4.0])}}
    _, state = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(state.clip_norm, [5.0, 5.0, 1.0], rtol=1e-6)
    with pytest.raises(ValueError, match="params must be given"):
        tx.update(grads, tx.init(params))


def test_a_skipped_step_changes_no_leaf_of_the_inner_state():
    inner = optax.adam(0.1)
    tx = skip_steps(inner, Quantile(1.0, history_length=10), max_consecutive=2)
    params = jnp.ones(2)
    state = tx.init(params)
    update = jax.jit(tx.update)
    with jax.numpy_dtype_promotion("standard"):  # Adam needs it
        for grad in ([1.0, 0.0], [0.5, 0.5]):
            updates, state = update(jnp.array(grad), state, params)
            assert (np.asarray(updates) != 0).any()
        for skipped, grad in enumerate(([9.0, 0.0], [np.nan, 0.0], [np.inf, 1.0]), 1):
            updates, after = update(jnp.array(grad), state, params)
            np.testing.assert_array_equal(updates, [0.0, 0.0])
            pairs = zip(
                jax.tree.leaves(after.skip_inner_state),
                jax.tree.leaves(state.skip_inner_state),
                strict=True,
            )
            for new, old in pairs:
                np.testing.assert_array_equal(new, old)
            state = after
            assert int(state.skip_total) == int(state.skip_in_a_row) == skipped
        with pytest.raises(RuntimeError, match="3 updates in a row"):
            check_skips(state)
        updates, state = update(jnp.array([0.1, 0.1]), state, params)
    assert int(state.skip_in_a_row) == 0
    # The finite spike was recorded, so the threshold follows a lasting rise.
    assert float(state.skip_clip.clip_threshold[0]) == 9.0


def test_an_optimizer_that_changes_the_type_can_be_wrapped():
    """Adam's moments have the type of the parameters, here float32."""
    params = {"w": jnp.ones(3)}
    tx = skip_steps(optax.adam(0.1), Fixed(2.0))
    update, state = jax.jit(tx.update), tx.init(params)
    with jax.numpy_dtype_promotion("standard"):
        for size, moves in [(1.0, True), (9.0, False), (1.0, True)]:
            grads = {"w": jnp.full(3, size, jnp.bfloat16)}
            updates, state = update(grads, state, params)
            assert updates["w"].dtype == jnp.float32
            assert bool(jnp.all(updates["w"] != 0)) is moves
    assert int(state.skip_total) == 1


def test_an_optimizer_whose_state_changes_its_type_can_be_wrapped():
    """The moments start in bfloat16 and become float32 in the first step."""
    params, tx = jnp.ones(3, jnp.bfloat16), skip_steps(optax.adam(0.1), Fixed(2.0))
    plain, state, alone = optax.adam(0.1), tx.init(params), optax.adam(0.1).init(params)
    with jax.numpy_dtype_promotion("standard"):
        for size in (1.0, 9.0, 0.5, 9.0, 1.0):
            updates, state = jax.jit(tx.update)(jnp.full(3, size), state, params)
            if size < 2:
                wanted, alone = jax.jit(plain.update)(jnp.full(3, size), alone, params)
                np.testing.assert_array_equal(updates, wanted)
    for wrapped, unwrapped in zip(
        jax.tree.leaves(state.skip_inner_state), jax.tree.leaves(alone), strict=True
    ):
        np.testing.assert_array_equal(wrapped, unwrapped, strict=True)


@pytest.mark.parametrize("size", [1e-50, 3e40])
def test_a_float64_norm_beyond_float32_is_infinite_and_below_it_is_kept(size):
    jax.config.update("jax_enable_x64", True)
    try:
        grads = {"a": jnp.array([size, 0.0])}
        tx = clip_by_policy(Fixed(1.0))
        updates, state = jax.jit(tx.update)(grads, tx.init(grads))
        kept = float(updates["a"][0])
        total = float(clip_metrics(state)["clip/nonfinite_total"])
    finally:
        jax.config.update("jax_enable_x64", False)
    is_infinite = size > 1.0
    assert kept == (0.0 if is_infinite else size)
    assert total == is_infinite


@pytest.mark.parametrize(("norm", "count"), [("l2", 1), ("rms", 7)])
def test_float64_and_bfloat16_leaves_share_a_norm(norm, count):
    """Norms and scales are float64, the state is float32."""
    jax.config.update("jax_enable_x64", True)
    try:
        a, threshold = np.array([0.1, 0.2, 0.7]), float(np.float32(0.3))
        grads = {"a": jnp.array(a), "b": jnp.ones(4, jnp.bfloat16)}
        tx = clip_by_policy(Fixed(threshold), scope="global", norm=norm)
        state = tx.init(grads)
        kinds = [leaf.dtype for leaf in jax.tree.leaves(state)]
        updates, state = jax.jit(tx.update)(grads, state)
        assert [leaf.dtype for leaf in jax.tree.leaves(state)] == kinds
    finally:
        jax.config.update("jax_enable_x64", False)
    assert jnp.float64 not in kinds
    assert {k: v.dtype for k, v in updates.items()} == {
        "a": jnp.float64,
        "b": jnp.bfloat16,
    }
    expected = np.sqrt((a @ a + 4) / count)
    np.testing.assert_allclose(state.clip_norm, [expected], rtol=1e-7)
    scaled = a * (threshold / expected)
    np.testing.assert_allclose(np.asarray(updates["a"]), scaled, rtol=1e-12)


MISTAKES = {
    "a missing label": (
        lambda: clip_by_policy(Fixed(1.0), labels={"a": 1}).init(TWO_LEAVES),
        "labels must be a prefix of the tree",
    ),
    "rule": (
        lambda: clip_by_quantile(rule="equinox"),
        'rule must be given with scope="unit"',
    ),
    "a vmapped state": (
        lambda: clip_metrics(
            jax.vmap(clip_by_quantile().init)([jnp.ones((2, 3)), jnp.ones((2, 1))])
        ),
        r"jax.vmap\(clip_metrics\)",
    ),
    "one None for several": (
        lambda: clip_by_param_ratio(0.1).update(
            {"x": None}, clip_by_param_ratio(0.1).init(NESTED), NESTED
        ),
        "a None for each parameter",
    ),
    "no label": (
        lambda: clip_by_policy(Fixed(1.0), labels=[1, None]).init(
            [*TWO_LEAVES.values()]
        ),
        "labels must be a label per array",
    ),
    "skip": (lambda: clip_by_policy(Fixed(1.0), nonfinite="skip"), "skip_steps"),
    "raise": (lambda: clip_by_policy(Fixed(1.0), nonfinite="raise"), "check_skips"),
    "drop": (lambda: clip_by_policy(Drop(Fixed(1.0), action="skip")), "skip_steps"),
    "drop in skip_steps": (
        lambda: skip_steps(
            optax.sgd(0.1), Cap(Drop(Fixed(4.0), action="skip"), max_norm=1.0)
        ),
        r"without Drop.*pass the policy inside Drop.*clip_by_policy\(Fixed",
    ),
    "clip in skip_steps": (
        lambda: skip_steps(optax.sgd(0.1), Drop(Fixed(4.0), clip=Fixed(1.0))),
        "without Drop.*pass the policy inside Drop",
    ),
    "history": (lambda: clip_by_quantile(history_length=None), "StreamingQuantile"),
    "scope": (lambda: clip_by_quantile(scope="layer"), "one of 'parameter'"),
    "both": (
        lambda: clip_by_quantile(scope="unit", global_clipping=True),
        "older spelling",
    ),
    "labels": (lambda: clip_by_quantile(scope="global", labels="a"), "without a scope"),
    "axis": (lambda: clip_by_param_ratio(axis_name="x"), "axis_name"),
    "quantile": (lambda: clip_by_quantile(90), r"did you mean 0\.9\?"),
    "metrics": (lambda: clip_metrics(optax.EmptyState()), "state of a clipper"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_an_error_names_the_way_out(name):
    call, words = MISTAKES[name]
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: skip_steps(0.1, Fixed(1.0)), "inner must be an optax gradient"),
        (lambda: clip_by_quantile(axis_name=3), "axis_name must be the name"),
        (
            lambda: jax.jit(
                optax.inject_hyperparams(skip_steps, static_args=("inner", "policy"))(
                    inner=optax.sgd(0.1), policy=Fixed(1.0), max_consecutive=3
                ).init
            )(jnp.ones(1)),
            "name it in static_args",
        ),
    ],
)
def test_an_argument_of_the_wrong_type_is_an_error(call, words):
    with pytest.raises((TypeError, ValueError), match=words):
        call()


@pytest.mark.parametrize("field", ["clip_threshold", "clip_scale", "clip_finite"])
def test_a_state_with_a_field_of_another_shape_is_refused(field):
    tx, grads = clip_by_quantile(), [jnp.ones(2), jnp.ones(3)]
    state = tx.init(grads)
    other = state._replace(**{field: jnp.ones((5,), getattr(state, field).dtype)})
    with pytest.raises(ValueError, match=f"must fit its policy.*{field}.*5"):
        tx.update(grads, other)
    tally = state.clip_tally._replace(tally_steps=jnp.zeros((3,), jnp.int32))
    with pytest.raises(ValueError, match=r"must fit its policy.*tally_steps.*\(3,\)"):
        tx.update(grads, state._replace(clip_tally=tally))


@pytest.mark.parametrize(
    "make",
    [
        lambda: clip_by_quantile(),
        lambda: clip_by_param_ratio(),
        lambda: skip_steps(optax.sgd(0.1), Quantile(0.9)),
    ],
    ids=["quantile", "agc", "skip"],
)
def test_later_steps_outside_of_jit_compile_nothing(make):
    compiled = []

    def count(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    tx, params = make(), {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
    state = tx.init(params)

    def step(size, state):
        grads = jax.tree.map(lambda leaf: leaf * jnp.float32(size), params)
        return tx.update(grads, state, params)[1]

    with jax.numpy_dtype_promotion("standard"):
        for size in (1.0, 2.0, 0.5):  # the second is skipped
            state = step(size, state)
        # It stays registered: the lowest supported JAX cannot unregister it.
        jax.monitoring.register_event_duration_secs_listener(count)
        for size in np.linspace(0.1, 0.4, 30):
            state = step(size, state)
        assert compiled == []
        jax.jit(lambda x: x * 3)(jnp.ones(7))
        assert compiled  # the listener counts compilations


def test_a_state_of_another_transformation_is_refused():
    grads = {"w": jnp.ones(3)}
    clip, skip = clip_by_quantile(), skip_steps(optax.sgd(0.1), Quantile(0.9))
    with pytest.raises(TypeError, match=r"must be the SkipState.*got ClipState"):
        skip.update(grads, clip.init(grads))
    with pytest.raises(TypeError, match=r"must be the ClipState.*got SkipState"):
        clip.update(grads, skip.init(grads))
    with pytest.raises(TypeError, match=r"got NoneType; pass that of init\(params\)"):
        clip.update(grads, None)
    with pytest.raises(TypeError, match=r"got dict; restore .* of init\(params\)"):
        clip.update(grads, clip.init(grads)._asdict())
    broken = skip.init(grads)._replace(skip_total=jnp.zeros(3, jnp.int32))
    with pytest.raises(ValueError, match=r"skip_total of shape \(\), got \(3,\)"):
        skip.update(grads, broken)
    agc = clip_by_param_ratio(scope="parameter")
    with pytest.raises(ValueError, match="params must have the structure"):
        agc.update({"a": grads["w"], "b": grads["w"]}, agc.init([1.0, 1.0]), grads)


def test_names_that_resemble_a_bias_or_a_transposed_kernel():
    tree = {
        "lora": {"b": jnp.ones((3, 7))},
        "up_transpose/~/linear": {"w": jnp.ones((3, 7))},
        "my_transpose": {"kernel": jnp.ones((3, 7))},
        "conv": {"b": jnp.ones((8, 1, 1))},
        "conv2_d_transpose": {"w": jnp.ones((2, 2, 5, 3))},  # outputs, inputs
        "conv_transpose": {"kernel": jnp.ones((2, 2, 3, 4))},  # Flax: inputs, outputs
    }
    units = {
        name: len(clip_by_param_ratio().init(leaf).clip_norm)
        for name, leaf in tree.items()
    }
    assert units["lora"] == 7
    assert units["conv"] == 1
    rows = len(clip_by_param_ratio().init(tree).clip_norm)
    assert rows == 7 + 7 + 7 + 1 + 5 + 4


def test_a_state_of_other_parameters_is_refused():
    tx = clip_by_quantile()
    state = tx.init([jnp.zeros(2)])
    with pytest.raises(ValueError, match="1 rows, and the updates make 2"):
        tx.update([jnp.zeros(2), jnp.zeros(2)], state)


def test_defaults_are_those_of_the_other_frameworks():
    params = [jnp.ones((2, 2)), jnp.ones((2, 2))]
    rows = {
        name: len(make().init(params).clip_norm) for name, make in FACTORIES.items()
    }
    assert rows == {
        "quantile": 2,
        "mean_std": 2,
        "zscore": 1,
        "ema_ratio": 2,
        "param_ratio": 4,
    }
    assert autoclip_jax.__version__
    assert policy_of("ZScore()") == ZScore()


@pytest.mark.parametrize("scope", ["global", "parameter", "unit"])
@pytest.mark.parametrize("size", [8e37, 1e38, 3e38])
def test_a_norm_near_the_largest_float_is_not_lost(size, scope):
    tx = clip_by_policy(Fixed(1.0), scope=scope)
    grads = {"w": jnp.array([size, 1.0])}
    updates, state = jax.jit(tx.update)(grads, tx.init(grads))
    np.testing.assert_allclose(state.clip_norm, [size], rtol=1e-6)
    assert state.clip_clipped.all()
    assert np.linalg.norm(np.float64(updates["w"])) <= 1.0 + 1e-6
    is_removed = not updates["w"].any()  # XLA rounds a subnormal scale to 0
    assert int(clip_metrics(state)["clip/dropped_total"]) == is_removed
