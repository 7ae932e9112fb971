"""The part of a tensor on this rank: a shard of a `DTensor`, or a whole tensor."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from autoclip_core.clipper.units import Units, split_shape, unit_count, unit_shape

from .layout import align_unit_scales, get_stored, get_unit_norms

_SAMPLED = 1024
"""So many values of a tensor are read to compare it."""


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a `DTensor`. That class takes a second to import."""
    is_plain = type(tensor) in (Tensor, Parameter)
    return not is_plain and hasattr(tensor, "device_mesh")


def get_local(tensor: Any) -> Tensor:
    """Return the local part of a tensor, as a view that may be written."""
    local: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return local


def read_values(tensor: Tensor) -> Tensor:
    """Return the first values of a tensor, or of its part on this rank."""
    return get_stored(get_local(tensor)).detach().reshape(-1)[:_SAMPLED]


def is_partial(tensor: Any) -> bool:
    """Return whether each rank holds a summand of the tensor, as for a norm layer."""
    return is_sharded(tensor) and any(p.is_partial() for p in tensor.placements)


def sum_partial(tensor: Any) -> Any:
    """Return the tensor with its pending sums computed; summands have no norm."""
    if not is_partial(tensor):
        return tensor
    from torch.distributed.tensor import Replicate

    summed = [Replicate() if p.is_partial() else p for p in tensor.placements]
    return tensor.redistribute(placements=summed)


def count_shards(tensor: Any) -> int:
    """Return the number of different parts of a sharded tensor."""
    sizes = enumerate(tensor.placements)
    return math.prod(
        tensor.device_mesh.size(i) for i, p in sizes if not p.is_replicate()
    )


def get_local_unit_norms(
    tensor: Tensor, local: Tensor, units: Units, dtype: torch.dtype, order: float
) -> Tensor:
    """Return the norm of the local part of each unit; 0 if no part is local.

    Args:
      tensor: its layout says which part is local.
      local: its local part, or other elements in its place.
      units, dtype, order: as in `get_unit_norms`.
    """
    if not is_sharded(tensor):
        return get_unit_norms(local, units, dtype, order).reshape(-1)
    if local.numel() == 0:
        return local.new_zeros(unit_count(tensor.shape, units), dtype=dtype)
    region = _find_region(tensor)
    if units.groups > 1:  # a shard may cut through a group: measure the whole shape
        whole = local.new_zeros(tensor.shape)
        whole[region] = local
        return get_unit_norms(whole, units, dtype, order).reshape(-1)
    grid = torch.zeros(
        unit_shape(tensor.shape, units), dtype=dtype, device=local.device
    )
    target = grid[_find_grid_region(region, units)]
    target.copy_(get_unit_norms(local, units, dtype, order).reshape(target.shape))
    return grid.reshape(-1)


def align_local_scales(
    tensor: Tensor, scales: Tensor, units: Units
) -> tuple[Tensor, Tensor]:
    """Return local elements and the scales of their units, in shapes that broadcast."""
    if not is_sharded(tensor):
        return align_unit_scales(tensor, scales, units)
    local, region = get_local(tensor), _find_region(tensor)
    grid = scales.reshape(unit_shape(tensor.shape, units))
    if units.groups == 1:
        return local, grid[_find_grid_region(region, units)]
    whole = grid.expand(split_shape(tensor.shape, units)).reshape(tensor.shape)
    return local, whole[region]


def _find_region(tensor: Any) -> tuple[slice, ...]:
    """Return which region of the whole tensor is local."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = tensor.device_mesh, tensor.placements
    shape, offset = compute_local_shape_and_global_offset(
        tensor.shape, mesh, placements
    )
    pairs = zip(offset, shape, strict=True)
    return tuple(slice(start, start + size) for start, size in pairs)


def _find_grid_region(region: tuple[slice, ...], units: Units) -> tuple[slice, ...]:
    """Return the part of a grid of units that belongs to a region of the tensor."""
    return tuple(
        slice(None) if axis in units.axes else part for axis, part in enumerate(region)
    )
