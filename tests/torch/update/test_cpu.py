"""Long parameters on the CPU, which are measured in pieces, against float64."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from autoclip_core import ParamRatio
from autoclip_torch import UpdateClipper

LENGTH = 2**19 + 5
"""The number of elements: three pieces of unequal size."""


def make_model(size, dtype):
    generator = np.random.default_rng(0)
    model = nn.ParameterList()
    for length in (LENGTH, 3):
        numbers = size * generator.standard_normal((2, length))
        weights, gradient = torch.from_numpy(numbers).to(dtype)
        model.append(nn.Parameter(weights))
        model[-1].grad = gradient
    return model


def clip_by_formula(old, changes, ratio, scope, order):
    """Return the weights in float64."""

    def norm(parts):
        return np.linalg.norm(np.concatenate(parts), order)

    rows = [[0, 1]] if scope == "global" else [[0], [1]]
    result = []
    for row in rows:
        change = norm([changes[i] for i in row])
        limit = ratio * norm([old[i] for i in row])
        result += [old[i] + min(1, limit / change) * changes[i] for i in row]
    return result


@pytest.mark.parametrize("size", [1e-22, 1.0, 1e22])
@pytest.mark.parametrize("ratio", [0.1, 0.9])
@pytest.mark.parametrize(
    ("scope", "norm", "dtype"),
    [
        ("global", "l2", torch.float32),
        ("parameter", "l2", torch.float32),
        ("parameter", "max", torch.float32),
        ("parameter", "l2", torch.float64),
    ],
)
def test_a_long_parameter_follows_the_formula(scope, norm, dtype, ratio, size):
    """The squares of the sizes 1e-22 and 1e22 do not fit into float32."""
    policy = ParamRatio(ratio, eps=1e-30)
    model = make_model(size, dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    clipper = UpdateClipper(model, optimizer, policy, scope=scope, norm=norm)
    old = [p.detach().double().clone().numpy() for p in model]
    changes = [-p.grad.double().numpy() for p in model]
    optimizer.step()
    order = np.inf if norm == "max" else 2
    expected = clip_by_formula(old, changes, ratio, scope, order)
    for parameter, weights in zip(model, expected, strict=True):
        error = np.abs(parameter.detach().double().numpy() - weights).max()
        assert error < 2e-6 * size
    assert clipper.metrics()["clip/update_clip_rate"] > 0


def test_a_long_parameter_is_restored_exactly():
    model = make_model(1.0, torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    UpdateClipper(model, optimizer, ParamRatio(0.1))
    with torch.no_grad():
        model[0][0] = -0.0
        model[0].grad[-1] = float("inf")
    old = model[0].detach().clone()
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.step()
    assert torch.equal(model[0], old)
    assert torch.signbit(model[0][0])


def test_a_long_sparse_gradient_is_clipped_by_unit():
    """It has more than 2^20 elements, and is measured in one piece."""
    layer = nn.Embedding(1050, 1000, sparse=True)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    UpdateClipper(layer, optimizer, ParamRatio(0.1), scope="unit")
    old = layer.weight.detach().double().clone()
    layer(torch.arange(1050)).sum().backward()
    optimizer.step()
    change = layer.weight.detach().double() - old
    torch.testing.assert_close(
        change.norm(dim=1), 0.1 * old.norm(dim=1), rtol=2e-6, atol=0
    )


class Passes(TorchDispatchMode):
    """Counts the elements that torch reads or writes, and the largest new tensor."""

    def __init__(self):
        super().__init__()
        self.elements = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        returned = func._schema.returns
        if not any(r.alias_info and not r.alias_info.is_write for r in returned):
            self.elements += sum(count_elements(args))
        if all(r.alias_info is None for r in returned):
            self.largest = max([self.largest, *count_elements([result])])
        return result


def count_elements(values):
    """Return the number of elements of each tensor in nested lists."""
    leaves = torch.utils._pytree.tree_leaves(values)
    return [each.numel() for each in leaves if isinstance(each, torch.Tensor)]


@pytest.mark.parametrize("lengths", [[LENGTH], [100] * 40, [LENGTH, *[100] * 40]])
def test_a_step_adds_four_passes_and_little_memory(lengths):
    """They are the weights and their copy, before the step and again after it.

    NumPy sums the squares while they are in the cache.
    """
    model = nn.ParameterList(nn.Parameter(torch.ones(each)) for each in lengths)
    for parameter in model:
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    UpdateClipper(model, optimizer, ParamRatio(0.1))
    optimizer.step()
    with Passes() as passes:
        optimizer.step()
    of_the_optimizer = 2 * sum(lengths)
    short = sum(2 * each for each in lengths if each < LENGTH)  # are copied together
    assert passes.elements == of_the_optimizer + 4 * sum(lengths) + short
    assert passes.largest <= 2**18
