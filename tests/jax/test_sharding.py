"""Eight devices give the thresholds and updates of one, for any sharding of gradients.

The devices are eight parts of the CPU. JAX creates them when it starts. Therefore one
child process runs the checks.
"""

import os
import re
import subprocess
import sys
import warnings
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from autoclip_core import ClipLog, Fixed
from autoclip_jax import (
    check_skips,
    check_state,
    clip_by_param_ratio,
    clip_by_policy,
    clip_by_quantile,
    clip_metrics,
    skip_steps,
    trust_clip,
)

AXES = ("data", "model")
P = jax.sharding.PartitionSpec
ROOT = Path(__file__).parents[2]
TYPED = hasattr(jax, "shard_map")
"""Whether the types of JAX contain the axes along which a value varies."""


def mesh():
    return jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), AXES)


def mapped(function, inputs, outputs, check=True):
    if TYPED:
        return jax.jit(
            jax.shard_map(
                function,
                mesh=mesh(),
                in_specs=inputs,
                out_specs=outputs,
                check_vma=check,
            )
        )
    from jax.experimental.shard_map import shard_map

    return jax.jit(shard_map(function, mesh(), inputs, outputs, check_rep=check))


def grads(step):
    """Return the unsharded gradients of a step."""
    rng = np.random.default_rng(step)
    shapes = {"both": (8, 4), "bias": (6,), "data": (8, 3), "model": (5, 4)}
    tree = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    return jax.tree.map(lambda x: jnp.asarray(x * 1.5**step, jnp.float32), tree)


SPECS = {
    "both": P("data", "model"),
    "bias": P(),
    "data": P("data"),
    "model": P(None, "model"),
}


def update_all(transformations):
    """Return an update of several transformations, to compile it once."""

    def update(leaves, states, *params):
        pairs = zip(transformations, states, strict=True)
        results = [tx.update(leaves, state, *params) for tx, state in pairs]
        return tuple(map(list, zip(*results, strict=True)))

    return update


assert_close = partial(jax.tree.map, partial(np.testing.assert_allclose, rtol=2e-6))


def both_scopes(**keywords):
    """Return a clipper of scope "global" and one of scope "parameter"."""
    return [
        clip_by_quantile(0.5, history_length=4, scope=scope, norm=norm, **keywords)
        for scope, norm in (("global", "rms"), ("parameter", "l2"))
    ]


SERIES = 6
"""The number of steps that are compared."""


@cache
def on_one_device():
    """Return the updates and states of one device, at both scopes, for each step."""
    alone, steps = both_scopes(), []
    update, states = jax.jit(update_all(alone)), [tx.init(grads(0)) for tx in alone]
    for step in range(SERIES):
        updates, states = update(grads(step), states)
        steps.append((updates, states))
    assert all((np.asarray(state.clip_scale) < 1).all() for state in states)
    return steps


def steps_agree(update):
    """Compare an update at both scopes with that on one device, over a series."""
    states = [tx.init(grads(0)) for tx in both_scopes()]
    for step, (wanted, alone) in enumerate(on_one_device()):
        updates, states = update(grads(step), states)
        assert_close(updates, wanted)
        for many, one in zip(states, alone, strict=True):
            np.testing.assert_allclose(
                many.clip_threshold, one.clip_threshold, rtol=1e-6
            )


def each_leaf_is_reduced_over_the_axes_it_is_sharded_along():
    update = update_all(both_scopes(axis_name=AXES))
    steps_agree(mapped(update, (SPECS, P()), ([SPECS] * 2, P())))


def squares_that_overflow_are_summed_again_over_all_devices():
    tx = clip_by_policy(Fixed(1.0), scope="global", axis_name=AXES)
    huge = jax.tree.map(lambda x: jnp.full_like(x, 1e30), grads(0))
    update = mapped(tx.update, (SPECS, P()), (SPECS, P()))
    size = sum(leaf.size for leaf in jax.tree.leaves(huge))
    _, state = update(huge, tx.init(huge))
    np.testing.assert_allclose(state.clip_norm, [1e30 * size**0.5], rtol=1e-6)


def without_types_every_leaf_counts_as_sharded_along_all_named_axes():
    cut = {name: x for name, x in grads(3).items() if name == "both"}
    tx = clip_by_policy(Fixed(1.0), scope="global", axis_name=AXES, norm="max")
    specs = {"both": SPECS["both"]}
    update = mapped(tx.update, (specs, P()), (specs, P()), check=False)
    alone = clip_by_policy(Fixed(1.0), scope="global", norm="max")
    wanted, one = jax.jit(alone.update)(cut, alone.init(cut))
    updates, many = update(cut, tx.init(cut))
    assert_close(updates, wanted)
    assert (np.asarray(one.clip_scale) < 1).all()
    np.testing.assert_allclose(many.clip_scale, one.clip_scale, rtol=2e-6)


def pmap_sums_over_the_devices():
    how = {"history_length": 4, "scope": "global", "norm": "rms"}
    tx, whole = (
        clip_by_quantile(0.5, axis_name="x", **how),
        clip_by_quantile(0.5, **how),
    )
    update = jax.pmap(tx.update, axis_name="x", in_axes=(0, None), out_axes=(0, None))
    update_alone = jax.jit(whole.update)
    one = many = tx.init(grads(0))
    for step in range(6):
        pieces = {"a": jnp.asarray(np.random.default_rng(step).normal(size=(8, 3)))}
        pieces["a"] = pieces["a"].astype(jnp.float32) * 1.5**step
        wanted, one = update_alone(pieces, one)
        updates, many = update(pieces, many)
        np.testing.assert_allclose(updates["a"], wanted["a"], rtol=2e-6)
        np.testing.assert_allclose(many.clip_threshold, one.clip_threshold, rtol=1e-6)


def sharded_arrays_under_jit_need_no_axis_name():
    place = {
        name: jax.sharding.NamedSharding(mesh(), spec) for name, spec in SPECS.items()
    }
    jitted = jax.jit(update_all(both_scopes()))

    def update(leaves, states):
        updates, states = jitted(jax.device_put(leaves, place), states)
        for tree in updates:
            for name, leaf in tree.items():
                assert leaf.sharding.is_equivalent_to(place[name], leaf.ndim)
        return updates, states

    steps_agree(update)


def unit_norms_of_sharded_weights_under_jit_are_those_of_one_device():
    place = {
        name: jax.sharding.NamedSharding(mesh(), spec) for name, spec in SPECS.items()
    }
    tx = clip_by_param_ratio(0.1)
    params, leaves = grads(0), grads(5)
    wanted, one = jax.jit(tx.update)(leaves, tx.init(params), params)
    updates, many = jax.jit(tx.update)(
        jax.device_put(leaves, place), tx.init(params), jax.device_put(params, place)
    )
    np.testing.assert_allclose(many.clip_scale, one.clip_scale, rtol=2e-6)
    for name in leaves:
        np.testing.assert_allclose(updates[name], wanted[name], rtol=2e-6)


def a_mesh_of_explicit_axes_gives_the_same_updates():
    """On such a mesh JAX refuses operations on arrays with different shardings."""
    explicit = jax.make_mesh(
        (4, 2), AXES, axis_types=(jax.sharding.AxisType.Explicit,) * 2
    )
    place = {
        name: jax.sharding.NamedSharding(explicit, spec) for name, spec in SPECS.items()
    }
    labels = {"both": 1, "bias": 2, "data": 1, "model": 2}
    # Outside of jit each operation is compiled, so only groups and units run there.
    made = [clip_by_policy(Fixed(0.5), labels=labels), clip_by_param_ratio(0.1)]
    eager = update_all([*made])
    made += [clip_by_policy(Fixed(0.5), scope="parameter", norm="rms")]
    made += [clip_by_policy(Fixed(0.5), scope="global", norm="max")]
    made += [clip_by_param_ratio(0.1, rule="nfnets")]
    jitted = jax.jit(update_all(made))
    params = grads(0)
    states, sharded = [tx.init(params) for tx in made], jax.device_put(params, place)
    for size in (1.0, 1e25):  # the second pass over squares that overflow
        leaves = jax.tree.map(lambda x, size=size: x * jnp.float32(size), grads(5))
        wanted, one = jitted(leaves, states, params)
        for update, count in ((jitted, len(made)), (eager, 2)):
            updates, many = update(
                jax.device_put(leaves, place), states[:count], sharded
            )
            assert_close(updates, wanted[:count])
            for state, alone in zip(many, one[:count], strict=True):
                np.testing.assert_allclose(state.clip_norm, alone.clip_norm, rtol=2e-6)
            for tree in updates:
                for name, leaf in tree.items():
                    assert leaf.sharding.is_equivalent_to(place[name], leaf.ndim)


def parameters_are_measured_over_the_axes_they_are_sharded_along():
    """`trust_clip` measures gradients, updates and parameters."""

    def make(**keywords):
        ratio = clip_by_param_ratio(0.1, scope="parameter", **keywords)
        return [ratio, trust_clip(optax.sgd(0.1), history_length=4, **keywords)]

    pieces, alone = make(axis_name=AXES), make()
    params, leaves = grads(0), grads(5)
    states = [tx.init(params) for tx in alone]
    wanted, one = jax.jit(update_all(alone))(leaves, states, params)
    both = ([SPECS] * 2, P())
    update = mapped(update_all(pieces), (SPECS, P(), SPECS), both)
    updates, many = update(leaves, states, params)
    assert_close(updates, wanted)
    assert one[1].trust_update.clip_clipped.all()
    assert_close(
        [many[0].clip_threshold, many[1].trust_update.clip_threshold],
        [one[0].clip_threshold, one[1].trust_update.clip_threshold],
    )
    assert_close(clip_metrics(many), clip_metrics(one))


def a_step_inside_shard_map_trains_as_one_device():
    tx = optax.chain(
        clip_by_quantile(0.5, history_length=4, scope="global"), optax.sgd(0.1)
    )
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size=(16, 4)), jnp.float32) for _ in range(2))

    def loss(params, x, y):
        return jnp.mean(jnp.square(x @ params - y))

    def step(params, state, x, y, axes=()):
        updates, state = tx.update(
            jax.lax.pmean(jax.grad(loss)(params, x, y), axes)
            if axes
            else jax.grad(loss)(params, x, y),
            state,
        )
        return optax.apply_updates(params, updates), state

    pieces = P(AXES)
    many = mapped(
        lambda *a: step(*a, axes=("data", "model")),
        (P(), P(), pieces, pieces),
        (P(), P()),
        check=False,
    )
    step_alone = jax.jit(step)
    one_params = many_params = jnp.ones((4, 4))
    one = other = tx.init(one_params)
    for _ in range(5):
        one_params, one = step_alone(one_params, one, x, y)
        many_params, other = many(many_params, other, x, y)
        np.testing.assert_allclose(many_params, one_params, rtol=1e-5)


def the_mean_loss_over_the_mapped_axes_decides():
    """Each device has a loss from 0 to 7: the mean exceeds a threshold of 3 only."""
    for threshold, is_skipped in ((3.0, True), (4.0, False)):
        tx = skip_steps(
            optax.sgd(1.0), Fixed(9.0), loss_policy=Fixed(threshold), axis_name=AXES
        )
        state = tx.init(jnp.ones(4))

        def step(gradient, loss, tx=tx, state=state):
            updates, after = tx.update(gradient, state, value=loss[0])
            return updates, after.skip_loss.skip_loss_value

        many = mapped(step, (P(), P(AXES)), (P(), P()), check=TYPED)
        updates, loss = many(jnp.ones(4), jnp.arange(8, dtype=jnp.float32))
        assert loss.tolist() == [3.5]
        assert updates.tolist() == [0.0 if is_skipped else -1.0] * 4


def an_average_after_the_clip_is_a_warning():
    """mindcv#603: each device clips its own gradient, or skips by its own loss."""
    clip, loss = Fixed(2.0), Fixed(3.0)
    tx = optax.chain(
        skip_steps(clip_by_policy(clip), Fixed(9.0), loss_policy=loss), optax.sgd(1.0)
    )
    params, state = jnp.zeros(1), tx.init(jnp.zeros(1))
    numbers = jnp.arange(8, dtype=jnp.float32)

    def step(gradient, loss, averaged):
        gradient, loss = (
            jax.lax.pmean(x, AXES) if name in averaged else x
            for name, x in (("gradient", gradient), ("loss", loss[0]))
        )
        updates, after = tx.update(gradient, state, params, value=loss)
        return jax.lax.pmean(updates, AXES), after

    for averaged in [("loss",), ("gradient",), ("gradient", "loss")]:
        how = (P(AXES), P(AXES)), (P(), P()), False
        update = mapped(partial(step, averaged=averaged), *how)
        states = [update(size * numbers, size * numbers)[1] for size in (1, 2)]
        for read in (clip_metrics, check_state, check_skips):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("default")  # once per place and text
                for after in states:
                    read(after)
            assert len(caught) == (len(averaged) < 2)
            for warning in caught:
                assert "average both before the clip" in str(warning.message)
                assert warning.filename == __file__


def a_state_of_pmap_is_refused_with_the_way_out():
    tx = clip_by_policy(Fixed(2.0))
    update = jax.pmap(tx.update, axis_name="x", in_axes=(0, None))
    for numbers, words in (
        (np.ones(8), "pass one replica: jax.tree.map(lambda x: x[0], opt_state)"),
        (np.arange(8), "for one of pmap, the replicas decide on different gradients"),
    ):
        _, state = update(np.float32(numbers), tx.init(jnp.zeros(())))
        with pytest.raises(ValueError, match=re.escape(words)):
            clip_metrics(state)


def the_loop_of_the_page_averages_the_gradient_of_the_devices():
    """At first w is 0, so each of the three gradients is the mean of -2 x y."""
    page = (ROOT / "docs" / "jax.md").read_text("utf-8")
    [code] = re.findall(r"```python\n(from jax.sharding.*?)```", page, re.DOTALL)
    data = {"x": jnp.ones((8, 3)), "y": jnp.ones(8)}
    names = globals() | {"ClipLog": ClipLog} | data
    exec(code, names)
    np.testing.assert_allclose(names["log"].norms[0], 2 * 3**0.5, rtol=1e-5)


NEED_TYPES = ["each_leaf_is_reduced_over_the_axes_it_is_sharded_along"]
NEED_TYPES += ["squares_that_overflow_are_summed_again_over_all_devices"]
NEED_TYPES += ["parameters_are_measured_over_the_axes_they_are_sharded_along"]
NEED_TYPES += ["a_mesh_of_explicit_axes_gives_the_same_updates"]
NEED_TYPES += ["the_loop_of_the_page_averages_the_gradient_of_the_devices"]
CHECKS = [
    without_types_every_leaf_counts_as_sharded_along_all_named_axes,
    pmap_sums_over_the_devices,
    sharded_arrays_under_jit_need_no_axis_name,
    unit_norms_of_sharded_weights_under_jit_are_those_of_one_device,
    a_step_inside_shard_map_trains_as_one_device,
    the_mean_loss_over_the_mapped_axes_decides,
    an_average_after_the_clip_is_a_warning,
    a_state_of_pmap_is_refused_with_the_way_out,
]


def test_eight_devices_agree_with_one():
    names = [check.__name__ for check in CHECKS] + (NEED_TYPES if TYPED else [])
    code = f"""
import runpy, jax
assert jax.device_count() == 8
checks = runpy.run_path({__file__!r})
for name in {names!r}:
    checks[name]()
    print(name)
"""
    # Less optimization takes a third off the time. Only the sums of the devices matter.
    flags = os.environ.get("XLA_FLAGS", "")
    flags += " --xla_force_host_platform_device_count=8"
    flags += " --xla_backend_optimization_level=0"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == names, done.stderr


def test_units_split_over_a_mapped_axis_are_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"axis_name must be left out.*jit the step"):
        clip_by_param_ratio(axis_name="data")
    with pytest.raises(ValueError, match=r"axis_name must be left out.*jit the step"):
        skip_steps(optax.sgd(0.1), Fixed(1.0), scope="unit", axis_name="data")
