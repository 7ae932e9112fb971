"""The tables of the tests: policies, norms and frameworks.

To test another way to run a policy, such as a new adapter, use the policies of this
file and pass a function to `check_traces` of `traces.py`.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import autoclip_core
from autoclip_core import Decision, decide


def policy_of(code):
    """Return the policy of an expression in the names of `autoclip_core`."""
    return eval(code, dict(vars(autoclip_core)))


def table_of(*codes):
    """Return a dict from expression to policy; the expression names the case."""
    return {code: policy_of(code) for code in codes}


ZSCORES = [
    f"ZScore(2.0, alpha=0.9, warmup_steps=5, target={target!r}, record={record!r})"
    for target, records in {
        "reciprocal": ("winsorized", "applied", "raw", "none"),
        "mean": ("winsorized", "applied"),
        "threshold": ("winsorized", "raw"),
    }.items()
    for record in records
]

# Windows and warm-ups are short, so that a short series fills and leaves them.
STATIC = table_of(
    "Fixed(1.0)",
    "Scheduled([(0, 3.0), (12, 0.5), (13, 2.0), (50, 0.9)])",
    "Quantile(0.9)",
    "Quantile(0.9, history_length=20)",
    "Quantile(0.5, history_length=7)",
    "Quantile(0.0, history_length=5)",
    "Quantile(1.0, history_length=5)",
    "Quantile(0.3, history_length=1)",
    "Quantile(0.8, history_length=10, include_current=True)",
    "MeanStd(2.0, history_length=20)",
    "MeanStd(1.0, history_length=7, ddof=0)",
    "MeanStd(0.5, history_length=12, ddof=3, include_current=True)",
    "MeanStd(2.0, history_length=12, log=True)",
    *ZSCORES,
    "ZScore(warmup_steps=0)",
    "ZScore(2.0, alpha=0.9, warmup_steps=5, log=True)",
    "ZScore(2.0, alpha=0.9, warmup_steps=0, target='mean', record='raw', log=True)",
    "EmaRatio(2.0, beta=0.9, warmup_steps=0)",
    "EmaRatio(1.05, warmup_steps=6, warmup_threshold=2.0)",
    "StreamingQuantile(0.9)",
    "StreamingQuantile(0.5, rate=0.2)",
    "ParamRatio(0.1)",
    "Warmup(Quantile(0.9, history_length=20), steps=6, threshold=1.0)",
    "Warmup(MeanStd(1.0, history_length=7), steps=0)",
    "Cap(Quantile(0.9, history_length=20), max_norm=1.5)",
    "Cap(ParamRatio(0.1), max_norm=0.3)",
    "Floor(ZScore(2.0, warmup_steps=5, target='mean'), min_norm=1.0)",
    "Drop(EmaRatio(2.0, warmup_steps=5), action='zero')",
    "Drop(StreamingQuantile(0.9), action='skip')",
    "Cap(Floor(Drop(Quantile(0.9, history_length=20), action='zero'), min_norm=0.5),"
    " max_norm=2.0)",
    "Cap(Drop(MeanStd(2.0, history_length=20), action='skip'), max_norm=1.0)",
    "Drop(Quantile(0.95, history_length=20), action='zero', clip=Fixed(1.0))",
    "Drop(MeanStd(2.0, history_length=12), action='skip',"
    " clip=ZScore(1.0, warmup_steps=5))",
    "Warmup(Drop(EmaRatio(2.0, beta=0.9, warmup_steps=0), action='zero',"
    " clip=ParamRatio(0.1)), steps=6, threshold=1.0)",
)
"""Policies that run in every framework."""

POLICIES = STATIC | table_of(
    "Quantile(0.1, history_length=None, include_current=True)",
    "MeanStd(2.0, history_length=None)",
    "Warmup(Quantile(0.9, history_length=None), steps=6, threshold=1.0)",
)
"""All policies, also those that keep every norm and therefore need NumPy."""


def each(policies):
    """Run a test once for each policy of a table."""
    return pytest.mark.parametrize("policy", policies.values(), ids=list(policies))


every_policy = each(POLICIES)

KINDS = {
    (type(policy), type(policy.init(1))): code for code, policy in POLICIES.items()
}
every_kind = each({code: POLICIES[code] for code in KINDS.values()})
"""Run a test once for each class of policy and class of state."""

# A property that is tested for each policy needs fewer examples of each.
fewer_examples = settings(max_examples=settings.default.max_examples // 10)


NFNETS = {
    (): (),
    (1,): (0,),
    (7,): (0,),
    (5, 1): (0, 1),
    (1, 5): (0, 1),
    (1, 1): (0, 1),
    (1, 1, 5): (0, 1, 2),
    (1, 3, 1): (0, 1, 2),
    (1, 1, 1, 8): (0, 1, 2, 3),
    (1, 1, 1, 1, 6): (0, 1, 2, 3, 4),
    (1, 1, 1, 1, 1, 6): (0, 1, 2, 3, 4, 5),
    (4, 3): (0,),
    (2, 3, 4): (0,),
    (1, 3, 4): (0,),
    (2, 3, 1): (0,),
    (3, 3, 2, 4): (0, 1, 2),
    (3, 3, 1, 4): (0, 1, 2),
    (1, 1, 2, 4): (0, 1, 2),
    (3, 3, 2, 1): (0, 1, 2),
    (2, 3, 3, 2, 4): (0, 1, 2, 3),
    (1, 3, 1, 2, 1): (0, 1, 2, 3),
}
"""A parameter's shape and the axes of its norms, by the rule of the NFNets.

A parameter with at most one axis longer than 1 is a vector: it has a single norm.
"""


class Series(NamedTuple):
    """The inputs of a run, each of shape (steps, rows)."""

    norms: np.ndarray
    observed: np.ndarray
    param_norms: np.ndarray


def series_of(norms, observed=None, param_norms=None):
    """Return a series with these norms, all rows observed, parameters of norm 10."""
    norms = np.asarray(norms, np.float32)
    norms = norms.reshape(len(norms), -1)
    if observed is None:
        observed = np.ones(norms.shape, bool)
    if param_norms is None:
        param_norms = np.full(norms.shape, 10.0, np.float32)
    return Series(norms, observed, param_norms)


def any_series(rows=2, most=16, norms=None):
    """Draw a series with ties, zeros, NaN, infinity and unobserved rows."""
    if norms is None:
        special = [0.0, 1.0, float("nan"), float("inf"), 1e-40, 1.2e-38, 1e-20, 1e30]
        norms = positive() | st.sampled_from(np.float32(special).tolist())
    shape = st.tuples(st.integers(1, most), st.just(rows))
    return shape.flatmap(
        lambda shape: st.builds(
            Series,
            arrays(np.float32, shape, elements=norms),
            arrays(bool, shape, elements=st.sampled_from([True, True, True, False])),
            arrays(np.float32, shape, elements=positive() | st.just(0.0)),
        )
    )


def positive(least=1e-3, most=1e3):
    """Draw an ordinary norm, exact in float32."""
    least, most = float(np.float32(least)), float(np.float32(most))
    return st.floats(least, most, width=32)


def log_normal(rng, shape, log_std=0.3):
    """Return norms of mean 1, as in a healthy run (log_std 0.1 to 0.5; 1 is heavy)."""
    return np.exp(log_std * rng.standard_normal(shape) - log_std**2 / 2)


def parity_series():
    """Return a series whose rows cover every kind of norm, to compare frameworks."""
    rng, steps = np.random.default_rng(0), 80
    rows = {
        name: log_normal(rng, steps, 1.0 if name == "heavy" else 0.3)
        for name in (
            "steady heavy spikes not_finite idle unobserved tiny shift late huge small"
        ).split()
    }
    rows["spikes"][rng.random(steps) < 0.1] *= 50
    rows["not_finite"][[0, 1, 40, 42]] = np.inf
    rows["not_finite"][[17, 41, steps - 1]] = np.nan
    rows["idle"][:3] = rows["idle"][20:40] = 0
    rows["tiny"][[0, 5, 30]] = 1e-45, 1e-39, 1.1e-38
    rows["shift"][steps // 2 :] *= 10
    rows["late"][:30] = 0
    rows["huge"] *= 3e30
    rows["small"] *= 3e-30
    norms = np.stack(list(rows.values()), axis=1)
    observed = rng.random(norms.shape) > 0.3
    names = list(rows)
    observed[:, [names.index(n) for n in names if n != "unobserved"]] = True
    param_norms = 10 * log_normal(rng, norms.shape)
    param_norms[:, names.index("idle")] = 0
    return Series(norms.astype(np.float32), observed, param_norms.astype(np.float32))


def cut(series, steps):
    """Return the first steps of a series."""
    return Series(*(field[:steps] for field in series))


class Framework(NamedTuple):
    """A framework: its namespace, its arrays, and its compiler."""

    xp: object
    array: Callable
    compiled: Callable


def changed(field, place, value):
    """Return a function that puts a value into an array of a state."""

    def breaking(state):
        array = getattr(state, field).copy()
        array[place] = value
        return state._replace(**{field: array})

    return breaking


@cache
def in_numpy():
    return Framework(np, np.asarray, lambda step: step)


@cache
def in_torch():
    import torch

    from autoclip_torch.state.namespace import TorchNamespace

    return Framework(
        TorchNamespace(torch.device("cpu")), torch.tensor, lambda step: step
    )


@cache
def in_jax(jit=True):
    import jax

    return Framework(
        jax.numpy, jax.numpy.asarray, jax.jit if jit else lambda step: step
    )


@cache
def in_tf(xla=True):
    import tensorflow as tf

    from autoclip_tf.gradients import namespace

    # Without AutoGraph, which would convert the core's functions for seconds.
    compiled = partial(tf.function, jit_compile=xla, autograph=False)
    return Framework(namespace, tf.convert_to_tensor, compiled)


FRAMEWORKS = {
    "torch": (in_torch, "torch"),
    "jax-jit": (in_jax, "jax"),
    "tf-xla": (in_tf, "tf"),
}
UNCOMPILED = {
    "jax-eager": (partial(in_jax, jit=False), "jax"),
    "tf-graph": (partial(in_tf, xla=False), "tf"),
}


def frameworks(table):
    """Run a test once per framework; the test calls its argument to get it.

    NumPy needs no mark. `mutants.py` leaves out what has one.
    """
    return pytest.mark.parametrize(
        "framework",
        [
            pytest.param(
                framework,
                marks=() if needed == "core" else pytest.mark.needs(needed),
                id=name,
            )
            for name, (framework, needed) in table.items()
        ],
    )


def run(policy, series, framework=in_numpy, **settings):
    """Return the last state and a `Decision` of arrays of shape (steps, rows)."""
    return run_all([policy], series, framework, **settings)[0]


def run_all(policies, series, framework=in_numpy, **settings):
    """Do as `run` for several policies in one compilation."""
    xp, array, compiled = framework()

    def step(states, norms, observed, param_norms):
        given = {"observed": observed, "param_norms": param_norms, **settings}
        return [
            decide(policy, state, norms, **given, xp=xp)
            for policy, state in zip(policies, states, strict=True)
        ]

    step = compiled(step)
    states = [policy.init(series.norms.shape[1], xp) for policy in policies]
    decisions = [[] for _ in policies]
    for inputs in zip(*series, strict=True):
        taken = step(states, *map(array, inputs))
        states = [state for state, _ in taken]
        for so_far, (_, decision) in zip(decisions, taken, strict=True):
            so_far.append([np.asarray(field) for field in decision])
    stacked = (map(np.stack, zip(*steps, strict=True)) for steps in decisions)
    return list(zip(states, (Decision(*fields) for fields in stacked), strict=True))


def leaves(state):
    """Return the arrays of a state, in order."""
    if isinstance(state, tuple):
        return [leaf for part in state for leaf in leaves(part)]
    return [state]


def assert_same(actual, expected):
    """Assert that two states, decisions or arrays are equal; NaN equals NaN."""
    pairs = zip(leaves(actual), leaves(expected), strict=True)
    for one, other in pairs:
        one, other = np.asarray(one), np.asarray(other)
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def linear_quantile(values, q):
    """Return the linear quantile of float32 numbers, as NumPy 2.4 rounds it.

    NumPy 2.0 to 2.3 computes the rank in float32 and differs by up to 44 units in the
    last place. `test_window.py` compares this function with the installed NumPy.
    """
    values = sorted(np.float32(value) for value in values)
    rank = (len(values) - 1) * q
    lower = int(rank)
    below, above = values[lower], values[min(lower + 1, len(values) - 1)]
    part = rank - lower
    if part < 0.5:
        return below + (above - below) * np.float32(part)
    return above - (above - below) * np.float32(1 - part)
