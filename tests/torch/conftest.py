"""Every torch test runs on one thread."""

import pytest


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """The models are tiny: a second thread would only wait for the first."""
    import torch  # this file is loaded without torch, too

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
