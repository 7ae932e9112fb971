"""One hundred recorded steps of SGD with momentum agree with NumPy."""

import numpy as np
import pytest
import torch
from torch import nn

from autoclip_torch import UpdateClipper
from tests.support import update_reference as reference


def make_model(dtype=torch.float32):
    """Return a module with the reference's parameters, in its order.

    The weight is transposed, because torch lays it out as outputs, inputs.
    """
    model = nn.Module()
    for name, value in reference.weights().items():
        setattr(model, name, nn.Parameter(torch.from_numpy(value.T).to(dtype)))
    return model


@pytest.mark.parametrize("case", reference.CASES.values(), ids=reference.CASES)
@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 2e-4), ("float64", 2e-6)])
def test_the_update_is_that_of_numpy(case, dtype, rtol):
    """In float32, the difference of two weights has fewer correct digits."""
    model = make_model(getattr(torch, dtype))
    optimizer = torch.optim.SGD(
        model.parameters(), reference.LEARNING_RATE, reference.MOMENTUM
    )
    clipper = UpdateClipper(
        model, optimizer, case.policy, scope=case.scope, norm=case.norm
    )
    for step, gradients in zip(reference.run(case), reference.gradients(), strict=True):
        for name, p in model.named_parameters():
            p.grad = torch.from_numpy(gradients[name].T).to(p.dtype)
        optimizer.step()
        metrics = clipper.metrics(per_row=True)
        for kind in ("norm", "threshold", "scale"):
            got = [metrics[f"clip/update_{kind}/{name}"] for name in clipper.names]
            np.testing.assert_allclose(got, getattr(step, kind + "s"), rtol=rtol)
        weights = {k: p.detach().numpy().T for k, p in model.named_parameters()}
        reference.assert_agrees(weights, step)
