"""Gradients in parts on many ranks: squared norms, one reduction, the part held here.

A `DTensor` (FSDP2, tensor parallel) is measured by its local part. The squares of all
rows are summed over the ranks in one vector, so every rank sees the same numbers and
decides alike. What several ranks hold a copy of is counted once.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from autoclip_core.clipper.units import Units, split_shape, unit_count, unit_shape
from autoclip_torch.rows.rows import Rows

from .device import combined, scale_whole_, whole_norms, wide_type
from .layout import norms_in, select_, unit_scales, writable
from .measure import Gradients
from .ranks import Ranks, is_sharded


def measure(
    rows: Rows,
    sequences: Sequence[Gradients],
    device: torch.device | None,
    ranks: Ranks,
    overflow: Tensor | None = None,
) -> list[tuple[Any, Any]]:
    """Return norms and which rows have one, of each sequence, in one reduction.

    Args:
      rows: which tensor belongs to which row.
      sequences: gradients, or gradients and parameters: one tensor per entry in each.
      device: where the norms are wanted; None is the host, as NumPy arrays.
      ranks: whom to add up with.
      overflow: not 0 where this rank's gradients overflowed; it becomes 1 where those
        of any rank did, and what overflowed on one of them is observed on none.
    """
    where = torch.device("cpu") if device is None else device
    parts = [_own_squares(rows, tensors, where, ranks) for tensors in sequences]
    # All ranks send as much, whether they have a loss scale or not.
    own = parts[0].new_zeros(()) if overflow is None else overflow.to(parts[0])
    vector = torch.cat([*parts, own.reshape(1)])
    ranks.sum_(vector)
    if overflow is not None:
        overflow.copy_(vector[-1] != 0)  # fused kernels know 1, and no other number
    found = []
    for squares, count in vector[:-1].view(len(sequences), 2, -1):
        norms, observed = squares.sqrt(), (count > 0) & (vector[-1] == 0)
        found.append(
            (norms.numpy(), observed.numpy()) if device is None else (norms, observed)
        )
    return found


def scale_(rows: Rows, gradients: Gradients, scales: Any) -> None:
    """Scale the parts of the gradients that are here, in place."""
    scales = torch.as_tensor(scales)
    whole: dict[int, list[Tensor]] = {}
    for entry, gradient in zip(rows.by_parameter, gradients, strict=True):
        if gradient is None:
            continue
        if not is_sharded(gradient):
            gradient = writable(entry, gradient)
        local = _local(gradient)
        if entry.units is None:
            whole.setdefault(entry.start, []).append(local)
            continue
        own = scales[entry.start : entry.stop].to(local.device)
        if is_sharded(gradient):
            select_(local, _own_scales(gradient, own, entry.units))
        else:
            select_(*unit_scales(local, own, entry.units))
    scale_whole_(whole, scales)


def _own_squares(
    rows: Rows, tensors: Gradients, device: torch.device, ranks: Ranks
) -> Tensor:
    """Return this rank's share of the squared norms, and what it observed."""
    wide = wide_type(device)
    share = torch.zeros(2, len(rows.names), dtype=wide, device=device)
    squares, observed = share
    whole: dict[tuple[int, float], list[Tensor]] = {}
    for entry, tensor in zip(rows.by_parameter, tensors, strict=True):
        if tensor is None:
            continue
        tensor = without_partial(tensor)
        weight = ranks.weight(tensor)
        if entry.units is None:
            whole.setdefault((entry.start, weight), []).append(_local(tensor))
            continue
        own = _squares(tensor, entry.units, wide).to(device, non_blocking=True)
        squares[entry.start : entry.stop] += weight * own
        observed[entry.start : entry.stop] = 1
    for (row, weight), parts in whole.items():
        norms = [norm.to(device) for norm in whole_norms(parts, wide)]
        squares[row] += weight * combined(norms).square()
        observed[row] = 1
    return share.reshape(-1)


def _squares(tensor: Tensor, units: Units, wide: torch.dtype) -> Tensor:
    """Return the squares of the part held here, one per unit."""
    local = _local(tensor)
    if not is_sharded(tensor):
        return norms_in(local, units, wide).square().reshape(-1)
    if local.numel() == 0:
        return local.new_zeros(unit_count(tensor.shape, units), dtype=wide)
    region = _region(tensor)
    if units.groups > 1:  # groups may be cut across: measured in the frame of the whole
        whole = local.new_zeros(tensor.shape)
        whole[region] = local
        return norms_in(whole, units, wide).square().reshape(-1)
    grid = torch.zeros(unit_shape(tensor.shape, units), dtype=wide, device=local.device)
    place = grid[_along(region, units)]
    place.copy_(norms_in(local, units, wide).square().reshape(place.shape))
    return grid.reshape(-1)


def _own_scales(gradient: Tensor, scales: Tensor, units: Units) -> Tensor:
    """Return the units' scales, in a shape that broadcasts against the local part."""
    grid, region = scales.reshape(unit_shape(gradient.shape, units)), _region(gradient)
    if units.groups == 1:
        return grid[_along(region, units)]
    whole = grid.expand(split_shape(gradient.shape, units)).reshape(gradient.shape)
    return whole[region]


def _along(region: tuple[slice, ...], units: Units) -> tuple[slice, ...]:
    """Return the region of a grid of units that a region of the tensor belongs to."""
    return tuple(
        slice(None) if axis in units.axes else part for axis, part in enumerate(region)
    )


def _local(tensor: Any) -> Tensor:
    """Return the part of a tensor that is here; writing to it writes to the tensor."""
    local: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return local


def _region(tensor: Any) -> tuple[slice, ...]:
    """Return which part of the whole tensor is here."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = tensor.device_mesh, tensor.placements
    shape, offset = compute_local_shape_and_global_offset(
        tensor.shape, mesh, placements
    )
    pairs = zip(offset, shape, strict=True)
    return tuple(slice(start, start + size) for start, size in pairs)


def is_partial(tensor: Any) -> bool:
    """Tell whether each rank holds summands of the tensor, as of a layer's norm."""
    return is_sharded(tensor) and any(p.is_partial() for p in tensor.placements)


def without_partial(tensor: Any) -> Any:
    """Return the tensor with its pending sums done: squares of summands do not add."""
    if not is_partial(tensor):
        return tensor
    from torch.distributed.tensor import Replicate

    done = [Replicate() if p.is_partial() else p for p in tensor.placements]
    return tensor.redistribute(placements=done)
