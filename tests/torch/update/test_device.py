"""Update clipping on a device: as on the CPU, and nothing is read back."""

import warnings

import numpy as np
import pytest
import torch

from autoclip_core import Drop, MeanStd, ParamRatio
from autoclip_torch import TrustClip, UpdateClipper

from ...support.torch_device import (
    NAN,
    Watched,
    give,
    gradients,
    looks_counted,
    model,
    nothing_read,
    unwatched,
    watched,
)

POLICIES = {
    "ratio": ParamRatio(0.1, eps=0.1),
    "deviations": MeanStd(0.5, history_length=6),
    "drop": Drop(MeanStd(1.0, history_length=6)),
}


def on_device(net):
    """Replace the parameters by watched ones."""
    for layer in net:
        for name, p in list(layer.named_parameters(recurse=False)):
            setattr(layer, name, torch.nn.Parameter(watched(p.detach())))
    return net


def make(net, policy, **keywords):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5, foreach=False)
    return optimizer, UpdateClipper(net, optimizer, policy, **keywords)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("scope", "norm"),
    [("parameter", "l2"), ("unit", "rms"), ("global", "l2"), ("unit", "max")],
)
def test_a_step_reads_nothing_and_decides_as_on_the_cpu(policy, scope, norm):
    """Some gradients are missing, 0, NaN, infinite or overflow."""
    host, device = model(), on_device(model())
    keywords = {"scope": scope, "norm": norm}
    optimizer, on_host = make(host, POLICIES[policy], **keywords)
    other, clipper = make(device, POLICIES[policy], **keywords)
    assert clipper.names == on_host.names
    for grads in gradients(list(host.parameters())):
        give(host.parameters(), grads)
        give(device.parameters(), grads, watched)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
        with nothing_read():
            other.step()
        for p, q in zip(host.parameters(), device.parameters(), strict=True):
            assert type(q.data) is Watched
            torch.testing.assert_close(unwatched(q.data), p.data, rtol=1e-5, atol=1e-6)
    with looks_counted() as looks, pytest.warns(UserWarning, match="not finite"):
        metrics = clipper.metrics(per_row=True)
    assert looks == ["cpu"], "one transfer"
    expected = on_host.metrics(per_row=True)
    assert list(metrics) == list(expected)
    np.testing.assert_allclose(
        list(metrics.values()), list(expected.values()), rtol=1e-4
    )
    assert metrics["clip/update_clip_rate"] > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scope", ["parameter", "unit"])
def test_rows_within_their_bound_and_removed_rows_are_unchanged(scope, dtype):
    """One row is small, one is large, and one is not finite."""
    weights = torch.randn(3, 2).to(getattr(torch, dtype))
    net = torch.nn.ParameterList(watched(w.clone()) for w in (weights,) * 3)
    for index, size in enumerate([0.1, 100.0, NAN]):
        net[index].grad = watched(torch.full_like(weights, size))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5, foreach=False)
    UpdateClipper(net, optimizer, ParamRatio(0.1, eps=2.0), scope=scope)
    with nothing_read():
        optimizer.step()
    small, large, removed = (unwatched(p.data) for p in net)
    assert torch.equal(small, weights - 0.5 * torch.full_like(weights, 0.1))
    assert torch.equal(removed, weights)
    change = torch.linalg.vector_norm((large - weights).double())
    assert 0 < float(change) < 2


@pytest.mark.parametrize("scope", ["parameter", "unit", "global"])
def test_a_model_without_values_steps_and_has_no_metrics(scope):
    """It is on the meta device, where steps cost no memory."""
    net = model().to("meta")
    optimizer = torch.optim.AdamW(net.parameters())
    clipper = TrustClip(net, optimizer, scope=scope)
    for p in net.parameters():
        p.grad = torch.empty_like(p)
    optimizer.step()
    with pytest.raises(NotImplementedError, match="no data"):
        clipper.metrics()
