"""A model, the layouts that split it over ranks, and the clippers of each layout."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from autoclip_core import Drop, Fixed, ParamRatio, Quantile
from autoclip_torch import AGC, Clipper, QuantileClip, UpdateClipper, ValueClip

STEPS = 3
"""One step for each size of a `batch`; the first has no history, the others clip."""


class Net(nn.Module):
    """Uneven shapes; the last bias has one element, so most of its shards are empty."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 8)
        self.b = nn.Linear(8, 4)
        self.c = nn.ConvTranspose1d(4, 6, 3, groups=2)
        self.d = nn.Linear(18, 1)

    def forward(self, x):
        x = self.b(torch.tanh(self.a(x)))
        return self.d(torch.tanh(self.c(x[:, :, None])).flatten(1))


def whole(model):
    return model


def ddp(model):
    return DistributedDataParallel(model)


def fsdp(model):
    for layer in (model.a, model.b):
        fully_shard(layer)
    return fully_shard(model)


def offloaded(model):
    """FSDP2 with shards, gradients and optimizer states on the CPU."""
    for layer in (model.a, model):
        fully_shard(layer, offload_policy=CPUOffloadPolicy(pin_memory=False))
    return model


def hsdp(model):
    mesh = init_device_mesh(
        "cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("r", "s")
    )
    fully_shard(model.a, mesh=mesh)
    return fully_shard(model, mesh=mesh)


PLAN = {"a": ColwiseParallel(), "b": RowwiseParallel()}


def tensor_parallel(model):
    """Shard `a` and `b`; `c` and `d` stay plain, so one clipper has both kinds."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return parallelize_module(model, mesh, PLAN)


def tensor_parallel_and_fsdp(model):
    """Three kinds: the mesh of `a` and `b`, the mesh of the others, and no mesh."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    parallelize_module(model, mesh["model"], PLAN)
    for layer in (model.a, model.b, model.c):
        fully_shard(layer, mesh=mesh["data"])
    return model


def two_flat_meshes(model):
    """Tensor parallel in pairs, and a layer sharded across pairs: no common mesh."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    parallelize_module(model, mesh["model"], PLAN)
    fully_shard(model.d, mesh=mesh["data"])
    return model


def two_roots(model):
    """Two layers are sharded, and no sharded module holds both."""
    fully_shard(model.a)
    fully_shard(model.c)
    return model


def a_flat_mesh_and_a_grid(model):
    """Two meshes of the same ranks; neither is a part of the other."""
    fully_shard(model.a, mesh=init_device_mesh("cpu", (4,)))
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("r", "s"))
    for layer in (model.b, model.c, model.d):
        fully_shard(layer, mesh=grid)
    return model


def only_a_part(model):
    fully_shard(model.a)
    return model


LAYOUTS = {
    "ddp": ddp,
    "fsdp": fsdp,
    "offloaded": offloaded,
    "hsdp": hsdp,
    "tensor parallel": tensor_parallel,
    "tensor parallel and fsdp": tensor_parallel_and_fsdp,
    "two flat meshes": two_flat_meshes,
    "only a part": only_a_part,
    "two roots": two_roots,
    "a flat mesh and a grid": a_flat_mesh_and_a_grid,
}

CLIPPERS = {
    "global": lambda m: QuantileClip(m, quantile=0.5, history_length=4, scope="global"),
    "parameter": lambda m: QuantileClip(m, quantile=0.5, history_length=4),
    "group": lambda m: Clipper(
        [
            {"params": m.a.parameters()},
            {"params": [*m.b.parameters(), *m.d.parameters()]},
        ],
        Quantile(0.5, history_length=4),
        scope="group",
    ),
    "agc": lambda m: AGC(m, clipping=0.02),
    "value": lambda m: ValueClip(m, clip_value=0.05, scope="global"),
    "value of each": lambda m: ValueClip(m, clip_value=0.05),
    "scale only": lambda m: Clipper(
        m, Drop(Fixed(3.0), clip=Fixed(0.5)), scope="global", scale_only="*.weight"
    ),
}
OTHER_NORMS = {
    f"{name}, {norm}": lambda m, make=make, norm=norm: make(m, norm)
    for norm in ("rms", "max")
    for name, make in {
        "agc": lambda m, norm: AGC(m, clipping=0.02, norm=norm),
        "group": lambda m, norm: Clipper(
            [{"params": m.a.parameters()}, {"params": m.d.parameters()}],
            Quantile(0.5, history_length=4),
            scope="group",
            norm=norm,
        ),
    }.items()
}
CLIPPERS_OF_RUNS = CLIPPERS | OTHER_NORMS


# Four ranks take longer than two. They run what needs four, with three clippers: one
# row of all parameters, a row per unit, and a value clip of each parameter.
OF_TWO = ["ddp", "fsdp", "tensor parallel", "only a part", "two roots"]
OF_FOUR = ["hsdp", "tensor parallel and fsdp", "two flat meshes"]
OF_FOUR += ["a flat mesh and a grid"]
RUNS = [(2, layout, case) for layout in OF_TWO for case in [*CLIPPERS][:-1]]
RUNS += [(2, layout, "scale only") for layout in ("fsdp", "tensor parallel")]
RUNS += [(2, "offloaded", "agc")]
RUNS += [(4, layout, "global") for layout in ("fsdp", "tensor parallel")]
RUNS += [
    (4, layout, case)
    for layout in OF_FOUR
    for case in ("global", "agc", "value of each")
]
RUNS += [
    (world, layout, case)
    for world, layout in ((2, "fsdp"), (2, "only a part"), (4, "hsdp"))
    for case in OTHER_NORMS
]
"""Each run: the number of ranks, the layout and the clipper."""


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def weights(model):
    return torch.cat([full(p.detach()).flatten() for p in model.parameters()]).tolist()


def batch(step):
    torch.manual_seed(step)
    return torch.randn(8, 6), torch.randn(8, 1) * 4 ** (step % 3)


def train(model, clipper, optimizer, steps, spoil=lambda step: None):
    decisions, reductions = [], []
    for step in steps:
        x, y = batch(step)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        spoil(step)
        if dist.is_initialized():
            with CommDebugMode() as communication:
                decision = clipper.step()
            reductions.append(communication.get_total_counts())
        else:
            decision = clipper.step()
        decisions.append(
            [getattr(decision, n).tolist() for n in ("norm", "threshold", "scale")]
        )
        optimizer.step()
    return {"decisions": decisions, "reductions": reductions}


UPDATE_RUNS = [
    (2, "fsdp", "unit"),
    (2, "tensor parallel", "global"),
    (4, "hsdp", "rms"),
]
"""Each run of an update clipper: the number of ranks, the layout and the keywords."""

UPDATE_CLIPPERS = {
    "unit": {"scope": "unit"},
    "global": {"scope": "global"},
    "rms": {"scope": "parameter", "norm": "rms"},
}


def run_updates(case, layout):
    """Train with an update clipper; return the rows of each step and the weights."""
    torch.manual_seed(0)
    net = Net()
    model = layout(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9)
    policy = ParamRatio(0.05, eps=0.1)
    clipper = UpdateClipper(net, optimizer, policy, **UPDATE_CLIPPERS[case])
    rows, reductions = [], []
    for step in range(STEPS):
        x, y = batch(step)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        if dist.is_initialized():
            with CommDebugMode() as communication:
                optimizer.step()
            reductions.append(communication.get_total_counts())
        else:
            optimizer.step()
        rows.append(list(clipper.metrics(per_row=True).values()))
    return {"rows": rows, "reductions": reductions, "weights": weights(net)}


def run(case, layout):
    torch.manual_seed(0)
    net = Net()
    model = layout(net)
    clipper = CLIPPERS_OF_RUNS[case](net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    result = train(model, clipper, optimizer, range(STEPS))
    metrics = clipper.metrics()
    return result | {
        "weights": weights(net),
        "names": clipper.names,
        "norms": [metrics["clip/norm"], metrics["clip/norm_after"]],
    }
