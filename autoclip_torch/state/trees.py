"""States as trees: named tuples of arrays, on the host or on a device."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoclip_core.history.full import widen


def leaves(state: Any) -> list[Any]:
    """Return the arrays of a state, or of a list of states."""
    if isinstance(state, tuple | list):
        return [leaf for part in state for leaf in leaves(part)]
    return [state]


def moved(state: Any, device: torch.device | None) -> Any:
    """Return a copy of a state on a device; None is the host, as NumPy arrays."""
    if isinstance(state, tuple):
        return type(state)(*(moved(part, device) for part in state))
    if device is None:
        return torch.as_tensor(state).detach().cpu().numpy().copy()
    return torch.as_tensor(state).to(device, copy=True)


def overlaid(old: Any, new: Any, xp: Any) -> Any:
    """Return a larger state whose first rows are those of the old one."""
    if isinstance(new, tuple):
        pairs = zip(old, new, strict=True)
        return type(new)(*(overlaid(o, n, xp) for o, n in pairs))
    return xp.concatenate([old, widen(new, old)[len(old) :]])


def read(tensors: list[Tensor]) -> list[Any]:
    """Return tensors of one device as NumPy arrays, in one transfer, as floats."""
    # float32 and int32 fit into float64 (and on a device without it, counts up to 2**24
    # into float32).
    wide = torch.float32 if tensors[0].device.type == "mps" else torch.float64
    flat = torch.cat([tensor.reshape(-1).to(wide) for tensor in tensors])
    ends = np.cumsum([tensor.numel() for tensor in tensors])
    parts = np.split(flat.cpu().numpy(), ends[:-1])
    pairs = zip(parts, tensors, strict=True)
    return [part.reshape(tuple(tensor.shape)) for part, tensor in pairs]
