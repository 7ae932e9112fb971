"""Every test runs on one thread, and draws the same numbers in any order."""

import pytest


@pytest.fixture(autouse=True)
def _same_seed():
    import torch  # this file is loaded without torch, too

    torch.set_num_threads(1)
    torch.manual_seed(0)
