"""Choose the tensors that a Triton kernel scales. The caller scales the others."""

import importlib.util
import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

Pair = tuple[int, Tensor]
"""A row, and a real tensor that belongs to it."""


def scale_by_kernel_(pairs: list[Pair], scales: Tensor) -> list[Pair]:
    """Scale tensors in place, by their rows, and return those that no kernel scales."""
    batches: dict[Any, list[Pair]] = {}
    for row, tensor in pairs:
        batches.setdefault((tensor.device, tensor.dtype), []).append((row, tensor))
    others: list[Pair] = []
    for (device, _), batch in batches.items():
        kernel = find_kernel(device)
        fitting = [pair for pair in batch if kernel and kernel.can_scale(pair[1])]
        if fitting and kernel.scale_(fitting, scales):
            batch = [pair for pair in batch if not kernel.can_scale(pair[1])]
        others += batch
    return others


def find_kernel(device: torch.device) -> Any:
    """Return the module that scales tensors of a device in one pass, or None.

    It is None while a CUDA graph is captured. A replay would copy the table of
    addresses again, from memory that has other contents by then.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return None
    return _import_kernel()


@cache
def _import_kernel() -> Any:
    """Return the module of the kernel; None without a Triton that can be imported."""
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        from . import scale  # Triton takes long to import
    except (ImportError, AttributeError, OSError) as error:  # broken, or another API
        warnings.warn(
            f"Triton cannot be used: {error}. Gradients are scaled by torch's "
            "operations, which write them in each step. Install the Triton that this "
            "version of torch needs.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return scale
