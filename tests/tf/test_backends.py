"""The same training on Keras's three backends, each in a process of its own."""

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
NAMES = ["quantile", "global", "unit", "zscore", "norm", "value"]


@functools.cache
def on(backend):
    """What `keras_child.py` found on a backend."""
    environment = {
        **os.environ,
        "KERAS_BACKEND": backend,
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


@every_backend("jax", "torch")
@pytest.mark.parametrize("name", NAMES)
def test_a_backend_trains_as_tensorflow_does(name, backend):
    ours, theirs = on(backend)[name], on("tensorflow")[name]
    assert ours["steps"] == theirs["steps"] == 12
    np.testing.assert_allclose(ours["norm"], theirs["norm"], rtol=1e-4)
    np.testing.assert_allclose(ours["threshold"], theirs["threshold"], rtol=1e-4)
    for one, other in zip(ours["weights"], theirs["weights"], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@every_backend("jax")
def test_training_without_a_compiler_is_the_same(backend):
    one, other = on(backend)["uncompiled"], on(backend)["global"]
    np.testing.assert_allclose(one["threshold"], other["threshold"], rtol=1e-4)
    for some, others in zip(one["weights"], other["weights"], strict=True):
        np.testing.assert_allclose(some, others, rtol=1e-4, atol=1e-5)


@every_backend("jax", "tensorflow", "torch")
def test_everything_is_logged_saved_and_observed_once_per_update(backend):
    found = on(backend)
    runs = [run for run in found.values() if isinstance(run, dict)]
    assert len(runs) >= len(NAMES)
    assert all(run["logged"] for run in runs)
    assert all(run["resumed"] for run in runs)
    assert found["accumulated"] == 4


@every_backend("jax")
def test_the_golden_traces_pass_through_stateless_apply(backend):
    assert on(backend)["traces"] == 9
