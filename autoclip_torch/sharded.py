"""Gradients in parts on many ranks: squared norms, one reduction, the part held here.

A `DTensor` (FSDP2, tensor parallel) is measured by its local part. The squares of all
rows are summed over the ranks in one vector, so every rank sees the same numbers and
decides alike. What several ranks hold a copy of is counted once.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autoclip_core.checks import message
from autoclip_core.units import Units, split_shape, unit_shape

from .device import scale_one_
from .gradients import Gradients
from .rows import Rows, Slot
from .values import norms_in, select_


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether it is a `DTensor`, without the second its import would take."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


@dataclass(frozen=True)
class Ranks:
    """The processes that hold parts of one model."""

    groups: tuple[Any, ...]
    """Those to add up over, one after the other."""
    process_group: Any
    """The ranks that hold different parameters, or None."""
    sharding: int
    """The number of ranks of all meshes; 1 without a DTensor."""
    copies: int
    """How many of the ranks added up hold one and the same plain tensor."""

    def sum_(self, vector: Tensor) -> None:
        """Add up the vectors of all ranks, in place; every rank must come here."""
        for group in self.groups:
            dist.all_reduce(vector, group=group)

    def weight(self, tensor: Tensor) -> float:
        """Return one over the number of ranks that hold the same part as this one."""
        if is_sharded(tensor):
            return _shards(tensor) / self.sharding
        return 1 / self.copies

    def __deepcopy__(self, memo: Any) -> "Ranks":
        """Stay the same: a group of processes has no copy."""
        return self


def find_ranks(parameters: Iterable[Tensor], process_group: Any) -> Ranks | None:
    """Return whom to add up norms with, or None where everything is here."""
    parameters = list(parameters)
    if any(getattr(parameter, "_fsdp_flattened", False) for parameter in parameters):
        raise ValueError(
            "parameters must not be those of FSDP1, which flattens them: each rank "
            "sees another part; use fully_shard (FSDP2), or let FSDP1 clip at the "
            "threshold() of a clipper made before wrapping, and observe() its norm"
        )
    tensors: Iterable[Any] = filter(is_sharded, parameters)
    meshes = list(dict.fromkeys(tensor.device_mesh for tensor in tensors))
    if not meshes:
        return process_group and Ranks((process_group,), process_group, 1, 1)
    mesh_group = _group_of(meshes)
    size = dist.get_world_size(mesh_group)
    if process_group is None:
        return Ranks((mesh_group,), None, size, size)
    return _among_shards(mesh_group, process_group)


def _among_shards(mesh_group: Any, process_group: Any) -> Ranks:
    """Return whom to add up with where some ranks hold different parameters, too."""
    sharing = set(dist.get_process_group_ranks(mesh_group))
    differing = set(dist.get_process_group_ranks(process_group))
    size = len(sharing)
    if sharing & differing == {dist.get_rank()}:  # stages, each of them sharded
        return Ranks((mesh_group, process_group), process_group, size, size)
    if differing <= sharing:  # experts, one or more per rank, beside what is sharded
        copies = size // len(differing)
        return Ranks((mesh_group,), process_group, size, copies)
    rule = "within the ranks of the sharded parameters, or share this one with them"
    way_out = "make one clipper of what is sharded, and another of the rest"
    got = f"ranks {sorted(differing)} beside shards on ranks {sorted(sharing)}"
    raise ValueError(message("process_group", rule, got, way_out))


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
      sequences: gradients, or gradients and parameters: one tensor per slot in each.
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
    for slot, gradient in zip(rows.slots, gradients, strict=True):
        if gradient is None:
            continue
        own = scales[slot.start : slot.stop].to(gradient.device, non_blocking=True)
        if not is_sharded(gradient):
            scale_one_(slot, gradient, own)
        elif slot.units is None:
            select_(_local(gradient), own.reshape(()))
        else:
            select_(_local(gradient), _own_scales(gradient, own, slot.units))


def _own_squares(
    rows: Rows, tensors: Gradients, device: torch.device, ranks: Ranks
) -> Tensor:
    """Return this rank's share of the squared norms, and what it observed."""
    wide = torch.float32 if device.type == "mps" else torch.float64
    share = torch.zeros(2, len(rows.names), dtype=wide, device=device)
    squares, observed = share
    for slot, tensor in zip(rows.slots, tensors, strict=True):
        if tensor is not None:
            tensor = _without_partial(tensor)
            own = _squares(slot, tensor, wide).to(device, non_blocking=True)
            squares[slot.start : slot.stop] += ranks.weight(tensor) * own
            observed[slot.start : slot.stop] = 1
    return share.reshape(-1)


def _squares(slot: Slot, tensor: Tensor, wide: torch.dtype) -> Tensor:
    """Return the squares of the part held here, one per row of the slot."""
    local, units = _local(tensor), slot.units
    if units is None or not is_sharded(tensor):
        return norms_in(local, units, wide).square().reshape(-1)
    if local.numel() == 0:
        return torch.zeros(slot.stop - slot.start, dtype=wide, device=local.device)
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


def _without_partial(tensor: Any) -> Any:
    """Return the tensor with its pending sums done: squares of summands do not add."""
    if not is_sharded(tensor) or not any(p.is_partial() for p in tensor.placements):
        return tensor
    from torch.distributed.tensor import Replicate

    done = [Replicate() if p.is_partial() else p for p in tensor.placements]
    return tensor.redistribute(placements=done)


def _shards(tensor: Any) -> int:
    """Return into how many different parts a tensor is cut."""
    if not is_sharded(tensor):
        return 1
    sizes = enumerate(tensor.placements)
    return math.prod(
        tensor.device_mesh.size(i) for i, p in sizes if not p.is_replicate()
    )


def _group_of(meshes: Sequence[Any]) -> Any:
    """Return a group of all ranks of the meshes, made only where there is none.

    Of several meshes each rank may hold others, as the rows and columns of a grid are:
    then it is the part of their common root that has the axes of all of them.
    """
    if len(meshes) > 1 and (part := _spanned(meshes)) is not None:
        meshes = [part]
    ranks = sorted({rank for mesh in meshes for rank in mesh.mesh.flatten().tolist()})
    if len(ranks) == dist.get_world_size():
        return dist.group.WORLD
    if len(meshes) == 1 and meshes[0].ndim == 1:
        return meshes[0].get_group()
    return dist.new_group(ranks, use_local_synchronization=True)


def _spanned(meshes: Sequence[Any]) -> Any:
    """Return the mesh over the named axes of all meshes, if they have one root."""
    roots = list(dict.fromkeys(map(_root, meshes)))
    names = {name for mesh in meshes for name in mesh.mesh_dim_names or ()}
    known = tuple(n for n in roots[0].mesh_dim_names or () if n in names)
    if len(roots) > 1 or not names or len(known) < len(names):
        return None
    return roots[0] if len(known) == roots[0].ndim else roots[0][known]


def _root(mesh: Any) -> Any:
    """Return the mesh that a mesh was cut out of; nothing public tells it."""
    if hasattr(mesh, "_get_root_mesh"):
        return mesh._get_root_mesh()
    from torch.distributed.device_mesh import _mesh_resources

    return _mesh_resources.get_root_mesh(mesh)
