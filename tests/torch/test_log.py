"""A log takes a torch norm of a type that NumPy does not have."""

import torch

from autoclip_core import ClipLog


def test_a_log_takes_a_bfloat16_norm():
    log = ClipLog()
    log.record(norm=torch.tensor(3.0, dtype=torch.bfloat16), threshold=1.5)
    assert log.norms.tolist() == [3.0]
    assert log.scales.tolist() == [0.5]
