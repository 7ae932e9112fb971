"""Keras trains alike on its backends; JAX and torch run in child processes."""

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from ..support import keras_child

ROOT = Path(__file__).parents[2]
NAMES = ["quantile", "global", "unit", "zscore", "norm", "value"]


@functools.cache
def results_on(backend):
    """Return the results of `keras_child.py` on a backend."""
    if backend == "tensorflow":  # the backend of this process
        with tempfile.TemporaryDirectory() as folder:
            return keras_child.check_backend(Path(folder))
    environment = {
        **os.environ,
        "KERAS_BACKEND": backend,
        # Each operation of an eager step is compiled; that takes longer than the steps.
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "PYTHONWARNINGS": "ignore",
    }
    with tempfile.TemporaryDirectory() as folder:
        child = subprocess.run(
            [sys.executable, "-m", "tests.support.keras_child", folder],
            env=environment,
            cwd=folder,
            capture_output=True,
            text=True,
        )
    assert child.returncode == 0, child.stderr[-3000:]
    return json.loads(child.stdout.splitlines()[-1])


def every_backend(*names):
    return pytest.mark.parametrize(
        "backend",
        [
            pytest.param(
                name, marks=pytest.mark.needs("tf" if name == "tensorflow" else name)
            )
            for name in names
        ],
    )


pytestmark = pytest.mark.slow


def check_same(name, one, other, steps):
    """Check that two runs have the same metrics of a clipper and the same weights."""
    assert one[name]["steps"] == other[name]["steps"] == steps
    for key in ("norm", "threshold"):
        np.testing.assert_allclose(one[name][key], other[name][key], rtol=1e-4)
    for weight, expected in zip(one["weights"], other["weights"], strict=True):
        np.testing.assert_allclose(weight, expected, rtol=1e-4, atol=1e-5)


@every_backend("jax", "torch")
@pytest.mark.parametrize("name", NAMES)
def test_a_backend_trains_as_tensorflow_does(name, backend):
    assert results_on(backend)[name]["clip_rate"] > 0
    check_same(name, results_on(backend), results_on("tensorflow"), steps=12)


@every_backend("jax")
def test_uncompiled_training_gives_the_same_numbers(backend):
    results = results_on(backend)
    for name in NAMES:
        check_same(name, results["uncompiled"], results["first epoch"], steps=4)


@every_backend("jax", "tensorflow", "torch")
def test_runs_are_logged_saved_and_observed_once_per_update(backend):
    results = results_on(backend)
    assert all(results[name]["logged"] for name in [*NAMES, "update"])
    assert results["update"]["steps"] == 12
    assert results["update"]["clip_rate"] > 0
    assert results["resumed"]
    steps, update_steps, norm, threshold, *weights = results["accumulated"]
    assert steps == update_steps == 2
    assert norm > threshold  # the update was clipped
    for weight, expected in zip(
        weights, results_on("tensorflow")["accumulated"][4:], strict=True
    ):
        np.testing.assert_allclose(weight, expected, rtol=1e-4, atol=1e-5)


@every_backend("jax", "torch")
def test_a_sparse_gradient_is_clipped_as_a_dense_one(backend):
    weight = results_on(backend)["sparse"]
    np.testing.assert_allclose(weight, [-0.6, 0.0, -0.8], rtol=1e-6)


@every_backend("jax", "torch")
def test_a_hundred_recorded_steps_agree_with_the_reference(backend):
    assert results_on(backend)["recorded steps"] == 100


@every_backend("jax")
def test_stateless_apply_matches_the_golden_traces(backend):
    assert results_on(backend)["traces"] == len(keras_child.TRACED)
