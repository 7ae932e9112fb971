"""A clipper at the wrong place: before an accumulator, or behind another clip."""

import re
import warnings

import jax
import jax.numpy as jnp
import optax
import pytest

from autoclip_core import ClipLog, Fixed
from autoclip_core.clipper.metrics_checks import find_repeated_limit
from autoclip_jax import (
    check_state,
    clip_by_param_ratio,
    clip_by_policy,
    clip_by_quantile,
    clip_metrics,
    skip_steps,
    trust_clip,
)

CLIP, ADAM = clip_by_quantile(0.9, scope="global"), optax.adam(1e-3)
PARAMS = {"a": jnp.ones((2, 3)), "b": jnp.ones(3)}
ONLY_A, ONLY_B = {"a": True, "b": False}, {"a": False, "b": True}
MICRO = "unless k is 1 it clips each micro-batch and not their mean"


def steps(inner, k=4, **keywords):
    return optax.MultiSteps(inner, k, **keywords).gradient_transformation()


def injected(learning_rate):
    return optax.chain(CLIP, steps(optax.sgd(learning_rate)))


OUTSIDE = {
    "chain": optax.chain(CLIP, steps(ADAM)),
    "skip_not_finite": optax.chain(
        CLIP, steps(ADAM, should_skip_update_fn=optax.skip_not_finite)
    ),
    "named_chain": optax.named_chain(("z", CLIP), ("a", steps(ADAM))),
    "chain in a chain": optax.chain(
        optax.chain(optax.zero_nans(), CLIP), optax.chain(steps(ADAM))
    ),
    "a filter between": optax.chain(CLIP, optax.zero_nans(), steps(ADAM)),
    "masked": optax.chain(optax.masked(CLIP, True), optax.masked(steps(ADAM), True)),
    "one mask": optax.masked(optax.chain(CLIP, steps(ADAM)), ONLY_A),
    "the accumulator masked": optax.chain(CLIP, optax.masked(steps(ADAM), ONLY_A)),
    "the clipper masked": optax.chain(optax.masked(CLIP, ONLY_A), steps(ADAM)),
    "one of two clippers masked": optax.chain(
        optax.masked(CLIP, ONLY_B), CLIP, optax.masked(steps(ADAM), ONLY_A)
    ),
    "partition": optax.chain(
        CLIP,
        optax.partition({0: steps(ADAM), 1: optax.sgd(0.1)}, {"a": 0, "b": 1}),
    ),
    "AGC": optax.chain(clip_by_param_ratio(0.01), steps(ADAM)),
    "trust_clip": trust_clip(steps(ADAM)),
    "inject_hyperparams": optax.inject_hyperparams(injected)(learning_rate=0.1),
    "apply_if_finite": optax.apply_if_finite(optax.chain(CLIP, steps(ADAM)), 2),
    "skip_steps": skip_steps(optax.chain(CLIP, steps(ADAM)), Fixed(9.0)),
    "ema of the weights": optax.chain(CLIP, steps(ADAM), optax.ema(0.9)),
    "apply_every": optax.chain(CLIP, optax.sgd(0.1), optax.apply_every(3)),
    "apply_every, Adam": optax.chain(CLIP, ADAM, optax.apply_every(3)),
    "apply_every in a chain": optax.chain(
        CLIP, optax.chain(ADAM, optax.apply_every(3))
    ),
    "apply_every, trust_clip": trust_clip(optax.chain(ADAM, optax.apply_every(3))),
    "apply_every, named_chain": optax.named_chain(
        ("z", CLIP), ("y", ADAM), ("x", optax.apply_every(3))
    ),
    "MultiSteps twice": steps(optax.chain(CLIP, steps(ADAM))),
}
PARTS = {0: optax.chain(CLIP, ADAM), 1: steps(optax.sgd(0.1))}
INSIDE = {
    "MultiSteps": steps(optax.chain(CLIP, ADAM)),
    "trust_clip": steps(trust_clip(ADAM)),
    "behind": optax.chain(steps(ADAM), CLIP),
    "behind, in a chain": optax.chain(optax.chain(steps(ADAM)), CLIP, optax.sgd(0.1)),
    "both, on purpose": optax.chain(CLIP, steps(optax.chain(CLIP, ADAM))),
    "a micro-batch is left out": skip_steps(steps(ADAM), Fixed(9.0)),
    "partition": optax.partition(PARTS, {"a": 0, "b": 1}),
    "other leaves": optax.chain(
        optax.masked(optax.chain(CLIP, optax.sgd(0.1)), ONLY_A),
        optax.masked(steps(ADAM), ONLY_B),
    ),
    "other leaves, clipped alone": optax.chain(
        *(optax.masked(CLIP, ONLY_A), optax.masked(optax.sgd(0.1), ONLY_A)),
        optax.masked(steps(ADAM), ONLY_B),
    ),
    "other leaves, partition": optax.chain(
        optax.partition({0: CLIP, 1: optax.identity()}, {"a": 0, "b": 1}),
        optax.masked(optax.apply_every(3), ONLY_B),
    ),
    "behind apply_every": optax.chain(optax.apply_every(3), CLIP, ADAM),
    "both, apply_every": optax.chain(CLIP, ADAM, optax.apply_every(3), CLIP),
    "no MultiSteps": optax.chain(CLIP, ADAM),
    "inject_hyperparams": optax.inject_hyperparams(
        lambda learning_rate: steps(optax.chain(CLIP, optax.sgd(learning_rate)))
    )(learning_rate=0.1),
    "lookahead, sam": optax.chain(
        CLIP,
        optax.lookahead(optax.sgd(0.1), 5, 0.5),
        optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.1)),
    ),
    "apply_if_finite": optax.apply_if_finite(steps(optax.chain(CLIP, ADAM)), 2),
}
"""A warning is an error in these tests."""


def init(tx, name):
    params = PARAMS
    if "lookahead" in name:
        params = optax.LookaheadParams(PARAMS, PARAMS)
    return tx.init(params)


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_clipper_before_an_accumulator_is_a_warning(name):
    """praxis#6, gpt-jax#2."""
    state = init(OUTSIDE[name], name)
    with pytest.warns(RuntimeWarning, match=MICRO):
        jax.eval_shape(clip_metrics, state)
    with pytest.warns(RuntimeWarning, match=MICRO):
        check_state(state)


@pytest.mark.parametrize("name", INSIDE)
def test_a_clipper_of_the_mean_is_no_warning(name):
    state = init(INSIDE[name], name)
    jax.eval_shape(clip_metrics, state)
    check_state(state)


def test_the_states_of_two_optimizers_are_no_chain():
    states = optax.chain(CLIP, ADAM).init(PARAMS), steps(ADAM).init(PARAMS)
    jax.eval_shape(clip_metrics, states)
    summed = optax.chain(ADAM, optax.apply_every(3)).init(PARAMS)
    jax.eval_shape(clip_metrics, (states[0], summed))


def take_step(tx, state, grads):
    _, state = tx.update(grads, state, PARAMS)
    return state, clip_metrics(state)


def test_a_compiled_loop_is_warned_once_and_shows_why():
    """The clipper of four micro-batches has taken four steps for one update."""
    tx = OUTSIDE["chain"]
    state, step = tx.init(PARAMS), jax.jit(take_step, static_argnums=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(4):
            state, metrics = step(tx, state, PARAMS)
            clip_metrics(state)
            clip_metrics(state)
    assert int(metrics["clip/steps"]) == 4 * int(state[1].gradient_step)
    assert [warning.filename for warning in caught] == [__file__] * 3  # two in the loop
    assert len({warning.lineno for warning in caught}) == 3


def test_the_ways_out_are_silent():
    """They are the words of the message."""
    with pytest.warns(RuntimeWarning) as caught:
        clip_metrics(OUTSIDE["chain"].init(PARAMS))
    text = str(caught[0].message)
    names = {"clip": CLIP, "optimizer": ADAM, "trust_clip": trust_clip, "k": 4}
    made = re.findall(r"optax\.MultiSteps\(\w\S*\(.*?\), k\)", text)
    assert len(made) == 2
    for code in made:
        clip_metrics(eval(code, names | {"optax": optax}).init(PARAMS))
    clip_state = CLIP.init(PARAMS)
    names |= {"grads": PARAMS, "clip_state": clip_state, "params": PARAMS}
    exec(text.partition("out of the chain: ")[2], names)
    assert int(clip_metrics(names["clip_state"])["clip/steps"]) == 1


def test_an_nnx_optimizer_is_warned_of_too():
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    outside = nnx.Optimizer(model, OUTSIDE["chain"], wrt=nnx.Param)
    with pytest.warns(RuntimeWarning, match=MICRO):
        check_state(outside)
    with pytest.warns(RuntimeWarning, match=MICRO):
        clip_metrics(outside.opt_state)
    check_state(nnx.Optimizer(model, INSIDE["MultiSteps"], wrt=nnx.Param))


OURS = clip_by_policy(Fixed(0.25), scope="global")
THEIRS = optax.clip_by_global_norm(0.25)


def log_of(tx, clipper=None):
    """Return the log of 40 steps; a limit of 0.25 acts in half of them."""

    def step(state, key):
        grads = jax.tree.map(lambda p: jax.random.normal(key, p.shape), PARAMS)
        scale = jax.random.uniform(key, minval=0.02, maxval=0.2)
        return take_step(tx, state, jax.tree.map(lambda g: g * scale, grads))

    keys = jax.random.split(jax.random.key(0), 40)
    metrics = jax.device_get(jax.lax.scan(step, tx.init(PARAMS), keys)[1])
    log = ClipLog(clipper=clipper)
    for index in range(len(keys)):
        log.record({name: values[index] for name, values in metrics.items()})
    return log


def has_light(log):
    lights = [text for text in log.summary().advice if "Red light" in text]
    assert all("0.25 again and again" in light for light in lights)
    return bool(lights)


@pytest.mark.parametrize("first", [THEIRS, optax.identity()], ids=["optax", "none"])
@pytest.mark.parametrize("scope", ["global", "parameter"])
def test_another_clip_in_front_is_a_red_light(first, scope):
    tx = optax.chain(first, clip_by_quantile(0.9, scope=scope), ADAM)
    assert has_light(log_of(tx)) == (first is THEIRS)


BEHIND = {
    "chain": optax.chain(OURS, CLIP, ADAM),
    "chain in a chain": optax.chain(optax.chain(OURS, optax.zero_nans()), CLIP, ADAM),
    "named_chain": optax.named_chain(("z", OURS), ("y", CLIP), ("a", ADAM)),
    "masked": optax.chain(optax.masked(OURS, True), optax.masked(CLIP, True), ADAM),
    "each parameter": optax.chain(OURS, clip_by_quantile(0.9), ADAM),
    "skip_steps": optax.chain(OURS, skip_steps(ADAM, Fixed(9.0))),
    "skip_steps, inside": skip_steps(optax.chain(OURS, CLIP, ADAM), Fixed(9.0)),
    "trust_clip": optax.chain(OURS, trust_clip(ADAM)),
}


@pytest.mark.parametrize("name", BEHIND)
def test_a_clipper_behind_another_of_ours_has_no_red_light(name, tmp_path):
    log = log_of(BEHIND[name], clipper=2 if name == "skip_steps, inside" else 1)
    assert find_repeated_limit(log.norms.tolist()) == 0.25
    assert not has_light(log)
    log.to_jsonl(tmp_path / "run.jsonl")
    assert not has_light(ClipLog.from_jsonl(tmp_path / "run.jsonl"))


def test_the_first_of_two_of_ours_shows_another_clip_before_both():
    tx = optax.chain(THEIRS, OURS, CLIP, ADAM)
    assert [has_light(log_of(tx, clipper=index)) for index in (0, 1)] == [True, False]


LABELS = {0: optax.chain(OURS, ADAM), 1: optax.chain(CLIP, ADAM)}
BESIDE = {
    "other labels": optax.partition(LABELS, {"a": 1, "b": 0}),
    "an update": optax.chain(CLIP, ADAM, OURS),
    "skip_steps": skip_steps(optax.chain(CLIP, ADAM), Fixed(9.0)),
    "trust_clip": trust_clip(ADAM),
}


@pytest.mark.parametrize("name", BESIDE)
def test_a_clipper_that_does_not_clip_the_same_gradients_before_is_not_counted(name):
    metrics = jax.eval_shape(clip_metrics, BESIDE[name].init(PARAMS))
    assert not any("other_clippers" in key for key in metrics)
