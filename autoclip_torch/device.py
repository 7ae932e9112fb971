"""On an accelerator nothing is read back: everything is selected where it lies."""

from typing import Any

import torch
from torch import Tensor

from .rows import Rows, Slot
from .values import norm_over, norms_in, select_, stored, unit_scales, writable


def norms(rows: Rows, tensors: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return on the device the norm of each row, and which rows have one.

    Squares are summed in float64, so that neither large nor small finite gradients lose
    their norm; on a device without float64, in float32.
    """
    wide = torch.float32 if device.type == "mps" else torch.float64
    absent = torch.zeros((), dtype=wide, device=device)
    yes = torch.ones((), dtype=torch.bool, device=device)
    # Slots stand in the order of their rows, and so do the keys.
    vectors: dict[int, list[Tensor]] = {slot.start: [] for slot in rows.slots}
    widths = {slot.start: slot.stop - slot.start for slot in rows.slots}
    for slot, tensor in zip(rows.slots, tensors, strict=True):
        if tensor is not None and slot.stop > slot.start:
            own = norms_in(tensor, slot.units, wide).to(device, non_blocking=True)
            vectors[slot.start].append(own.reshape(-1))
    found = [
        _combine(parts) if parts else absent.expand(widths[start])
        for start, parts in vectors.items()
    ]
    observed = [
        (yes if parts else ~yes).expand(widths[start])
        for start, parts in vectors.items()
    ]
    return torch.cat(found), torch.cat(observed)


def scale_(rows: Rows, gradients: Any, scales: Tensor) -> None:
    """Scale in place without reading a value back: select, where the scale is not 1."""
    for slot, gradient in zip(rows.slots, gradients, strict=True):
        if gradient is not None:
            own = scales[slot.start : slot.stop]
            scale_one_(slot, gradient, own.to(gradient.device, non_blocking=True))


def scale_one_(slot: Slot, gradient: Tensor, scales: Tensor) -> None:
    """Scale one gradient in place by the scales of its rows, on their device."""
    gradient = writable(slot, gradient)
    if slot.units is not None:
        select_(*unit_scales(gradient, scales, slot.units))
    else:
        select_(stored(gradient), scales.reshape(()))


def _combine(norms: list[Tensor]) -> Tensor:
    """Return the norm of a row that holds several tensors."""
    if len(norms) == 1:
        return norms[0]
    return norm_over(torch.stack(norms), (0,), norms[0].dtype)
