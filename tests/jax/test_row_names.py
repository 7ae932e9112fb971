"""The names of the rows, in the order of the state, in metrics and in a `ClipLog`."""

import math

import jax
import numpy as np
import optax
import pytest

from autoclip_core import ClipLog, Fixed
from autoclip_jax import clip_by_policy, clip_metrics, row_names, skip_steps, trust_clip

LAYERS = (1, 2, 10)
PARAMS = {
    f"layers_{i}": {"kernel": np.ones((2, 3)), "bias": np.ones(3)} for i in LAYERS
}
GRADIENTS = {
    f"layers_{i}": {
        "kernel": np.full((2, 3), i, np.float32),
        "bias": np.full(3, 0.1 * i, np.float32),
    }
    for i in LAYERS
}


def by_layer(tree):
    return {name: name for name in tree}


def without_layer_2(tree):
    return {name: name == "layers_2" for name in tree}


def of_leaves(*order):
    """Return the norms of the leaves by name, with the layers in this order."""
    norms = {}
    for i in order:
        norms[f"['layers_{i}']['bias']"] = 0.1 * i * math.sqrt(3)
        norms[f"['layers_{i}']['kernel']"] = i * math.sqrt(6)
    return norms


def of_units():
    norms = {}
    for i in (1, 10, 2):
        norms[f"['layers_{i}']['bias']"] = 0.1 * i * math.sqrt(3)
        for unit in range(3):
            norms[f"['layers_{i}']['kernel'][{unit}]"] = i * math.sqrt(2)
    return norms


def of_layers(**layers):
    """Return the norms of layers by label."""
    return {label: i * math.sqrt(6.03) for label, i in layers.items()}


CASES = {
    "parameter": ({"scope": "parameter"}, of_leaves(1, 10, 2)),
    "default": ({}, of_leaves(1, 10, 2)),
    "unit": ({"scope": "unit"}, of_units()),
    "global": ({"scope": "global"}, of_layers(**{"global": math.hypot(*LAYERS)})),
    "labels": ({"labels": by_layer}, of_layers(layers_1=1, layers_10=10, layers_2=2)),
    "numbers": (
        {"labels": {f"layers_{i}": i for i in LAYERS}},
        of_layers(**{"1": 1, "10": 10, "2": 2}),
    ),
    "equal texts": (
        {"labels": {"layers_1": 1, "layers_2": "1", "layers_10": 3}},
        of_layers(**{"'1'": 2, "1": 1, "3": 10}),
    ),
}
"""The arguments of a clipper, and the norms of its rows by name, in order."""


def test_names_are_in_the_order_of_the_state():
    """The norm of each row is that of the elements that its name describes."""
    clippers = {
        case: clip_by_policy(Fixed(2.0), **where) for case, (where, _) in CASES.items()
    }

    @jax.jit
    def update(gradients):
        return {
            case: tx.update(gradients, tx.init(PARAMS))[1].clip_norm
            for case, tx in clippers.items()
        }

    for case, norms in update(GRADIENTS).items():
        where, expected = CASES[case]
        assert row_names(PARAMS, **where) == list(expected)
        np.testing.assert_allclose(norms, list(expected.values()), rtol=1e-6)


def test_the_metrics_of_each_row_have_its_name():
    tx = clip_by_policy(Fixed(10.0), labels=by_layer)
    _, state = tx.update(GRADIENTS, tx.init(PARAMS))
    names = row_names(PARAMS, labels=by_layer)
    eager = clip_metrics(state, names)
    traced = jax.jit(lambda state: clip_metrics(state, names))(state)
    for metrics in (eager, traced):
        for name, norm in CASES["labels"][1].items():
            kinds = ("norm", "threshold", "scale", "clip_rate")
            row = [metrics[f"clip/{kind}/{name}"] for kind in kinds]
            expected = [norm, 10.0, min(1.0, 10.0 / norm), float(norm > 10)]
            np.testing.assert_allclose(row, expected, rtol=1e-6)
        assert len(metrics) == 11 + 4 * len(names)
    assert traced.keys() == eager.keys()


def test_excluded_leaves_have_no_name():
    """The filter has one row, the bound a row for each leaf that is left."""
    names = row_names(PARAMS, exclude=without_layer_2)
    assert names == list(of_leaves(1, 10))
    tx = trust_clip(optax.sgd(1.0), exclude=without_layer_2)
    state = jax.jit(tx.update)(GRADIENTS, tx.init(PARAMS), PARAMS)[1]
    metrics = clip_metrics(state, names)
    for name, norm in of_leaves(1, 10).items():
        size = 3 if "bias" in name else 6
        key = f"clip/update_norm/{name}"
        np.testing.assert_allclose(metrics[key], norm / math.sqrt(size), rtol=1e-6)
    both = math.sqrt(6.03) * math.hypot(1, 10)
    np.testing.assert_allclose(metrics["clip/norm/global"], both, rtol=1e-6)
    masked = optax.masked(clip_by_policy(Fixed(1.0), labels=by_layer), not_layer_2)
    state = masked.init(PARAMS)
    names = row_names(PARAMS, labels=by_layer, exclude=without_layer_2)
    assert names == ["layers_1", "layers_10"]
    assert state.inner_state.clip_norm.shape == (2,)


def not_layer_2(tree):
    return {name: name != "layers_2" for name in tree}


def test_the_rows_of_a_skipping_optimizer_are_those_of_its_scope():
    tx = skip_steps(optax.sgd(1.0), Fixed(2.0), labels=by_layer)
    _, state = tx.update(GRADIENTS, tx.init(PARAMS), PARAMS)
    metrics = clip_metrics(state, row_names(PARAMS, labels=by_layer))
    for label, norm in CASES["labels"][1].items():
        np.testing.assert_allclose(metrics[f"clip/norm/{label}"], norm, rtol=1e-6)


def test_names_of_other_rows_are_refused():
    state = clip_by_policy(Fixed(1.0)).init(PARAMS)
    with pytest.raises(
        ValueError, match="names must have one entry per row, got 3 for 6"
    ):
        clip_metrics(state, row_names(PARAMS, labels=by_layer))
    with pytest.raises(ValueError, match="labels must be a prefix of the tree"):
        row_names(PARAMS, labels={"a": 1})
    with pytest.raises(ValueError, match="labels must be given without a scope"):
        row_names(PARAMS, labels=by_layer, scope="unit")


def test_a_log_counts_the_rows_by_name():
    """The gradients grow by half in each step; a layer is clipped above 10."""
    names, log = row_names(PARAMS, labels=by_layer), ClipLog()
    tx = clip_by_policy(Fixed(10.0), labels=by_layer)
    state = tx.init(PARAMS)
    for step in range(6):
        gradients = jax.tree.map(lambda g, k=step: g * np.float32(1.5**k), GRADIENTS)
        _, state = tx.update(gradients, state)
        log.record(clip_metrics(state, names))
    norms = CASES["labels"][1]
    rates = [np.mean([n * 1.5**k > 10 for k in range(6)]) for n in norms.values()]
    assert log.names == names
    np.testing.assert_array_equal(log.row_clip_rates, rates)
    largest, norm = log.largest[0], max(norms.values()) * 1.5**5
    assert (largest.step, largest.ratio) == (5, pytest.approx(norm / 10))
    assert largest.rows[0] == (max(norms, key=norms.get), largest.ratio)
    pytest.importorskip("matplotlib")
    labels = log.plot_rows().axes[0].get_yticklabels()
    assert [label.get_text() for label in labels] == names
