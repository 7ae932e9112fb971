"""Copy and move policy states: nested named tuples of arrays."""

from typing import Any

import torch


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
