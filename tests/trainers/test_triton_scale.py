"""The Triton kernel that scales many tensors, in Triton's interpreter on the CPU.

The interpreter runs the kernel with NumPy. A GPU's compiler, which needs no GPU, shows
what the interpreter cannot: that the kernel compiles, how wide it loads, how it rounds.
"""

import importlib
import sys

import numpy as np
import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import interpreter

from autoclip_torch import NormClip
from autoclip_torch.gradients import device
from autoclip_torch.kernels import choose
from autoclip_torch.kernels.table import CHUNK, make_table

from ..support.torch_device import NoKernelReads, Watched, watched
from ..support.torch_gradients import (
    GRADIENTS,
    assert_same_bits,
    normal,
    numbers,
    odd_numbers,
    parameter,
    scaled,
    true_norms,
)

CPU, NAN, INF = torch.device("cpu"), float("nan"), float("inf")
TYPES = [torch.float32, torch.bfloat16, torch.float16]
NAME = "autoclip_torch.kernels.scale"


@pytest.fixture(scope="module")
def interpreted():
    """The module of the kernel, imported so that Triton interprets the kernel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        sys.modules.pop(NAME, None)
        return importlib.import_module(NAME)


@pytest.fixture
def kernel(interpreted, monkeypatch):
    """The same module, which now scales the tensors of the CPU."""
    convert = interpreter._convert_float
    narrow, wide = triton.language.bfloat16, triton.language.float32

    def convert_exactly(values, kind, new, mode):
        # The interpreter truncates to bfloat16, and loses subnormal numbers of it. The
        # last test shows that a GPU rounds.
        bits = torch.from_numpy(np.ascontiguousarray(values).copy())
        if (kind, new) == (wide, narrow):
            return bits.bfloat16().view(torch.int16).numpy().view(np.uint16)
        if (kind, new) == (narrow, wide):
            return bits.view(torch.bfloat16).float().numpy().view(np.uint32)
        return convert(values, kind, new, mode)

    monkeypatch.setattr(interpreter, "_convert_float", convert_exactly)
    monkeypatch.setattr(choose, "find_kernel", lambda _: interpreted)
    monkeypatch.setattr(device, "choose_device", lambda _: CPU)
    interpreted._compiles.cache_clear()
    make_table.cache_clear()
    with np.errstate(all="ignore"):
        yield interpreted


class Traffic:
    """The bytes that the kernel loads and stores, and the launches."""

    def __init__(self, kernel, monkeypatch):
        self.clear()
        builder = interpreter.InterpreterBuilder
        for name in ("create_masked_load", "create_masked_store"):
            monkeypatch.setattr(builder, name, self.counted(name, builder))
        launch = kernel._launch

        def counted_launch(table, *others):
            # A GPU fails if it loads 16 bytes from another address.
            is_aligned = others[-1]
            assert not (is_aligned and (table[:, 0] % 16).any())
            self.launches += 1
            launch(table, *others)

        monkeypatch.setattr(kernel, "_launch", counted_launch)

    def clear(self):
        self.bytes = {"create_masked_load": 0, "create_masked_store": 0}
        self.launches = 0

    def counted(self, name, builder):
        method = getattr(builder, name)

        def count(builder, pointers, *others):
            mask = others[0] if name.endswith("load") else others[1]
            width = pointers.get_element_ty().primitive_bitwidth // 8
            self.bytes[name] += width * int(mask.data.sum())
            return method(builder, pointers, *others)

        return count


@pytest.fixture
def traffic(kernel, monkeypatch):
    return Traffic(kernel, monkeypatch)


# Values.


@pytest.mark.parametrize("scope", ["parameter", "global"])
def test_every_kind_of_gradient_is_scaled_as_on_the_cpu(kernel, scope):
    for name, make in GRADIENTS.items():
        gradient = make()
        dense = gradient.to_dense().clone()
        norms = true_norms(numbers(gradient), scope)
        limit = float(np.float32(0.6 * norms.max(initial=0))) or 1.0
        p = parameter(gradient)
        decision = NormClip([p], max_norm=limit, scope=scope).step()
        assert decision.clipped.tolist() == (norms > limit).tolist(), name
        fields = decision.scale.numpy(), decision.clipped.numpy()
        after, expected = p.grad.to_dense(), scaled(dense, *fields)
        if gradient.is_sparse:  # its duplicates are added after they are rounded
            torch.testing.assert_close(after, expected, msg=name)
        elif gradient.is_complex():
            torch.testing.assert_close(after, expected, rtol=0, atol=0, msg=name)
        else:
            assert_same_bits(after, expected)


def at_any_address(values):
    """Yield copies of values, one of them at a multiple of 16 bytes."""
    for offset in (0, 1, 2):
        memory = torch.zeros(len(values) + offset, dtype=values.dtype)
        yield memory[offset:].copy_(values)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_scale_and_number_in_whole_chunks_and_parts(kernel, dtype):
    """Scales of 1 change no bit, 0 writes 0 over everything, others round once."""
    odd = torch.cat([odd_numbers(dtype), torch.tensor([NAN, INF, -INF]).to(dtype)])
    originals = [
        torch.cat([normal(size, dtype=dtype), odd]) for size in (0, 4096, CHUNK)
    ]
    scales = torch.tensor([1.0, 0.0, -0.0, 0.3, 1 - 2**-24, NAN, 1e-30])
    tensors = {
        row: [copy for values in originals for copy in at_any_address(values)]
        for row in range(len(scales))
    }
    device.scale_whole_(tensors, scales)
    for row, scale in enumerate(scales):
        for index, tensor in enumerate(tensors[row]):
            original = originals[index // 3]
            if scale == 1:
                assert_same_bits(tensor, original)
                continue
            product = (original.float() * scale).to(dtype)
            expected = torch.zeros_like(product) if scale == 0 else product
            assert torch.equal(tensor.isnan(), expected.isnan())
            assert_same_bits(tensor.nan_to_num(7.0), expected.nan_to_num(7.0))


def test_no_number_outside_a_tensor_is_written(traffic):
    memory = torch.ones(3 * CHUNK + 50)
    parts = memory[7 : 2 * CHUNK + 12], memory[2 * CHUNK + 20 : 3 * CHUNK]
    expected = memory.clone()
    for start, end in ((7, 2 * CHUNK + 12), (2 * CHUNK + 20, 3 * CHUNK)):
        expected[start:end] = 0.5
    device.scale_whole_({0: list(parts)}, torch.tensor([0.5]))
    assert torch.equal(memory, expected)
    assert traffic.launches == 3  # the first one scales nothing


# Passes and launches.


def make_model(dtype, count):
    """Return parameters whose gradients have the norm 2, one longer than a chunk."""
    sizes = [CHUNK + 8] + [16] * (count - 1)
    gradients = [torch.zeros(size, dtype=dtype) for size in sizes]
    for gradient in gradients:
        gradient[-1] = 2.0
    return [parameter(gradient) for gradient in gradients]


@pytest.mark.parametrize("scope", ["parameter", "global"])
@pytest.mark.parametrize("count", [2, 40])
def test_a_step_that_clips_nothing_writes_nothing(traffic, scope, count):
    parameters = [p for dtype in TYPES for p in make_model(dtype, count)]
    size = sum(p.numel() * p.dtype.itemsize for p in parameters)
    chunks = len(parameters) + len(TYPES)
    tables = chunks * (8 + 8 + 4 + 8)  # an address, a row, a scale and a length
    clipper = NormClip(parameters, max_norm=1e6, scope=scope)
    clipper.step()
    traffic.clear()
    assert not clipper.step().clipped.any()
    assert traffic.launches == len(TYPES)
    assert traffic.bytes["create_masked_store"] == 0
    assert traffic.bytes["create_masked_load"] == chunks * (8 + 4)
    clipper = NormClip(parameters, max_norm=1.0, scope=scope)
    traffic.clear()
    assert clipper.step().clipped.all()
    assert traffic.launches == len(TYPES)
    assert traffic.bytes["create_masked_store"] == size
    assert traffic.bytes["create_masked_load"] == size + tables


def test_only_the_clipped_rows_are_written(traffic):
    parameters = make_model(torch.float32, 3)
    parameters[1].grad.mul_(100)
    traffic.clear()
    decision = NormClip(parameters, max_norm=10.0, scope="parameter").step()
    assert decision.clipped.tolist() == [False, True, False]
    assert traffic.bytes["create_masked_store"] == 4 * 16


def test_gradients_that_keep_their_memory_need_one_table(kernel):
    parameters = make_model(torch.float32, 4)
    clipper = NormClip(parameters, max_norm=1.0)
    for step in range(3):
        clipper.step()
        assert make_table.cache_info().misses == 1, step
    for p in parameters:
        p.grad = p.grad.clone()
    clipper.step()
    assert make_table.cache_info().misses == 2


def test_nothing_is_read_back(kernel, monkeypatch):
    """The interpreter reads what a GPU would, so here nothing is launched."""
    monkeypatch.setattr(kernel, "_launch", lambda *_: None)
    with NoKernelReads():
        others = choose.scale_by_kernel_([(0, torch.ones(5))], torch.tensor([0.5]))
    assert others == []


def test_autograd_notices_that_a_gradient_was_scaled(kernel):
    x = torch.tensor([3.0], requires_grad=True)
    saved = torch.ones(1)
    y = x * saved
    device.scale_whole_({0: [saved]}, torch.tensor([0.5]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


# What the kernel does not scale.


def test_other_tensors_are_left_to_the_operations_of_torch(kernel):
    left_out = {
        name
        for name, make in GRADIENTS.items()
        if not kernel.can_scale(device.as_real(make()))
    }
    wide = {name for name in GRADIENTS if "64" in name and name != "complex64"}
    assert left_out == wide | {
        *("complex128", "strided", "expanded", "broadcast scalar", "negated view"),
    }
    assert not kernel.can_scale(watched(torch.ones(2)))
    assert type(watched(torch.ones(2))) is Watched


def test_where_there_is_a_kernel(interpreted, monkeypatch):
    cuda = torch.device("cuda", 0)
    is_capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: is_capturing)
    choose._import_kernel.cache_clear()
    assert choose.find_kernel(CPU) is None
    assert choose.find_kernel(cuda) is interpreted
    is_capturing = True
    assert choose.find_kernel(cuda) is None
    is_capturing = False
    choose._import_kernel.cache_clear()
    monkeypatch.setattr(choose.importlib.util, "find_spec", lambda _: None)
    assert choose.find_kernel(cuda) is None
    choose._import_kernel.cache_clear()


BROKEN = {
    "an import that fails": "raise ImportError('undefined symbol')",
    "another API": "from types import SimpleNamespace as language; jit = id",
}


@pytest.mark.parametrize("code", BROKEN.values(), ids=BROKEN)
def test_a_triton_that_cannot_be_used_is_a_warning(code, tmp_path, monkeypatch):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(code, "utf-8")
    (tmp_path / "triton" / "language.py").write_text("", "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, NAME)
    monkeypatch.delattr(sys.modules["autoclip_torch.kernels"], "scale")
    choose._import_kernel.cache_clear()
    with pytest.warns(RuntimeWarning, match="Triton cannot be used: "):
        assert choose._import_kernel() is None
    choose._import_kernel.cache_clear()


def test_compiled_code_keeps_the_operations_of_torch(traffic, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    gradient = torch.ones(3)
    device.scale_whole_({0: [gradient]}, torch.tensor([0.5]))
    assert gradient.tolist() == [0.5] * 3
    assert traffic.launches == 0


def test_without_a_compiler_the_operations_of_torch_scale(kernel, monkeypatch):
    def fail(*_):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(kernel, "_launch", fail)
    gradient = torch.tensor([1.0, NAN])
    with pytest.warns(RuntimeWarning, match="cannot compile for cpu: Failed to find"):
        device.scale_whole_({0: [gradient]}, torch.tensor([0.0]))
    assert gradient.tolist() == [0.0, 0.0]
    device.scale_whole_({0: [gradient.fill_(1)]}, torch.tensor([0.5]))  # no warning
    assert gradient.tolist() == [0.5, 0.5]
    kernel._compiles.cache_clear()


# What a GPU runs.


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_code_for_a_gpu(interpreted, dtype, monkeypatch, tmp_path):
    """Aligned chunks are read 16 bytes at a time; half precision is rounded once."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    signature = {"table": "*i64", "scales": "*fp32"}
    signature |= dict.fromkeys(("KIND", "ALIGNED", "BLOCK"), "constexpr")
    for is_aligned in (True, False):
        constants = {"KIND": interpreted.KINDS[dtype], "ALIGNED": is_aligned}
        source = ASTSource(
            triton.JITFunction(interpreted._scale_one_chunk),
            signature,
            constants | {"BLOCK": interpreted.BLOCK},
        )
        target = GPUTarget("cuda", 80, 32)
        options = {"num_warps": 8, "enable_fp_fusion": False}
        code = triton.compile(source, target=target, options=options).asm["ptx"]
        assert ("ld.global.v4.b32" in code) == is_aligned
        assert ("st.global.v4.b32" in code) == is_aligned
        assert ".ftz" not in code
        kinds = {torch.bfloat16: "bf16", torch.float16: "f16"}
        if dtype in kinds:
            assert f"cvt.rn.{kinds[dtype]}" in code
            assert f"cvt.rz.{kinds[dtype]}" not in code
