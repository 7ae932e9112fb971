"""Steps on a CUDA device, in the mode that makes every synchronization an error."""

import itertools
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from autoclip_core.clipper.norms import NORMS
from autoclip_torch import NormClip, QuantileClip
from autoclip_torch.gradients.device import scale_whole_
from autoclip_torch.kernels.choose import find_kernel

from ..support.torch_device import (
    MODES,
    assert_alike,
    every_clipper,
    give,
    gradients,
    model,
    rtol_of,
)
from ..support.torch_gradients import (
    GRADIENTS,
    every_scope,
    numbers,
    scaled,
    true_norms,
)

pytestmark = pytest.mark.gpu


@contextmanager
def no_synchronisation():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_reports_a_synchronization():
    """The control of the tests below."""
    with pytest.raises(RuntimeError, match="synchroniz"), no_synchronisation():
        torch.ones(1, device="cuda").item()


@every_clipper
def test_on_cuda_a_step_does_not_synchronise(make):
    for scope, nonfinite in MODES:
        check_on_cuda(make, scope, nonfinite)


def check_on_cuda(make, scope, nonfinite):
    host, device = model(), model().cuda()
    on_host = make(host, scope=scope, nonfinite=nonfinite)
    on_device = make(device, scope=scope, nonfinite=nonfinite)
    for grads in gradients(list(host.parameters())):
        give(host.parameters(), grads)
        give(device.parameters(), grads, lambda gradient: gradient.cuda())
        expected = on_host.step()
        with no_synchronisation():
            decision = on_device.step()
        assert all(field.is_cuda for field in decision)
        assert_alike(
            [field.cpu() for field in decision], expected, rtol=2 * rtol_of(make)
        )
        for p, q in zip(host.parameters(), device.parameters(), strict=True):
            if p.grad is not None:
                torch.testing.assert_close(
                    q.grad.cpu(), p.grad, rtol=1e-5, atol=0, equal_nan=True
                )
    metrics, expected = on_device.metrics(), on_host.metrics()
    for name, value in metrics.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, err_msg=name)


@every_scope
def test_on_cuda_every_kind_of_gradient(scope):
    for (name, make), norm in itertools.product(GRADIENTS.items(), NORMS):
        gradient = make()
        norms = true_norms(numbers(gradient), scope, norm)
        limit = float(np.float32(0.6 * norms.max(initial=0))) or 1.0
        p = torch.nn.Parameter(torch.zeros(gradient.shape, dtype=gradient.dtype).cuda())
        p.grad = gradient.cuda()
        clipper = NormClip([p], max_norm=limit, scope=scope, norm=norm)
        if gradient.is_sparse:
            decision = clipper.step()  # coalescing reads the number of duplicates
        else:
            with no_synchronisation():
                decision = clipper.step()
        norm, _, scale, clipped, _, _ = (field.cpu().numpy() for field in decision)
        np.testing.assert_allclose(norm, norms, rtol=1e-6, err_msg=name)
        np.testing.assert_array_equal(clipped, norms > limit, err_msg=name)
        expected = scaled(gradient.to_dense(), scale, clipped)
        torch.testing.assert_close(p.grad.cpu().to_dense(), expected, msg=name)


def test_on_cuda_the_kernel_and_the_operations_scale_alike():
    """In Triton's kernel, and in a captured graph, which uses operations of torch."""
    pytest.importorskip("triton")
    scales = torch.tensor([1.0, 0.0, 0.3], device="cuda")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        values = torch.randn(2**17 + 5, dtype=dtype, device="cuda")
        values[:3] = torch.tensor([np.inf, -np.inf, 0.0])
        first, second = ({row: [values.clone()] for row in range(3)} for _ in range(2))
        assert find_kernel(values.device) is not None
        scale_whole_(first, scales)  # compiles the kernel
        with no_synchronisation():
            scale_whole_({0: first[0]}, scales)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            assert find_kernel(values.device) is None
            scale_whole_(second, scales)
        graph.replay()
        for row in range(3):
            assert torch.equal(first[row][0], second[row][0])


def test_on_cuda_on_clip_waits_only_for_the_step_before():
    host, device = model(), model().cuda()
    calls = {"host": [], "device": []}

    def keep(place):
        return lambda decision, names, step: calls[place].append((step, decision))

    on_host = NormClip(host, 3.0, scope="parameter", on_clip=keep("host"))
    on_device = NormClip(device, 3.0, scope="parameter", on_clip=keep("device"))
    for step, grads in enumerate(gradients(list(host.parameters()))):
        give(host.parameters(), grads)
        give(device.parameters(), grads, lambda gradient: gradient.cuda())
        on_host.step()
        with no_synchronisation():
            on_device.step()
        assert len(calls["device"]) == sum(k < step for k, _ in calls["host"])
    on_device.metrics()
    assert len(calls["host"]) > 2
    for (k, expected), (number, decision) in zip(*calls.values(), strict=True):
        assert number == k
        assert_alike(decision, expected, rtol=2e-6)


def test_on_cuda_a_model_may_lie_on_two_devices():
    """Its rows are decided on the accelerator, with one transfer."""
    host, spread_out = model(), model()
    spread_out[1].cuda()
    on_host = QuantileClip(host, history_length=5, global_clipping=True)
    on_both = QuantileClip(spread_out, history_length=5, global_clipping=True)
    for grads in gradients(list(host.parameters())):
        give(host.parameters(), grads)
        for p, gradient in zip(spread_out.parameters(), grads, strict=True):
            p.grad = None if gradient is None else gradient.to(p.device, copy=True)
        expected, decision = on_host.step(), on_both.step()
        assert_alike([field.cpu() for field in decision], expected, rtol=2e-6)
        for p, q in zip(host.parameters(), spread_out.parameters(), strict=True):
            if p.grad is not None:
                torch.testing.assert_close(q.grad.cpu(), p.grad, rtol=1e-5, atol=0)


def test_on_cuda_a_history_of_all_norms_is_refused():
    with pytest.raises(ValueError, match="history_length must be a number"):
        QuantileClip(model().cuda(), history_length=None)
