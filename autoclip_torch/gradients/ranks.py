"""Which ranks hold parts of a model, which hold copies, and which sum norms."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autoclip_core.checks import format_error
from autoclip_torch.rows.flat_parts import refuse_fsdp1
from autoclip_torch.rows.rows import Rows

from .dtensor import count_shards, is_sharded
from .step_counter import StepCounter


@dataclass
class Ranks:
    """The processes that hold parts of one model."""

    groups: tuple[Any, ...]
    """The process groups to sum over, one after the other."""
    process_group: Any
    """The ranks that hold different parameters, or None."""
    counter: StepCounter
    """The number of steps, to compare with the other ranks."""
    sharding: int = 1
    """The number of ranks of all meshes; 1 without a DTensor."""
    copies: int = 1
    """How many of the ranks in a sum hold the same plain tensor."""
    device: torch.device | None = None
    """The device of the mesh, on which its ranks communicate; None without a mesh."""
    has_checked_rows: bool = False
    """Whether `check_rows` has run."""
    rows_before: Rows | None = None
    """The rows of the last reduction, if their number has changed since."""

    def reduce(self, vector: Tensor, *, take_largest: bool, reason: str) -> Tensor:
        """Return the sum of the vectors of all ranks, or their largest entries.

        The ranks communicate on the device of their mesh: with CPU offload, the shards
        are on the CPU, and the backend of the mesh may not be.

        Args:
          vector: this rank's vector; every rank must call this.
          take_largest: whether to take the largest entries.
          reason: as in `StepCounter.reduce`.

        Raises:
          RuntimeError: the ranks are not in the same step.
        """
        operation = dist.ReduceOp.MAX if take_largest else dist.ReduceOp.SUM
        sent = vector.to(find_device(self.groups, self.device, vector.device))
        reduced = self.counter.reduce(
            sent, self.groups, reason=reason, operation=operation
        )
        return reduced.to(vector.device)

    def average(self, vector: Tensor) -> Tensor:
        """Return the mean of the vectors of all ranks; every rank must call this."""
        sent = vector.to(find_device(self.groups, self.device, vector.device))
        return self.counter.average(sent, self.groups).to(vector.device)

    def check_rows(self, rows: int, device: torch.device) -> None:
        """Check that ranks with different parameters have equally many rows.

        Raises:
          ValueError: the numbers of rows differ; every rank raises this. A sum of
            vectors of different lengths would abort the process.
        """
        device = find_device(self.groups, self.device, device)
        extremes = torch.tensor([rows, -rows], device=device)
        for group in self.groups:
            dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
        most, least = extremes.tolist()
        if most != -least:
            raise ValueError(
                f"process_group must have ranks with equally many rows, got {rows} on "
                f'this rank and {-least} to {most} on all; set scope="global", or '
                "leave process_group out"
            )
        self.has_checked_rows = True

    def continue_from(self, before: "Ranks", rows: Rows, count: int) -> None:
        """Continue the checks of earlier ranks; there are `count` rows now."""
        self.has_checked_rows = before.has_checked_rows
        earlier = before.rows_before or rows
        if before.counter.has_reduced and len(earlier.names) != count:
            self.rows_before = earlier

    def get_weight(self, tensor: Tensor, is_replicated: bool | None) -> float:
        """Return 1 / n, if n ranks hold the same part of the tensor as this rank."""
        if is_sharded(tensor):
            return count_shards(tensor) / self.sharding
        if is_replicated:
            return 1 / math.prod(map(dist.get_world_size, self.groups))
        return 1 / self.copies

    def __deepcopy__(self, memo: Any) -> "Ranks":
        """Return the same object: a group of processes cannot be copied."""
        return self


def find_device(
    groups: Sequence[Any], device: torch.device | None, own: torch.device
) -> torch.device:
    """Return the device on which ranks communicate.

    Args:
      groups: their process groups.
      device: the device of their mesh, or None.
      own: the device of the tensors; it is used without a mesh, if a backend allows it.
    """
    if device is not None:
        return own if own.type == device.type else device
    supported = [*getattr(groups[0], "_device_types", ())]
    is_possible = not supported or any(each.type == own.type for each in supported)
    return own if is_possible else torch.device(supported[0])


def check_process_group(process_group: Any) -> None:
    """Refuse a `process_group` that is not one.

    Raises:
      TypeError: it is neither None nor a process group of this rank.
    """
    if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            "process_group must be a torch.distributed.ProcessGroup with this rank in "
            f"it, got {process_group!r}; make it with torch.distributed.new_group"
        )


def find_ranks(
    rows: Rows, process_group: Any, before: Ranks | None = None
) -> Ranks | None:
    """Return the ranks that sum norms, or None if this rank holds everything.

    Args:
      rows: the parameters of this rank.
      process_group: the ranks that hold different parameters, or None.
      before: the ranks of fewer parameters, whose count of steps is continued.

    Raises:
      TypeError: as `check_process_group`.
      ValueError: as `refuse_fsdp1`; or the groups overlap in a way in which copies
        cannot be counted.
    """
    check_process_group(process_group)
    parameters = rows.parameters
    refuse_fsdp1(parameters)
    tensors: Iterable[Any] = filter(is_sharded, parameters)
    meshes = list(dict.fromkeys(tensor.device_mesh for tensor in tensors))
    if not meshes and process_group is None:
        return None
    counter = StepCounter() if before is None else before.counter
    counter.parameters = parameters
    if not meshes:
        return Ranks((process_group,), process_group, counter)
    counter.checks_updates = True
    mesh_group, device = _find_group(meshes), torch.device(meshes[0].device_type)
    size = dist.get_world_size(mesh_group)
    groups, copies = (mesh_group,), size
    if process_group is not None:
        groups, copies = _join_groups(mesh_group, process_group)
    return Ranks(groups, process_group, counter, size, copies, device)


def has_other_ranks() -> bool:
    """Return whether this process is one of several ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _join_groups(mesh_group: Any, process_group: Any) -> tuple[tuple[Any, ...], int]:
    """Return the groups to sum over, and how many ranks hold the same plain tensor."""
    sharing = set(dist.get_process_group_ranks(mesh_group))
    differing = set(dist.get_process_group_ranks(process_group))
    size = len(sharing)
    if sharing & differing == {dist.get_rank()}:  # sharded stages
        return (mesh_group, process_group), size
    if differing <= sharing:  # experts on each rank, and sharded parameters
        return (mesh_group,), size // len(differing)
    rule = "within the ranks of the sharded parameters, or share this one with them"
    way_out = "make one clipper of the sharded parameters, and one of the plain ones"
    got = f"ranks {sorted(differing)} and shards on ranks {sorted(sharing)}"
    raise ValueError(format_error("process_group", rule, got, way_out))


def _find_group(meshes: Sequence[Any]) -> Any:
    """Return a group of all ranks of the meshes; a new one only if none exists.

    With several meshes, such as the rows and columns of a grid, each rank may be in
    others. The group is then the part of their root mesh that has all their axes.
    """
    if len(meshes) > 1 and (part := _find_common_mesh(meshes)) is not None:
        meshes = [part]
    ranks = sorted({rank for mesh in meshes for rank in mesh.mesh.flatten().tolist()})
    if len(ranks) == dist.get_world_size():
        return dist.group.WORLD
    if len(meshes) == 1 and meshes[0].ndim == 1:
        return meshes[0].get_group()
    return dist.new_group(ranks, use_local_synchronization=True)


def _find_common_mesh(meshes: Sequence[Any]) -> Any:
    """Return the mesh over the named axes of all meshes, if they share a root."""
    roots = list(dict.fromkeys(map(_find_root, meshes)))
    names = {name for mesh in meshes for name in mesh.mesh_dim_names or ()}
    known = tuple(n for n in roots[0].mesh_dim_names or () if n in names)
    if len(roots) > 1 or not names or len(known) < len(names):
        return None
    return roots[0] if len(known) == roots[0].ndim else roots[0][known]


def _find_root(mesh: Any) -> Any:
    """Return the mesh that a mesh is a part of. There is no public way to ask."""
    if hasattr(mesh, "_get_root_mesh"):
        return mesh._get_root_mesh()
    from torch.distributed.device_mesh import _mesh_resources

    return _mesh_resources.get_root_mesh(mesh)
