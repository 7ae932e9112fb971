"""The code of the page about Keras runs, in order and in one namespace."""

import pathlib
import re

import numpy as np
import pytest

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "keras.md"


def save_model_without_clipper(path):
    """Save a model with plain Adam after one step; a first moment is 0.1 * 1."""
    keras = pytest.importorskip("keras")
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(1)])
    model.compile(optimizer=keras.optimizers.Adam(1e-3), loss="mse")
    optimizer, weights = model.optimizer, model.trainable_variables
    optimizer.apply([np.ones(weight.shape, "float32") for weight in weights], weights)
    model.save(path)


def test_the_code_runs(tmp_path, monkeypatch):
    pytest.importorskip("tf_keras")
    monkeypatch.chdir(tmp_path)
    save_model_without_clipper("old.keras")
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.M | re.S)
    assert len(blocks) > 5
    namespace = {"__name__": "keras_page"}
    for block in blocks:
        exec(compile(block, "keras.md", "exec"), namespace)
    assert len(namespace["history"]["clip/norm"]) == 2
    assert namespace["clip"].policy.quantile == 0.9
    first = 2 * 2  # `fit` with 2 epochs of 2 batches
    assert namespace["log"].largest[0].step == first + 2
    names = [name.split("/")[-1] for name in namespace["log"].updates.names]
    assert names == ["kernel", "bias"]
    optimizer = namespace["model"].optimizer
    assert optimizer.gradient_transformers
    np.testing.assert_allclose(optimizer.variables[2].numpy(), 0.1, rtol=1e-6)
