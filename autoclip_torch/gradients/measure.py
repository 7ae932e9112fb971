"""The two verbs: the norm of these gradients, and these gradients times this.

Both come twice, in `host.py` and in `device.py`: what is fast where numbers may be
looked at would wait for an accelerator in every line.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoclip_torch.rows.rows import ParameterRows, Rows

from . import device as on_device
from . import host

Gradients = Iterable[Tensor | None]
"""One tensor per entry of the rows; None where a parameter has no gradient."""


def on_host(tensors: Gradients) -> bool:
    """Tell whether all are plain tensors on the CPU, which NumPy can view."""
    plain = (Tensor, torch.nn.Parameter)
    return all(t is None or (t.is_cpu and type(t) in plain) for t in tensors)


def measure(
    rows: Rows, tensors: Gradients, device: torch.device | None
) -> tuple[Any, Any]:
    """Return the norm of each row, and which rows have one.

    Args:
      rows: which tensor belongs to which row.
      tensors: one per entry: gradients, or parameters.
      device: where the norms are wanted; None is the host, as NumPy arrays.
    """
    if device is None:
        return host.norms(rows, tensors)
    return on_device.norms(rows, tensors, device)


def scale_(rows: Rows, gradients: Gradients, scales: Any) -> None:
    """Scale gradients in place.

    Args:
      rows: which gradient belongs to which row.
      gradients: one per entry.
      scales: float32, one per row, NumPy or torch; 1 leaves a gradient's bits alone, 0
        sets it to 0, whatever it holds.
    """
    if isinstance(scales, np.ndarray):
        host.scale_(rows, gradients, scales)
    else:
        on_device.scale_(rows, gradients, scales)


def give_each_its_own(
    entries: Sequence[ParameterRows], gradients: list[Tensor | None]
) -> list[Tensor | None]:
    """Return gradients of which a shared one was copied: it would be scaled twice."""
    present = [id(gradient) for gradient in gradients if gradient is not None]
    if len(set(present)) == len(present):
        return gradients
    seen: set[int] = set()
    for entry, gradient in zip(entries, gradients, strict=True):
        if gradient is not None and id(gradient) in seen:
            entry.parameter.grad = gradient.clone()
        seen.add(id(gradient))
    return [entry.parameter.grad for entry in entries]
