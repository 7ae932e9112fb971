"""The arguments of the factories: their signature, and errors for unknown keywords."""

import importlib
import inspect
import sys

import jax
import jax.numpy as jnp
import optax
import pytest

from autoclip_core import Fixed, Quantile
from autoclip_jax import (
    clip_by_ema_ratio,
    clip_by_mean_std,
    clip_by_param_ratio,
    clip_by_policy,
    clip_by_quantile,
    clip_by_zscore,
    skip_steps,
    trust_clip,
)

FIXED, SGD = Fixed(1.0), optax.sgd(1.0)
FACTORIES = {
    clip_by_policy: {"policy": FIXED},
    clip_by_quantile: {"quantile": 0.5, "history_length": 4},
    clip_by_mean_std: {"deviations": 1.0},
    clip_by_zscore: {"z": 2.0},
    clip_by_ema_ratio: {"ratio": 2.0},
    clip_by_param_ratio: {"clipping": 0.5},
    skip_steps: {"inner": SGD, "policy": FIXED},
    trust_clip: {"optimizer": SGD},
}
"""Each factory with valid arguments."""
every_factory = pytest.mark.parametrize(
    "factory", FACTORIES, ids=lambda factory: factory.__name__
)


@every_factory
def test_inject_hyperparams_reads_the_signature_of_a_factory(factory):
    """The numbers of a policy are static; the error for traced numbers lists them."""
    parameters = inspect.signature(factory).parameters
    numbers = [n for n, p in parameters.items() if type(p.default) in (int, float)]
    keywords = list(parameters.values())[-5:]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in keywords)
    grads = jnp.array([3.0, 4.0])
    tx = optax.inject_hyperparams(factory, static_args=numbers)(**FACTORIES[factory])
    updates, _ = jax.jit(tx.update)(grads, tx.init(grads), grads)
    assert updates.shape == (2,)
    if numbers:
        tx = optax.inject_hyperparams(factory)(**FACTORIES[factory])
        with pytest.raises(
            TypeError, match=r"must be a number.* static_args: "
        ) as error:
            tx.init(grads)
        assert str(error.value).endswith(f"static_args: {numbers}")


def test_the_static_arguments_of_the_error_are_those_of_the_call():
    """The caller's function has no `history_length`; optax would refuse the name."""

    def chain(learning_rate, quantile):
        return optax.chain(clip_by_quantile(quantile), optax.sgd(learning_rate))

    params = jnp.ones(2)
    tx = optax.inject_hyperparams(chain)(learning_rate=0.1, quantile=0.9)
    with pytest.raises(TypeError, match=r"quantile must be a number") as error:
        tx.init(params)
    assert str(error.value).endswith("static_args: ['quantile']")
    tx = optax.inject_hyperparams(chain, static_args=["quantile"])(0.1, 0.9)
    assert tx.init(params).hyperparams.keys() == {"learning_rate"}


@pytest.mark.parametrize("trace", [jax.jit, jax.vmap, optax.inject_hyperparams])
@pytest.mark.parametrize(
    "make", [Fixed, lambda number: Quantile(0.9, history_length=number)]
)
def test_a_traced_setting_of_a_policy_is_refused_with_the_way_out(make, trace):
    """JAX makes an array of each number."""

    def clip(number):
        return clip_by_policy(make(number))

    with pytest.raises(TypeError, match=r"setting is a Python number.* use Scheduled"):
        trace(clip)(jnp.ones(1)).init(jnp.zeros(1))


@every_factory
def test_an_unknown_keyword_names_the_factory(factory):
    with pytest.raises(TypeError, match=rf"{factory.__name__}\(\).*'percentile'"):
        factory(**FACTORIES[factory], percentile=90)


COMBINATORS = {
    "max_threshold": "Cap(policy, max_norm=...)",
    "min_threshold": "Floor(policy, min_norm=...)",
    "warmup_steps": "Warmup(policy, steps=..., threshold=...)",
    "warmup_threshold": "Warmup(policy, steps=..., threshold=...)",
}
CALLS = {
    clip_by_policy: "clip_by_policy({})",
    clip_by_quantile: "clip_by_policy({})",
    clip_by_mean_std: "clip_by_policy({})",
    clip_by_zscore: "clip_by_policy({}, scope='global')",
    clip_by_ema_ratio: "clip_by_policy({})",
    clip_by_param_ratio: "clip_by_policy({}, scope='unit')",
    skip_steps: "skip_steps(inner, {})",
}
"""The call that makes the same transformation from any policy, at the same scope."""


@pytest.mark.parametrize(
    ("factory", "keyword"),
    [
        (factory, keyword)
        for factory in CALLS
        for keyword in COMBINATORS
        if keyword not in inspect.signature(factory).parameters  # of a policy
    ],
)
def test_a_keyword_of_a_combinator_names_the_combinator(factory, keyword):
    with pytest.raises(TypeError) as error:
        factory(**FACTORIES[factory], **{keyword: 1.0})
    assert str(error.value) == (
        f"{factory.__name__}() has no argument {keyword!r}; wrap the policy: "
        + CALLS[factory].format(COMBINATORS[keyword])
    )


@pytest.mark.parametrize(
    ("factory", "keyword", "way_out"),
    [
        (clip_by_quantile, "exclude", "optax.masked"),
        (clip_by_quantile, "dry_run", "apply the original grads"),
        (clip_by_quantile, "max_consecutive", "skip_steps(optimizer, policy"),
        (clip_by_quantile, "max_consecutive_skips", "skip_steps(optimizer, policy"),
        (clip_by_quantile, "process_group", "axis_name"),
        (skip_steps, "max_consecutive_skips", "use max_consecutive"),
        (skip_steps, "nonfinite", "skips every update"),
        (trust_clip, "max_consecutive_skips", "skip_steps(optimizer, policy"),
        (trust_clip, "max_threshold", "make the halves yourself: optax.chain("),
        (trust_clip, "norm", "make the halves yourself: optax.chain("),
        (trust_clip, "global_clipping", 'use scope="global"'),
    ],
)
def test_a_keyword_of_another_package_has_a_way_out(factory, keyword, way_out):
    with pytest.raises(TypeError) as error:
        factory(**FACTORIES[factory], **{keyword: 1})
    start = f"{factory.__name__}() has no argument {keyword!r}; "
    assert str(error.value).startswith(start)
    assert way_out in str(error.value)


@pytest.fixture
def not_imported(monkeypatch):
    """Remove the modules of autoclip_jax until the end of the test."""
    for name in list(sys.modules):
        if name.partition(".")[0] == "autoclip_jax":
            monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize("name", ["jax", "optax"])
def test_a_missing_framework_is_named_with_the_extra(name, not_imported, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError) as error:
        importlib.import_module("autoclip_jax")
    assert error.value.name == name
    assert str(error.value) == (
        f"autoclip_jax needs {name}; install it with: "
        'pip install "autoclip-toolkit[jax]"'
    )


def test_another_missing_module_is_reported_unchanged(not_imported, monkeypatch):
    monkeypatch.setitem(sys.modules, "autoclip_core.clipper.units", None)
    with pytest.raises(ModuleNotFoundError, match=r"import of autoclip_core\.clipper"):
        importlib.import_module("autoclip_jax")
