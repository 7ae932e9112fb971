"""Copy, move, extend and read policy states: nested named tuples of arrays."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoclip_core.history.full import widen


def list_arrays(state: Any) -> list[Any]:
    """Return the arrays of a state, or of a list of states."""
    if isinstance(state, tuple | list):
        return [array for part in state for array in list_arrays(part)]
    return [state]


def move(state: Any, device: torch.device | None) -> Any:
    """Return a copy of a state on a device, or as NumPy arrays (None)."""
    if isinstance(state, tuple):
        return type(state)(*(move(part, device) for part in state))
    if device is None:
        return torch.as_tensor(state).detach().cpu().numpy().copy()
    return torch.as_tensor(state).to(device, copy=True)


def store(new: Any, old: Any, device: torch.device | None) -> Any:
    """Return the new state; on a device, in the memory of the old one.

    A captured CUDA graph always writes to the same memory.
    """
    if device is None:
        return new
    if memory := list_arrays(old):
        torch._foreach_copy_(memory, list_arrays(new))
    return old


def replace_first_rows(old: Any, new: Any, xp: Any) -> Any:
    """Return a larger state whose first rows are the rows of the old state."""
    if isinstance(new, tuple):
        pairs = zip(old, new, strict=True)
        return type(new)(*(replace_first_rows(o, n, xp) for o, n in pairs))
    return xp.concatenate([old, widen(new, old)[len(old) :]])


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
