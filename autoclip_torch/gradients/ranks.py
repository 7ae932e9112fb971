"""Which ranks hold parts of a model, which hold copies, and whom to add up with."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autoclip_core.checks import format_error


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

    def check_rows(self, rows: int, device: torch.device) -> None:
        """Raise on every rank if those with different parameters differ in rows.

        Raises:
          ValueError: they do, and adding up their vectors would abort the process.
        """
        extremes = torch.tensor([rows, -rows], device=device)
        for group in self.groups:
            dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
        most, least = extremes.tolist()
        if most != -least:
            raise ValueError(
                f"process_group must be of ranks with equally many rows, got {rows} on "
                f'this one and {-least} to {most} on all; set scope="global", or leave '
                "process_group out"
            )

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
    raise ValueError(format_error("process_group", rule, got, way_out))


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
