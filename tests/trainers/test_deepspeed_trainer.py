"""The callback of docs/trainers.md clips in a Hugging Face `Trainer` under DeepSpeed.

A process runs `support/deepspeed_trainer.py`.
"""

import json

import numpy as np
import pytest

from ..support.deepspeed_trainer import STAGES, STEPS
from ..support.run_module import run_module


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deepspeed")
    run_module("deepspeed_trainer", folder, timeout=170)
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("stage", STAGES)
def test_each_step_has_at_most_the_length_of_the_threshold(results, stage):
    limits, norms, lengths = np.array(results[str(stage)]).T
    assert len(norms) == STEPS
    medians = [np.median(norms[:step]) for step in range(1, STEPS)]
    np.testing.assert_allclose(limits, [1e9, *medians], rtol=1e-5)
    np.testing.assert_allclose(lengths, np.minimum(norms, limits), rtol=1e-3)
    assert 2 <= np.sum(norms > limits) < STEPS
