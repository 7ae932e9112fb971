"""The device path: a step decides as on the CPU and reads nothing back."""

import numpy as np
import pytest
import torch
from torch.nn.utils import clip_grad_norm_
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autoclip_core import EmaRatio, MeanStd, StreamingQuantile
from autoclip_torch import AGC, Clipper, NormClip, QuantileClip, StandardClip
from autoclip_torch.gradients import device

from ..support.cases import linear_quantile
from ..support.torch_device import (
    NoCopies,
    Watched,
    assert_alike,
    clippers_and_modes,
    every_clipper,
    give,
    gradients,
    looks_counted,
    model,
    nothing_read,
    read_fields,
    rtol_of,
    unwatched,
    watched,
)
from ..support.torch_gradients import (
    GRADIENTS,
    assert_same_bits,
    every_gradient,
    every_scope,
    numbers,
    parameter,
    scaled,
    true_norms,
)

INF, NAN = float("inf"), float("nan")

# Clippers, scopes and modes.


@clippers_and_modes
def test_a_step_reads_nothing_and_decides_as_on_the_cpu(make, scope, nonfinite):
    host, device = model(), model()
    on_host = make(host, scope=scope, nonfinite=nonfinite)
    on_device = make(device, scope=scope, nonfinite=nonfinite)
    assert on_device.names == on_host.names
    clipped = 0
    for grads in gradients(list(host.parameters())):
        give(host.parameters(), grads)
        give(device.parameters(), grads, watched)
        expected = on_host.step()
        with nothing_read():
            decision = on_device.step()
        assert_alike(decision, expected, rtol=rtol_of(make))
        for p, q in zip(host.parameters(), device.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)
            if p.grad is not None:
                assert type(q.grad) is Watched
                torch.testing.assert_close(
                    unwatched(q.grad), p.grad, rtol=1e-5, atol=0, equal_nan=True
                )
        clipped += int(expected.clipped.sum())
    assert clipped > 0, "nothing was tested"
    with looks_counted() as looks:
        metrics = on_device.metrics(per_row=True)
    assert looks == ["cpu"], "one transfer"
    expected = on_host.metrics(per_row=True)
    assert list(metrics) == list(expected)
    np.testing.assert_allclose(
        list(metrics.values()), list(expected.values()), rtol=1e-5
    )


@pytest.mark.parametrize("first", [0, 1])
def test_a_row_may_have_tensors_on_the_cpu_and_on_a_device(first):
    host, device = model(), model()
    on_host = QuantileClip(host, history_length=5, global_clipping=True)
    on_device = QuantileClip(device, history_length=5, global_clipping=True)
    for grads in gradients(list(host.parameters()), steps=6):
        give(host.parameters(), grads)
        give(device.parameters(), grads)
        for p in list(device.parameters())[first::2]:
            p.grad = watched(p.grad)
        expected = on_host.step()
        with nothing_read():
            decision = on_device.step()
        assert_alike(decision, expected)


def test_several_policies_in_one_step():
    def make(m):
        groups = [
            {"params": m[0].parameters(), "policy": MeanStd(1.0, history_length=4)},
            {"params": m[1].parameters()},
            {"params": m[2].parameters(), "policy": EmaRatio(1.1, warmup_steps=2)},
        ]
        return Clipper(groups, StreamingQuantile(0.5), scope="parameter")

    host, device = model(), model()
    on_host, on_device = make(host), make(device)
    for grads in gradients(list(host.parameters())):
        give(host.parameters(), grads)
        give(device.parameters(), grads, watched)
        expected = on_host.step()
        with nothing_read():
            decision = on_device.step()
        assert_alike(decision, expected, rtol=1e-5)


def on_device(gradient):
    """Return two parameters whose clipper uses the device path.

    The first has the gradient. No subclass can hold a sparse gradient, so then only the
    second gradient is watched.
    """
    first = parameter(gradient if gradient.is_sparse else watched(gradient))
    return [first, parameter(watched(torch.zeros(())))]


@every_scope
@every_gradient
def test_every_kind_of_gradient(make, scope):
    """Norms of float64 accuracy, products in float32, unchanged bits: as on the CPU."""
    gradient = make()
    dense = gradient.to_dense().clone()
    norms = true_norms(numbers(gradient), scope)
    limit = float(np.float32(0.6 * norms.max(initial=0))) or 1.0
    p, idle = on_device(gradient)
    clipper = NormClip([p, idle], max_norm=limit, scope=scope)
    with nothing_read():
        decision = clipper.step()
    norm, _, scale, clipped, finite, *_ = (
        f[: len(norms)] for f in read_fields(decision)
    )
    np.testing.assert_allclose(norm, norms, rtol=1e-6)
    np.testing.assert_array_equal(clipped, norms > limit)
    assert finite.all()
    after, expected = unwatched(p.grad), scaled(dense, scale, clipped)
    if gradient.is_sparse:
        torch.testing.assert_close(after.to_dense(), expected)
    elif gradient.is_complex():
        torch.testing.assert_close(after, expected)  # -0.0 may become 0.0
    else:
        assert_same_bits(after, expected)


@every_scope
@pytest.mark.parametrize(
    "name", ["float32", "bfloat16", "complex64", "sparse", "0-dim"]
)
@pytest.mark.parametrize("bad", [NAN, INF], ids=str)
def test_zero_means_zero(name, scope, bad):
    gradient = GRADIENTS[name]()
    stored = gradient._values() if gradient.is_sparse else gradient
    stored.view(-1)[0] = bad
    with np.errstate(invalid="ignore"):  # abs(nan + inf j)
        norms = true_norms(numbers(gradient), scope)
    p, idle = on_device(gradient)
    clipper = NormClip([p, idle], max_norm=0.5, scope=scope)
    with nothing_read():
        decision = clipper.step()
    after = numbers(unwatched(p.grad))
    finite = np.isfinite(norms)
    np.testing.assert_array_equal(read_fields(decision)[4][: len(norms)], finite)
    expected = np.where(finite, np.minimum(norms, 0.5), 0)
    rtol = 1e-2 if gradient.dtype == torch.bfloat16 else 1e-6
    np.testing.assert_allclose(true_norms(after, scope), expected, rtol=rtol)


@pytest.mark.parametrize("magnitude", [1e30, 1e-30])
@every_scope
def test_squares_out_of_range(magnitude, scope):
    gradient = torch.full((3, 4), magnitude)
    p = parameter(watched(gradient))
    with nothing_read():
        decision = NormClip([p], max_norm=magnitude / 10, scope=scope).step()
    expected = true_norms(numbers(gradient / gradient), scope) * magnitude
    np.testing.assert_allclose(read_fields(decision)[0], expected, rtol=1e-6)
    after = true_norms(numbers(unwatched(p.grad)), scope)
    np.testing.assert_allclose(after, magnitude / 10, rtol=1e-6)


# Kernels and temporary memory.


class Kernels(TorchDispatchMode):
    """Counts the operations that compute, and the largest tensor they allocate."""

    def __init__(self):
        super().__init__()
        self.count = self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        returned = func._schema.returns
        if all(r.alias_info is None for r in returned):  # no view, and not in place
            made = result if isinstance(result, (list, tuple)) else [result]
            sizes = [t.numel() for t in made if isinstance(t, torch.Tensor)]
            self.most = max(self.most, *sizes, 0)
        is_view = any(r.alias_info and not r.alias_info.is_write for r in returned)
        self.count += not is_view
        return result


def kernels_of_a_step(tensors, size, dtype, scope):
    """Count the kernels of a later step; the first ones also sample gradients."""
    torch.manual_seed(0)
    parameters = [parameter(torch.zeros(size, dtype=dtype)) for _ in range(tensors)]
    clipper = NormClip(parameters, max_norm=1.0, scope=scope)
    for _ in range(8):
        for p in parameters:
            p.grad = watched(torch.randn(size).to(dtype))
        with Kernels() as kernels:
            decision = clipper.step()
        assert read_fields(decision)[3].all()
    return kernels


@pytest.mark.parametrize("scope", ["global", "group"])
def test_more_tensors_of_one_row_need_no_more_launches(scope):
    two, forty = (kernels_of_a_step(n, 8, torch.float32, scope) for n in (2, 40))
    assert forty.count == two.count


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str
)
@pytest.mark.parametrize("scope", ["global", "parameter"])
def test_no_copy_is_made_of_a_gradient(scope, dtype):
    assert kernels_of_a_step(2, 4000, dtype, scope).most < 100


# Passes over the gradients. tests/trainers/test_triton_scale.py counts the kernel's.

SIDE = 100
"""Of the square matrices whose passes are counted; all other tensors are smaller."""


class Passes(TorchDispatchMode):
    """Counts the bytes of matrices that operations read and write."""

    def __init__(self):
        super().__init__()
        self.read = self.written = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        schema = func._schema
        aliases = [r.alias_info for r in schema.returns if r.alias_info]
        if any(not alias.is_write for alias in aliases):  # a view
            return result
        names = [argument.name for argument in schema.arguments]
        values = dict(zip(names, args, strict=False)) | (kwargs or {})
        for argument in schema.arguments:
            size = self.size(values.get(argument.name))
            self.read += size
            if argument.name == "grads" and values.get("grad_scale") is None:
                continue  # a fused optimizer writes only gradients that it scales
            if argument.alias_info and argument.alias_info.is_write:
                self.written += size
        self.written += 0 if aliases else self.size(result)
        return result

    def size(self, value):
        tensors = (t for t in tree_leaves(value) if isinstance(t, torch.Tensor))
        return sum(tensor.nbytes for tensor in tensors if tensor.numel() >= SIDE**2)


def count_copied(step):
    """Count the elements of matrices that are copied inside operations."""
    profile = torch.autograd.profiler.profile(use_kineto=False, record_shapes=True)
    with profile as profiler:
        step()
    copies = [e for e in profiler.function_events if e.name == "aten::copy_"]
    return SIDE**2 * sum(copy.input_shapes[0] == [SIDE, SIDE] for copy in copies)


def fused_adamw(parameters, clips):
    optimizer = torch.optim.AdamW(parameters, fused=True)
    if clips:
        NormClip(parameters, max_norm=1e9).attach(optimizer)
    return optimizer.step


STEPS = {
    "clip_grad_norm_": lambda p: lambda: clip_grad_norm_(p, 1e9),
    "global": lambda p: NormClip(p, max_norm=1e9).step,
    "parameter": lambda p: NormClip(p, max_norm=1e9, scope="parameter").step,
    "AGC": lambda p: AGC(p, dry_run=True).step,
    "fused AdamW": lambda p: fused_adamw(p, clips=False),
    "attached": lambda p: fused_adamw(p, clips=True),
}


@pytest.mark.parametrize(
    ("name", "read", "written"),
    [
        ("clip_grad_norm_", 2, 1),
        ("global", 3, 2),
        ("parameter", 3, 2),
        ("AGC", 6, 4),
        ("fused AdamW", 4, 3),
        ("attached", 4 + 1, 3 + 1),
    ],
)
def test_the_passes_that_the_page_of_costs_counts(name, read, written, monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(device, "choose_device", lambda _: cpu)
    parameters = [torch.nn.Parameter(torch.randn(SIDE, SIDE)) for _ in range(3)]
    for p in parameters:
        p.grad = torch.randn_like(p)
    size = sum(p.nbytes for p in parameters)
    step = STEPS[name](parameters)
    for _ in range(2):
        step()
    with Passes() as passes:
        step()
    if name == "AGC":  # its copies of gradients and parameters have 8 bytes per element
        copied = 8 * count_copied(step)
        passes.read, passes.written = passes.read + copied, passes.written + copied
    assert (passes.read / size, passes.written / size) == (read, written)


# Norms that are exact on both paths give the same quantiles bit for bit.


@pytest.mark.parametrize("q", [0.0, 0.35, 0.9, 1.0])
@pytest.mark.parametrize("length", [1, 7, 100])
def test_quantiles_are_those_of_numpy_bit_for_bit(q, length):
    rng = np.random.default_rng(2)
    norms = rng.integers(1, 1000, 25).astype(np.float32)
    p = parameter(torch.zeros(2))
    clipper = QuantileClip([p], quantile=q, history_length=length)
    for step, norm in enumerate(norms):
        p.grad = watched(torch.tensor([0.6 * float(norm), 0.8 * float(norm)]).round())
        exact = float(np.float32(np.linalg.norm(numbers(unwatched(p.grad)))))
        norms[step] = exact
        with nothing_read():
            decision = clipper.step()
        last = norms[max(step - length, 0) : step]
        expected = linear_quantile(last, q) if step else INF
        assert read_fields(decision)[0].tolist() == [exact]
        assert read_fields(decision)[1].tolist() == [expected], step


# Reads, and how many.


@pytest.mark.parametrize(
    ("settings", "look"),
    [
        ({"nonfinite": "skip"}, "__bool__"),
        ({"nonfinite": "raise"}, "tolist"),
    ],
)
def test_skip_and_raise_read_once_per_step(settings, look):
    m = model()
    clipper = NormClip(m, max_norm=1.0, scope="parameter", **settings)
    for grads in gradients(list(m.parameters()), steps=3):
        give(m.parameters(), grads, watched)
        with looks_counted() as looks:
            clipper.step()
        assert looks == [look]


def test_a_dry_run_reads_nothing():
    """Nothing is applied, so the CPU need not know whether to skip."""
    m = model()
    clipper = NormClip(m, max_norm=1.0, nonfinite="skip", dry_run=True)
    for grads in gradients(list(m.parameters()), steps=6):
        give(m.parameters(), grads, watched)
        with nothing_read():
            clipper.step()


def attempt(clipper):
    """Return the decision of a step and None, or None and the error message."""
    try:
        return clipper.step(), None
    except FloatingPointError as error:
        return None, str(error)


@every_clipper
def test_skip_and_raise_decide_as_on_the_cpu(make):
    for nonfinite in ("skip", "raise"):
        host, device = model(), model()
        on_host = make(host, nonfinite=nonfinite)
        on_device = make(device, nonfinite=nonfinite)
        outcomes = []
        for grads in gradients(list(host.parameters())):
            give(host.parameters(), grads)
            give(device.parameters(), grads, watched)
            expected, error = attempt(on_host)
            with looks_counted():
                decision, same_error = attempt(on_device)
            assert same_error == error
            if error is None:
                assert_alike(decision, expected, rtol=rtol_of(make))
            else:
                assert "is not finite" in error
            raised_or_skipped = error is not None or bool(expected.skipped.any())
            outcomes.append(raised_or_skipped)
            for p, q in zip(host.parameters(), device.parameters(), strict=True):
                assert (p.grad is None) == (q.grad is None)
        assert outcomes == [step in (5, 7) for step in range(12)]


def test_observing_and_asking_for_the_threshold_read_nothing():
    p = parameter(watched(torch.tensor([3.0, 4.0])))
    clipper = QuantileClip([p], quantile=0.5)
    clipper.step()
    with nothing_read():
        clipper.observe(7.0)
        threshold = clipper.threshold()
    assert unwatched(threshold).tolist() == [6.0]


# From the CPU to a device and back.


@every_clipper
def test_moving_in_the_middle_of_a_run_keeps_the_history(make):
    """Three steps on the CPU, three on the device, and so on."""
    host, mover = model(), model()
    on_host, moving = make(host), make(mover)
    for step, grads in enumerate(gradients(list(host.parameters()))):
        is_on_device = step // 3 % 2 == 1
        give(host.parameters(), grads)
        give(mover.parameters(), grads, watched if is_on_device else lambda g: g)
        expected = on_host.step()
        with looks_counted():  # a move back to the CPU reads
            decision = moving.step()
        assert_alike(decision, expected, rtol=rtol_of(make))
    with looks_counted():
        metrics, expected = moving.metrics(), on_host.metrics()
    assert metrics["clip/steps"] == 12
    for name, value in metrics.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, err_msg=name)


def test_a_move_to_a_device_reads_nothing():
    p = parameter(torch.tensor([3.0, 4.0]))
    clipper = QuantileClip([p], quantile=0.5)
    clipper.step()
    p.grad = watched(torch.tensor([6.0, 8.0]))
    with nothing_read():
        decision = clipper.step()
    assert unwatched(decision.threshold).tolist() == [5.0]
    assert unwatched(p.grad).tolist() == [3.0, 4.0]


def test_a_state_loads_on_the_cpu_and_on_a_device():
    host, device = model(), model()
    on_host = QuantileClip(host, history_length=5)
    on_device = QuantileClip(device, history_length=5)
    for grads in gradients(list(host.parameters()), steps=7):
        give(host.parameters(), grads)
        give(device.parameters(), grads, watched)
        on_host.step()
        on_device.step()
    swapped = (
        QuantileClip(host, history_length=5),
        QuantileClip(device, history_length=5),
    )
    give(device.parameters(), [None] * 6)
    with looks_counted():
        swapped[0].load_state_dict(on_device.state_dict())
    grads = next(gradients(list(host.parameters()), seed=2))
    give(device.parameters(), grads, watched)
    swapped[1].step()  # this moves it to the device
    swapped[1].load_state_dict(on_host.state_dict())
    give(host.parameters(), grads)
    expected = on_host.step()
    assert_alike(swapped[0].step(), expected)
    give(device.parameters(), grads, watched)
    with nothing_read():
        decision = swapped[1].step()
    assert_alike(decision, expected)


@pytest.mark.parametrize("make", [QuantileClip, StandardClip])
def test_a_full_history_is_refused_on_a_device_and_continues_on_the_cpu(make):
    """The error changes nothing, and the run continues on the CPU."""
    p = parameter(torch.tensor([3.0, 4.0]))
    clipper = make([p], history_length=None)
    for norm in (5.0, 10.0, 15.0):
        p.grad = torch.tensor([0.6 * norm, 0.8 * norm])
        clipper.step()
    before = clipper.threshold()
    p.grad = watched(torch.tensor([30.0, 40.0]))
    with pytest.raises(ValueError, match="history_length must be a number") as raised:
        clipper.step()
    for way_out in ("history_length=1000", "StreamingQuantile", "accelerators"):
        assert way_out in str(raised.value)
    assert unwatched(p.grad).tolist() == [30.0, 40.0]
    assert torch.equal(clipper.threshold(), before)
    assert clipper.metrics()["clip/steps"] == 3
    p.grad = torch.tensor([30.0, 40.0])
    assert clipper.step().clipped.tolist() == [True]


# Tensors without values.


@clippers_and_modes
def test_a_step_needs_no_value_and_no_copy_from_the_cpu(make, scope, nonfinite):
    """This holds from the first step: the constructor put the tables on the device."""
    m = model().to("meta")
    clipper = make(m, scope=scope, nonfinite=nonfinite)
    for missing in (None, 0, 2):
        for index, p in enumerate(m.parameters()):
            p.grad = None if index == missing else torch.empty_like(p)
        with nothing_read(), NoCopies():
            decision = clipper.step()
            clipper.state_dict()
        for field in decision:
            assert field.device.type == "meta"
            assert field.shape == (len(clipper.names),)


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_modes_that_read_fail_without_values(nonfinite):
    """The control of the test above."""
    m = model().to("meta")
    clipper = NormClip(m, max_norm=1.0, nonfinite=nonfinite)
    for p in m.parameters():
        p.grad = torch.empty_like(p)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta tensor"):
        clipper.step()


def test_the_constructor_refuses_a_full_history_on_a_device():
    with pytest.raises(ValueError, match="history_length must be a number"):
        QuantileClip(model().to("meta"), history_length=None)


def test_a_history_of_all_norms_is_refused_for_sharded_parameters():
    """Sharded parameters on the CPU also take the device path."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        sharded = torch.distributed.tensor.distribute_module(model(), mesh)
        with pytest.raises(ValueError, match=r"\(.*, sharded parameters\), got None"):
            QuantileClip(sharded, history_length=None)
    finally:
        torch.distributed.destroy_process_group()
