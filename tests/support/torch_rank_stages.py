"""Cases of `torch_ranks.py`: pipeline stages, and experts, in one process group."""

import copy
import itertools

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from autoclip_core.clipper.norms import NORMS
from autoclip_torch import NormClip, QuantileClip

from .torch_gradients import true_norms


def attached_stages():
    """Without a scaler, attached stages clip to one norm."""
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    NormClip([parameter], max_norm=1.0, process_group=dist.group.WORLD).attach(
        optimizer
    )
    parameter.grad = torch.full((1,), 3.0)
    optimizer.step()
    return {"weight": parameter.item()}


def a_copy_of_a_clipper_of_stages():
    parameter = nn.Parameter(torch.zeros(1))
    clipper = NormClip([parameter], max_norm=1.0, process_group=dist.group.WORLD)
    parameter, clipper = copy.deepcopy((parameter, clipper))
    parameter.grad = torch.full((1,), 3.0)
    return {"norm": clipper.step().norm.item()}


def experts_beside_shards():
    """Each rank of a group has one expert, a plain tensor; the rest is sharded."""
    world = dist.get_world_size()
    found = []
    # Every pair of ranks has the same two experts.
    for ranks, name in itertools.product({2, world}, NORMS):
        mesh = init_device_mesh(
            "cpu", (world // ranks, ranks), mesh_dim_names=("data", "expert")
        )
        torch.manual_seed(0)
        dense = fully_shard(nn.Linear(3, 5))
        number = mesh.get_local_rank("expert")
        expert = nn.Parameter(torch.zeros(2))
        clipper = NormClip(
            [*dense.parameters(), expert],
            max_norm=1.0,
            process_group=mesh["expert"].get_group(),
            norm=name,
        )
        for p in dense.parameters():
            p.grad = torch.full_like(p, 2.0)
        expert.grad = torch.full((2,), number + 1.0)
        gradient = [2.0] * 20 + [number + 1.0 for number in range(ranks)] * 2
        wanted = true_norms(np.array(gradient), "global", name).item()
        norm = clipper.step().norm.item()
        found.append([norm, wanted, expert.grad[0].item() * norm, number + 1.0])
    return {"found": found}


def sharded_stages():
    """Two stages, each sharded over its ranks, and each with one plain tensor."""
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("stage", "data"))
    stage = mesh.get_local_rank("stage")
    dense = fully_shard(nn.Linear(3, 5), mesh=mesh["data"])
    plain = nn.Parameter(torch.zeros(2))
    clipper = NormClip(
        [*dense.parameters(), plain],
        max_norm=1.0,
        process_group=mesh["stage"].get_group(),
    )
    for p in dense.parameters():
        p.grad = torch.full_like(p, stage + 1.0)
    plain.grad = torch.full((2,), 3.0)
    wanted = 20.0 * (1 + 4) + 2 * 2 * 9.0
    return {"norm": clipper.step().norm.item(), "wanted": wanted**0.5}


def a_process_group_across_shards():
    """The group overlaps with the ranks of the shards: which ranks hold copies?"""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("r", "s"))
    dense = fully_shard(nn.Linear(3, 5), mesh=mesh["s"])
    try:
        NormClip(dense, max_norm=1.0, process_group=dist.group.WORLD)
    except ValueError as error:
        return {"error": str(error)}
    return {"error": None}


def stages_of_a_pipeline():
    """Each rank has its own plain parameters; all share one norm and one scale."""
    rank = dist.get_rank()
    torch.manual_seed(rank)
    stage = nn.Linear(3 + rank, 2)
    clipper = NormClip(stage, max_norm=1.0, process_group=dist.group.WORLD)
    norms, squares, after = [], [], []
    for step in range(3):
        for p in stage.parameters():
            p.grad = (
                None
                if (rank, step) == (1, 1)
                else torch.full_like(p, rank + step + 1.0)
            )
        grads = [p.grad for p in stage.parameters() if p.grad is not None]
        squares.append(sum(float(g.square().sum()) for g in grads))
        norms += clipper.step().norm.tolist()
        after.append(sum(float(g.square().sum()) for g in grads))
    clipper = NormClip(
        stage,
        max_norm=1.0,
        process_group=dist.group.WORLD,
        scale_only=lambda name, parameter: rank == 0,
    )
    for p in stage.parameters():
        p.grad = torch.ones_like(p)
    size = sum(p.numel() for p in stage.parameters())
    decision = clipper.step()
    only_first = {
        "size": size,
        "norm": decision.norm.item(),
        "gradient": stage.bias.grad.tolist(),
        "norm after": clipper.metrics()["clip/norm_after"],
    }
    return {"norms": norms, "squares": squares, "after": after, "first": only_first}


def stages_with_other_rows():
    """Each rank has one layer more: their vectors of norms cannot be summed."""
    layers = [nn.Linear(3, 3) for _ in range(1 + dist.get_rank())]
    stage = nn.Sequential(*layers)
    clipper = QuantileClip(stage, process_group=dist.group.WORLD)
    for p in stage.parameters():
        p.grad = torch.ones_like(p)
    try:
        clipper.step()
    except ValueError as error:
        return {"error": str(error), "grad": stage[0].weight.grad.max().item()}
    return {"error": None}


def two_clippers_of_stages():
    """Removing one clipper keeps the mark that the other needs."""
    stage = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(stage.parameters(), lr=0.1)
    before, marked = set(vars(optimizer)), []
    clippers = [
        NormClip(stage, max_norm=1.0, process_group=dist.group.WORLD) for _ in range(2)
    ]
    handles = [clipper.attach(optimizer) for clipper in clippers]
    for handle in handles:
        marked.append(sorted(set(vars(optimizer)) - before))
        handle.remove()
    return {"marked": marked, "left": sorted(set(vars(optimizer)) - before)}


def stages_with_two_meshes_each():
    """Two stages on a grid of three axes: their ranks hold no copies."""
    size = dist.get_world_size() // 2
    names = ("stage", "data", "model")
    mesh = init_device_mesh("cpu", (2, size, 1), mesh_dim_names=names)
    made = []
    for name in ("data", "model"):
        local = torch.zeros(4 // size if name == "data" else 4)
        parameter = nn.Parameter(DTensor.from_local(local, mesh[name], [Shard(0)]))
        grad = torch.full_like(local, 1.0 + 9.0 * mesh.get_local_rank("stage"))
        parameter.grad = DTensor.from_local(grad, mesh[name], [Shard(0)])
        made.append(parameter)
    clipper = NormClip(made, max_norm=1e9, scope="parameter")
    return {
        "stage": mesh.get_local_rank("stage"),
        "norms": clipper.step().norm.tolist(),
    }


EVERY_WORLD = [
    experts_beside_shards,
    sharded_stages,
    stages_of_a_pipeline,
    stages_with_other_rows,
    stages_with_two_meshes_each,
]

OF_TWO = [
    attached_stages,
    a_copy_of_a_clipper_of_stages,
    two_clippers_of_stages,
]

OF_FOUR = [a_process_group_across_shards]
