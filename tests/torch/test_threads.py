"""Any number of threads on the CPU gives the same bits."""

from functools import cache

import pytest
import torch

from autoclip_torch import QuantileClip

from ..support.torch_models import check_same

# Below and above the size that torch divides among threads (2**15 numbers), and below
# and above the size of the clipper's pieces.
SHAPES = [(1000,), (8192,), (40_000,), (300_001,), (1500, 1000), (64, 32, 3, 3)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(autouse=True)
def _restored_threads():
    """Restore the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@cache
def gradient(shape, step):
    """Return the same gradient for every type and number of threads."""
    rng = torch.Generator().manual_seed(step)
    return torch.randn(shape, generator=rng).mul_(step + 1)


def clipped(threads, dtype, scope):
    """Return decisions and gradients of two steps; the second clips."""
    torch.set_num_threads(threads)
    weights = [torch.nn.Parameter(torch.ones(s, dtype=dtype)) for s in SHAPES]
    clipper = QuantileClip(weights, quantile=0.5, history_length=4, scope=scope)
    results = []
    for step in range(2):
        for weight in weights:
            weight.grad = gradient(weight.shape, step).to(dtype, copy=True)
        decision = clipper.step()
        results += [*decision, *(weight.grad for weight in weights)]
    assert decision.clipped.any()
    return results


@pytest.mark.parametrize("scope", ["parameter", "global", "unit"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_number_of_threads_changes_no_bit(dtype, scope):
    expected = clipped(1, dtype, scope)
    for threads in (2, 3):
        check_same(clipped(threads, dtype, scope), expected)
