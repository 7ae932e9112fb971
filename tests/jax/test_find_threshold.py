"""The JAX example measures the norm of the whole gradient."""

import importlib.util
import pathlib

import jax.numpy as jnp
import pytest

EXAMPLE = pathlib.Path(__file__).parents[2] / "examples" / "find_threshold_jax.py"


def test_the_norms_are_those_of_the_whole_gradient():
    spec = importlib.util.spec_from_file_location("find_threshold_jax", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    params = {"weight": jnp.zeros(2), "bias": jnp.zeros(())}

    def loss(params, batch):
        return batch * (3 * params["weight"][0] + 4 * params["bias"])

    batches = [jnp.float32(n) for n in (1, 2, 3)]
    summary = example.find_clipping_threshold(params, batches, loss, num_batches=2)
    assert (summary.steps, summary.min, summary.max) == (2, 5.0, 10.0)
    assert summary.mean == pytest.approx(7.5)
