"""Engines that clip by themselves, threshold first, in two processes with gloo.

DeepSpeed's ZeRO 1 to 3 with accumulated gradients, DeepSpeed in plain float32 with an
attached clipper, torch's FSDP1, and fairscale's OSS. One process runs
`support/engine_ranks.py`, which starts the ranks.
"""

import json

import numpy as np
import pytest
import torch
from torch import nn

from ..support import engine_ranks
from ..support.engine_ranks import ENGINES, MISUSES, RATE, STEPS, WORLD
from ..support.run_module import run_module


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return the results of each rank: results[rank][engine]."""
    folder = tmp_path_factory.mktemp("engines")
    run_module("engine_ranks", folder, timeout=170)
    files = [folder / f"{rank}.json" for rank in range(WORLD)]
    return [json.loads(file.read_text()) for file in files]


@pytest.fixture(scope="module")
def expected():
    """Return norms, limits and weights of one process that clips at the median."""
    model = engine_ranks.make_model()
    norms, limits = [], []
    for step in range(STEPS):
        batches = [engine_ranks.make_batches(step, rank) for rank in range(WORLD)]
        x, y = engine_ranks.join([batch for each in batches for batch in each])
        model.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        gradients = [p.grad for p in model.parameters()]
        norm = float(torch.cat([g.flatten() for g in gradients]).double().norm())
        limits.append(float(np.quantile(norms[-6:], 0.5)) if norms else 1e9)
        with torch.no_grad():
            for p in model.parameters():
                p -= RATE * min(1.0, limits[-1] / norm) * p.grad
        norms.append(norm)
    weights = engine_ranks.flatten(model)
    return {"norms": norms, "limits": limits, "weights": weights}


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_clips_at_the_threshold_of_the_norms_it_reported(
    results, expected, engine
):
    for rank in results:
        run = rank[engine]
        assert "failed" not in run, run["failed"]
        for name, values in expected.items():
            np.testing.assert_allclose(run[name], values, rtol=1e-4, atol=1e-6)
        assert run["steps"] == STEPS
    pairs = zip(expected["norms"], expected["limits"], strict=True)
    assert 3 < sum(norm > limit for norm, limit in pairs) < STEPS


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_updates_after_the_last_micro_batch(results, stage):
    for rank in results:
        assert rank[f"DeepSpeed, ZeRO {stage}"]["applied"] == [False, True] * STEPS


def test_deepspeed_reports_no_norm_in_plain_float32(results):
    for rank in results:
        assert rank["DeepSpeed, plain float32"]["reported"] is None


@pytest.mark.parametrize("name", MISUSES)
def test_a_clipper_made_before_zero_is_refused(results, name):
    for rank in results:
        assert "engine that flattens them" in rank[name]["error"]
