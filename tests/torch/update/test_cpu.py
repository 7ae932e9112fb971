"""Long parameters on the CPU, which are measured in pieces, against float64."""

import numpy as np
import pytest
import torch
from torch import nn

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
