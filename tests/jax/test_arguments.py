"""The arguments of the factories: their signature, and errors for unknown keywords."""

import importlib
import inspect
import sys

import jax
import jax.numpy as jnp
import optax
import pytest

from autoclip_core import Cap, Fixed, Floor, Quantile, Warmup
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


@every_factory
def test_an_unknown_keyword_names_the_factory(factory):
    with pytest.raises(TypeError, match=rf"{factory.__name__}\(\).*'percentile'"):
        factory(**FACTORIES[factory], percentile=90)


QUANTILE_WRAPS = {
    "max_threshold": "Cap(Quantile(0.9), max_norm=1.0)",
    "min_threshold": "Floor(Quantile(0.9), min_norm=1.0)",
    "warmup_steps": "Warmup(Quantile(0.9), steps=1.0)",
    "warmup_threshold": "Warmup(Quantile(0.9), threshold=1.0)",
}
POLICY_CALLS = {
    clip_by_policy: "clip_by_policy(Cap(policy, max_norm=1.0))",
    clip_by_mean_std: "clip_by_policy(Cap(MeanStd(1.0), max_norm=1.0))",
    clip_by_zscore: "clip_by_policy(Cap(ZScore(2.0), max_norm=1.0), scope='global')",
    clip_by_ema_ratio: "clip_by_policy(Cap(EmaRatio(2.0), max_norm=1.0))",
    clip_by_param_ratio: "clip_by_policy(Cap(ParamRatio(0.5), max_norm=1.0), "
    "scope='unit')",
    skip_steps: "skip_steps(inner, Cap(policy, max_norm=1.0))",
}


@pytest.mark.parametrize("keyword", QUANTILE_WRAPS)
def test_a_keyword_of_a_combinator_names_the_combinator(keyword):
    with pytest.raises(TypeError) as error:
        clip_by_quantile(0.9, **{keyword: 1.0})
    assert str(error.value) == (
        f"clip_by_quantile() has no argument {keyword!r}; wrap the policy: "
        f"clip_by_policy({QUANTILE_WRAPS[keyword]})"
    )


@pytest.mark.parametrize("factory", POLICY_CALLS, ids=lambda factory: factory.__name__)
def test_every_factory_names_the_combinator(factory):
    with pytest.raises(TypeError) as error:
        factory(**FACTORIES[factory], max_threshold=1.0)
    assert str(error.value).endswith(f"wrap the policy: {POLICY_CALLS[factory]}")


def test_the_suggested_call_keeps_the_other_keywords():
    with pytest.raises(TypeError) as error:
        clip_by_quantile(0.5, scope="global", nonfinite="propagate", max_threshold=1.0)
    assert str(error.value).endswith(
        "clip_by_policy(Cap(Quantile(0.5), max_norm=1.0), scope='global', "
        "nonfinite='propagate')"
    )
    with pytest.raises(TypeError) as error:
        clip_by_param_ratio(labels=jnp.shape, max_threshold=1.0)
    assert str(error.value).endswith(
        "clip_by_policy(Cap(ParamRatio(), max_norm=1.0), labels=labels)"
    )
    with pytest.raises(TypeError) as error:
        skip_steps(SGD, FIXED, max_consecutive=3, rule="layer", max_threshold=1.0)
    assert str(error.value).endswith(
        "skip_steps(inner, Cap(policy, max_norm=1.0), max_consecutive=3, rule='layer')"
    )


def test_several_combinators_are_suggested_in_the_order_of_the_torch_clippers():
    with pytest.raises(TypeError) as error:
        clip_by_quantile(
            0.9,
            history_length=8,
            max_threshold=3.0,
            min_threshold=1.0,
            warmup_threshold=2.0,
            warmup_steps=5,
        )
    code = str(error.value).partition("clip_by_policy(")[2].removesuffix(")")
    policy = eval(code, {c.__name__: c for c in (Cap, Floor, Warmup, Quantile)})
    warm = Warmup(Quantile(0.9, history_length=8), steps=5, threshold=2.0)
    assert policy == Cap(Floor(warm, min_norm=1.0), max_norm=3.0)


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


def test_warmup_steps_of_a_policy_is_no_combinator_keyword():
    with pytest.raises(TypeError) as error:
        clip_by_zscore(warmup_steps=5, warmup_threshold=1.0)
    code = "Warmup(ZScore(warmup_steps=5), threshold=1.0), scope='global'"
    assert str(error.value).endswith(f"clip_by_policy({code})")


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
