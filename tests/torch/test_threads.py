"""The same bits with any number of threads, on the host."""

import pytest
import torch

from autoclip_torch import QuantileClip

from ..support.torch_models import check_same

# On both sides of what torch shares among threads (2**15 numbers), and of our pieces.
SHAPES = [(1000,), (8192,), (40_000,), (300_001,), (1500, 1000), (64, 32, 3, 3)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(autouse=True)
def threads():
    """Leave as many as there were."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def clipped(threads, dtype, scope):
    """Decisions and gradients of three steps."""
    torch.set_num_threads(threads)
    weights = [torch.nn.Parameter(torch.ones(s, dtype=dtype)) for s in SHAPES]
    clipper = QuantileClip(weights, quantile=0.5, history_length=4, scope=scope)
    found = []
    for step in range(3):
        rng = torch.Generator().manual_seed(step)
        for weight in weights:
            drawn = torch.randn(weight.shape, generator=rng)
            weight.grad = drawn.mul_(step + 1).to(dtype)
        found += [*clipper.step(), *(weight.grad for weight in weights)]
    return found


@pytest.mark.parametrize("scope", ["parameter", "global", "unit"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_number_of_threads_changes_no_bit(dtype, scope):
    one = clipped(1, dtype, scope)
    for threads in (2, 3):
        check_same(clipped(threads, dtype, scope), one)
