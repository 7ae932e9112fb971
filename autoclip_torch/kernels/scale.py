"""Multiply many tensors by the scales of their rows, in one pass and a few launches.

A tensor whose scale is 1 is neither read nor written.
"""

import subprocess
import warnings
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .table import Piece, fills_its_memory, make_table

KINDS = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
"""The types that the kernel scales."""

BLOCK = 4096
"""The number of elements that a program holds at a time."""

# The widest load is of 16 bytes, and needs an address that is a multiple of it.
_WIDEST = 16

# What Triton raises without a C compiler, Python's headers or a supported device.
_COMPILE_ERRORS = (
    *(RuntimeError, OSError, subprocess.SubprocessError),
    triton.compiler.errors.TritonError,
)


def can_scale(tensor: Tensor) -> bool:
    """Return whether the kernel can scale a tensor in place."""
    is_plain = type(tensor) in (Tensor, torch.nn.Parameter)
    return (
        is_plain
        and tensor.dtype in KINDS
        and not tensor.is_neg()
        and fills_its_memory(tensor)
    )


def scale_(pairs: list[tuple[int, Tensor]], scales: Tensor) -> bool:
    """Multiply tensors by the scale of their row, in place; nothing is read back.

    The product is computed in float32 and rounded once. A scale of 0 writes 0, also
    where an element is not finite.

    Args:
      pairs: rows and their tensors, at least one, all of one device and type. The
        kernel `can_scale` them.
      scales: one per row.

    Returns:
      False if Triton cannot compile the kernel here. Nothing is scaled then.
    """
    tensors = [tensor for _, tensor in pairs]
    device, dtype = tensors[0].device, tensors[0].dtype
    with torch.cuda.device(tensors[0].get_device()):  # -1 on a CPU changes nothing
        if not _compiles(device, dtype):
            return False
        scales = scales.to(device, torch.float32, non_blocking=True).contiguous()
        stream = torch.cuda.current_stream().cuda_stream if device.type == "cuda" else 0
        pieces: dict[bool, list[Piece]] = {}
        for row, tensor in pairs:
            if size := tensor.numel():
                address = tensor.data_ptr()
                is_aligned = address % _WIDEST == 0
                pieces.setdefault(is_aligned, []).append((address, size, row))
        for is_aligned, batch in pieces.items():
            table = make_table(tuple(batch), dtype.itemsize, device, stream)
            _launch(table, scales, dtype, is_aligned)
    # Autograd then notices a gradient that a second derivative needs unscaled.
    torch.autograd.graph.increment_version(tensors)
    return True


@cache
def _compiles(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the kernel runs on a device: a launch that scales nothing."""
    table = torch.zeros((1, 3), dtype=torch.int64, device=device)
    try:
        _launch(table, torch.ones(1, device=device), dtype, True)
    except _COMPILE_ERRORS as error:
        warnings.warn(
            f"Triton cannot compile for {device}: {error}. Gradients of {dtype} are "
            "scaled by torch's operations, which write them in each step. Install a C "
            "compiler and Python's headers to use the kernel.",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def _launch(table: Tensor, scales: Tensor, dtype: torch.dtype, aligned: bool) -> None:
    """Start a program for each chunk of a table."""
    # Without a sum to fuse, `enable_fp_fusion` only silences a warning of Triton 3.9.
    _scale_chunk[(len(table),)](
        *(table, scales, KINDS[dtype], aligned, BLOCK),
        num_warps=8,
        enable_fp_fusion=False,
    )


def _scale_one_chunk(
    table: tl.tensor,
    scales: tl.tensor,
    KIND: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Scale one chunk: full blocks first, then the rest under a mask."""
    entry = table + 3 * tl.program_id(0)
    scale = tl.load(scales + tl.load(entry + 2))
    if scale != 1:  # also if it is NaN
        start = tl.load(entry).to(tl.pointer_type(KIND))
        size = tl.load(entry + 1)
        full = size // BLOCK * BLOCK
        offsets = tl.arange(0, BLOCK)
        for first in range(0, full, BLOCK):
            pointers = start + first + offsets
            if ALIGNED:
                pointers = tl.multiple_of(pointers, 16)
            values = tl.load(pointers).to(tl.float32)
            values = tl.where(scale == 0, 0.0, values * scale)  # 0 * inf is NaN
            tl.store(pointers, values.to(KIND))
        pointers = start + full + offsets
        is_inside = full + offsets < size
        values = tl.load(pointers, mask=is_inside).to(tl.float32)
        values = tl.where(scale == 0, 0.0, values * scale)
        tl.store(pointers, values.to(KIND), mask=is_inside)


_scale_chunk = triton.jit(_scale_one_chunk)
