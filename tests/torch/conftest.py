"""Every torch test runs on one thread, and draws the same numbers in any order."""

import pytest


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """The models are tiny: a second thread would only wait for the first."""
    import torch  # this file is loaded without torch, too

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _same_seed():
    """Otherwise the weights of a model would depend on the tests before it."""
    import torch

    torch.manual_seed(0)
