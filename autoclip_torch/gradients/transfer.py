"""Copy tensors from a device to the CPU, many in one transfer."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor


def read_arrays(tensors: list[Tensor]) -> list[Any]:
    """Return tensors of one device as NumPy arrays, in one transfer, as floats."""
    return _split(_join(tensors).cpu(), tensors)


def start_reading(tensors: list[Tensor]) -> Callable[[], list[Any]]:
    """Start the transfer of `read_arrays`, and return the function that ends it.

    This function does not wait for the device. The returned function waits until the
    device has completed the transfer, and for nothing that was queued later.
    """
    flat = _join(tensors)
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or accelerator.type != flat.device.type:
        return lambda: _split(flat.cpu(), tensors)
    copy = flat.to("cpu", non_blocking=True)  # in pinned memory
    event = torch.accelerator.current_stream(flat.device).record_event()

    def end_reading() -> list[Any]:
        event.synchronize()
        return _split(copy, tensors)

    return end_reading


def is_capturing(device: torch.device | None) -> bool:
    """Return whether a CUDA graph captures what is run on a device now."""
    is_cuda = device is not None and device.type == "cuda"
    return is_cuda and torch.cuda.is_current_stream_capturing()


def _join(tensors: list[Tensor]) -> Tensor:
    """Return the elements of tensors of one device in one vector."""
    # float64 holds every float32 and int32. On a device without float64, float32 holds
    # counts up to 2**24.
    wide = torch.float32 if tensors[0].device.type == "mps" else torch.float64
    return torch.cat([tensor.reshape(-1).to(wide) for tensor in tensors])


def _split(flat: Tensor, tensors: list[Tensor]) -> list[Any]:
    """Return the parts of a vector on the CPU, in the shapes of the tensors."""
    ends = np.cumsum([tensor.numel() for tensor in tensors])
    parts = np.split(flat.numpy(), ends[:-1])
    pairs = zip(parts, tensors, strict=True)
    return [part.reshape(tuple(tensor.shape)) for part, tensor in pairs]
