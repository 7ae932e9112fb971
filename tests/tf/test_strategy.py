"""`MirroredStrategy` with two replicas clips after the sum and counts a step once."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow


@functools.cache
def results():
    """Return the results of `keras_replicas.py`."""
    script = Path(__file__).parents[1] / "support" / "keras_replicas.py"
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    child = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr[-3000:]
    return json.loads(child.stdout.splitlines()[-1])


def test_gradients_are_clipped_after_the_sum_over_the_replicas():
    assert results()["opposed"] == -1.0  # with global_clipnorm of Keras it is 0


def test_a_clip_before_the_sum_over_the_replicas_is_a_warning():
    """tensorflow#33929. After the sum, and inside an optimizer, there is none."""
    assert results()["false warnings"] == []
    texts, metrics = results()["by hand"]
    assert len(texts) == 1
    assert "NormClip is called inside the replica function of a strategy" in texts[0]
    assert "clipper.as_optimizer(keras.optimizers.SGD(0.1))" in texts[0]
    assert metrics["clip/norm"] == 20.0


@pytest.mark.parametrize(
    "name",
    ["global", "parameter", "unit", "update", "trust", "trust update", "legacy"],
)
def test_two_replicas_train_as_one_device(name):
    if name not in results():
        pytest.skip("tf_keras is not installed")
    one, two = results()[name]["one"], results()[name]["two"]
    assert one["steps"] == two["steps"] == 12
    assert one["clip_rate"] > 0
    np.testing.assert_allclose(one["threshold"], two["threshold"], rtol=1e-5)
    for weight, expected in zip(two["weights"], one["weights"], strict=True):
        np.testing.assert_allclose(weight, expected, rtol=1e-4, atol=1e-6)
