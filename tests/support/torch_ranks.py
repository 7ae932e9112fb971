"""The ranks of `test_sharded.py`: `python -m tests.support.torch_ranks DIR`.

It starts four ranks and then two, which load what the four have saved. Each rank writes
`DIR/WORLD.RANK.json`: the result of each case, or its traceback.
"""

import copy
import itertools
import json
import os
import sys
import traceback
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module

from autoclip_core import Drop, Fixed
from autoclip_core.clipper.norms import NORMS
from autoclip_torch import Clipper, NormClip, QuantileClip, TrustClip, ValueClip
from autoclip_torch.agreement import check_agreement

from . import torch_rank_steps, torch_rank_updates
from .torch_gradients import true_norms
from .torch_layouts import (
    CLIPPERS,
    LAYOUTS,
    RUNS,
    STEPS,
    UPDATE_RUNS,
    Net,
    batch,
    fsdp,
    full,
    run,
    run_updates,
    train,
    weights,
    whole,
)

WORLDS = (4, 2)
NAN = float("nan")


def skip_on_a_nan_of_one_rank():
    """A NaN in one shard cancels the update on all ranks."""
    torch.manual_seed(0)
    model = fsdp(Net())
    clipper = Clipper(
        model, Drop(Fixed(1e6), action="skip"), scope="global", nonfinite="skip"
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    kept = []

    def spoil(step):
        if step == 1:
            kept.append(weights(model))
            if dist.get_rank() == 1:
                model.a.weight.grad.to_local()[0, 0] = float("nan")

    train(model, clipper, optimizer, range(2), spoil)
    steps = {int(full(state["step"])) for state in optimizer.state.values()}
    return {
        "unchanged": kept[0] == weights(model),
        "steps": sorted(steps),
        "skipped": clipper.metrics()["clip/skipped_total"],
    }


def too_many_skips_of_shards():
    """Return which of six steps with NaN stops the run, and the error."""
    model = fsdp(Net())
    clipper = NormClip(model, max_norm=1.0, nonfinite="skip", max_consecutive_skips=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def spoil(step):
        model.a.weight.grad.to_local().fill_(float("nan"))

    for step in range(6):
        try:
            train(model, clipper, optimizer, range(step, step + 1), spoil)
        except RuntimeError as error:
            return {"step": step, "error": str(error)}
    return {"step": None}


def too_many_skips_of_a_fused_optimizer():
    """The same if the kernel skips: nothing else reads the norms."""
    model = fsdp(Net())
    clipper = NormClip(model, max_norm=1.0, nonfinite="skip", max_consecutive_skips=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05, fused=True)
    clipper.attach(optimizer)
    for step in range(6):
        for p in model.parameters():
            p.grad = torch.full_like(p, float("nan"))
        try:
            optimizer.step()
        except RuntimeError as error:
            return {"step": step, "error": str(error)}
    return {"step": None}


def an_overflow_on_one_rank():
    """Stages with a GradScaler each: one overflows, and one has no gradient.

    Momentum and weight decay would move a weight whose gradient is only set to 0.
    """
    rank = dist.get_rank()
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9, weight_decay=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    clipper = NormClip(
        [parameter], max_norm=1.0, scope="global", process_group=dist.group.WORLD
    )
    weights, scales = [], []
    for size in (1.0, float("inf"), 100.0):
        optimizer.zero_grad()
        factor = size if rank == 0 else 1.0
        scaled = scaler.scale((parameter * factor).sum())
        if rank != 1:
            scaled.backward()
        clipper.step(scaler=scaler, optimizer=optimizer)
        scaler.step(optimizer)
        scaler.update()
        weights.append(parameter.tolist())
        scales.append(scaler.get_scale())
    return {"weights": weights, "scales": scales, "metrics": clipper.metrics()}


def a_scaler_of_shards():
    """One shard of one rank overflows in the second step: by hand, attached, fused."""
    ways = []
    for way in ("by hand", "attached", "fused"):
        torch.manual_seed(0)
        model = fsdp(Net())
        clipper = CLIPPERS["global"](model)
        optimizer = torch.optim.Adam(
            model.parameters(), lr=0.1, weight_decay=0.1, fused=way == "fused"
        )
        if way != "by hand":
            clipper.attach(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        steps = []
        for step in range(3):
            x, y = batch(step)
            optimizer.zero_grad()
            scaler.scale(nn.functional.mse_loss(model(x), y)).backward()
            if step == 1 and dist.get_rank() == 0:
                model.a.weight.grad.to_local()[0, 0] = float("inf")
            if way == "by hand":
                clipper.step(scaler=scaler, optimizer=optimizer)
            scaler.step(optimizer)
            scaler.update()
            steps.append(weights(model))
        metrics = clipper.metrics()
        scale = scaler.get_scale()
        ways.append({"weights": steps, "scale": scale, "metrics": metrics})
    return {"ways": ways}


def a_scaler_around_attached_stages():
    """The rank that overflows would step neither its optimizer nor its clipper."""
    errors, left = [], []
    group = dist.group.WORLD
    for way in ("attached", "fused", "as optimizer"):
        parameter = nn.Parameter(torch.ones(2))
        optimizer = torch.optim.SGD([parameter], lr=0.1, fused=way == "fused")
        before = dict(vars(optimizer))
        if way == "as optimizer":
            optimizer = NormClip.as_optimizer(
                optimizer, max_norm=1.0, process_group=group
            )
        else:
            clipper = NormClip([parameter], max_norm=1.0, process_group=group)
            clipper.attach(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        size = float("inf") if dist.get_rank() == 0 else 1.0
        scaler.scale((parameter * size).sum()).backward()
        try:
            scaler.step(optimizer)
        except RuntimeError as error:
            errors.append(str(error))
        if way != "as optimizer":
            clipper.detach()
            left += set(vars(optimizer)) - set(before)
    return {"errors": errors, "left": left}


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


def made_before_sharding():
    """Return warnings and norms: of a model, a list of its parameters, and one layer.

    A norm is followed by that of a clipper that was made after sharding.
    """
    messages, norms = [], []
    for given in (lambda m: m, lambda m: m.parameters()):
        model = Net()
        clipper = NormClip(given(model), max_norm=1.0)
        fsdp(model)
        x, y = batch(0)
        nn.functional.mse_loss(model(x), y).backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            wanted = NormClip(model, max_norm=1.0, dry_run=True).step()
            norms += [clipper.step().norm.item(), wanted.norm.item()]
        messages.append([str(warning.message) for warning in caught])
    model = Net()
    clipper = NormClip(model, max_norm=1.0)
    fully_shard(model.a)
    nn.functional.mse_loss(model(x), y).backward()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        wanted = NormClip(model, max_norm=1.0, dry_run=True).step()
        norms += [clipper.step().norm.item(), wanted.norm.item()]
    messages.append([str(warning.message) for warning in caught])
    return {"warnings": messages, "norms": norms}


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


def frozen_on_all_ranks():
    """Frozen parameters have no gradient on any rank, as in one process."""
    decisions = []
    for layout in (whole, fsdp):
        torch.manual_seed(0)
        net = Net()
        for p in [*net.a.parameters(), net.d.bias]:
            p.requires_grad_(False)
        layout(net)
        for case in ("global", "parameter", "agc"):
            clipper = CLIPPERS[case](net)
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
            decisions.append(train(net, clipper, optimizer, range(STEPS))["decisions"])
    return {"alone": decisions[:3], "sharded": decisions[3:]}


def raise_on_a_nan_of_one_rank():
    torch.manual_seed(0)
    model = fsdp(Net())
    clipper = NormClip(model, max_norm=1.0, nonfinite="raise")
    x, y = batch(0)
    nn.functional.mse_loss(model(x), y).backward()
    if dist.get_rank() == 0:
        model.a.weight.grad.to_local()[0, 0] = float("inf")
    try:
        clipper.step()
    except FloatingPointError as error:
        return {"error": str(error)}
    return {"error": None}


def a_rank_without_gradients():
    """A rank without gradients enters the reduction and records the same norm."""
    torch.manual_seed(0)
    model = fsdp(Net())
    clipper = CLIPPERS["global"](model)
    norms, local_norms = [], []
    for step in range(3):
        x, y = batch(step)
        nn.functional.mse_loss(model(x), y).backward()
        if dist.get_rank() == 1:
            for p in model.parameters():
                p.grad = None
        parts = [
            p.grad.to_local().flatten()
            for p in model.parameters()
            if p.grad is not None
        ]
        local = torch.cat(parts).double().norm().item() if parts else 0.0
        local_norms.append(local)
        norms += clipper.step().norm.tolist()
        for p in model.parameters():
            p.grad = None
    return {
        "norms": norms,
        "local norms": local_norms,
        "state": clipper.state_dict()["states"][0]["ring"].tolist(),
    }


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


def sequence_parallel():
    """Gradients of a LayerNorm with sharded input are unfinished sums: `Partial`."""
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plain = nn.LayerNorm(6)
    parts = parallelize_module(copy.deepcopy(plain), mesh, SequenceParallel())
    torch.manual_seed(1)
    x = torch.randn(8, 4, 6)
    results = []
    makers = [
        partial(kind, scope=scope, norm=norm, **limit)
        for kind, limit in (
            (ValueClip, {"clip_value": 20.0}),
            (NormClip, {"max_norm": 20.0}),
        )
        for scope in ("parameter", "unit", "global")
        for norm in ("l2", "max")
    ]
    for make_clipper in makers:
        for model in (plain, parts):
            model.zero_grad()
            if model is parts:
                local = x.chunk(dist.get_world_size(), dim=1)[dist.get_rank()]
                y = model(local).full_tensor(grad_placements=[Replicate()])
            else:
                y = model(x)
            (y * torch.arange(6.0)).sum().backward()
            kinds = [
                str(p.grad.placements) if isinstance(p.grad, DTensor) else "plain"
                for p in model.parameters()
            ]
            decision = make_clipper(model).step()
            values = [full(p.grad).flatten() for p in model.parameters()]
            values = torch.cat([decision.norm, decision.scale, *values]).tolist()
            results.append({"values": values, "kinds": kinds})
    return {"found": results}


def observe_a_sharded_norm():
    """Under FSDP2, `clip_grad_norm_` returns a DTensor."""
    torch.manual_seed(0)
    model = fsdp(Net())
    clipper = CLIPPERS["global"](model)
    x, y = batch(0)
    nn.functional.mse_loss(model(x), y).backward()
    total = nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    return {"kind": type(total).__name__, "norm": clipper.observe(total).norm.tolist()}


def save_half_way(folder):
    torch.manual_seed(0)
    model = fsdp(Net())
    named = [(f"module.{name}", p) for name, p in model.named_parameters()]
    clipper = CLIPPERS["parameter"](named)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    train(model, clipper, optimizer, range(3))
    state = {"model": model.state_dict(), "clipper": clipper}
    dcp.save(state, checkpoint_id=folder / "checkpoint")
    return train(model, clipper, optimizer, range(3, 6)) | {"weights": weights(model)}


def load_half_way(folder):
    torch.manual_seed(1)
    model = fsdp(Net())
    clipper = CLIPPERS["parameter"](model)
    state = {"model": model.state_dict(), "clipper": clipper}
    dcp.load(state, checkpoint_id=folder / "checkpoint")
    model.load_state_dict(state["model"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    return train(model, clipper, optimizer, range(3, 6)) | {"weights": weights(model)}


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


def flat_parameters_of_fsdp1():
    """The error of each clipper that is made after FSDP1, or before and then steps."""

    def make_after(net):
        NormClip(wrap(net), max_norm=1.0)

    def step_by_hand(net):
        clipper = NormClip(net, max_norm=1.0)
        take_step(wrap(net), clipper.step)

    def attach(net):
        clipper, model = NormClip(net, max_norm=1.0), wrap(net)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        clipper.attach(optimizer)
        take_step(model, optimizer.step)

    def trust(net):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        TrustClip(net, optimizer)
        take_step(wrap(net), optimizer.step)

    def wrap(net):
        cpu = torch.device("cpu")
        return FullyShardedDataParallel(net, use_orig_params=True, device_id=cpu)

    def take_step(model, step):
        model(batch(0)[0]).square().mean().backward()
        step()

    errors = {}
    for use in (make_after, step_by_hand, attach, trust):
        try:
            errors[use.__name__] = use(Net())
        except ValueError as error:
            errors[use.__name__] = str(error)
    return errors


def losses_of_ranks():
    """Each rank has its own loss: replicas, shards, stages, and an attached clipper."""
    rank, world = dist.get_rank(), dist.get_world_size()
    results = {}
    for layout in ("replicas", "shards", "stages", "attached"):
        torch.manual_seed(0)
        layer = nn.Linear(3, 5)
        layer = fully_shard(layer) if layout == "shards" else layer
        group = dist.group.WORLD if layout == "stages" else None
        clipper = NormClip(
            layer, max_norm=1.0, loss_policy=Fixed(2.0), process_group=group
        )
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        if layout == "attached":
            clipper.attach(optimizer)
        changed, means = [], []
        for loss in (rank, 100.0 * (rank == 1), NAN if rank == 1 else 0.0, -rank):
            before = weights(layer)
            for p in layer.parameters():
                p.grad = torch.full_like(p, 1.0)
            clipper.observe_loss(loss)
            if layout != "attached":
                clipper.step()
            optimizer.step()
            changed.append(weights(layer) != before)
            means.append(clipper.metrics()["clip/loss"])
        check_agreement(clipper)
        means[2] = str(means[2])
        results[layout] = {"changed": changed, "means": means}
    mean = (world - 1) / 2
    wanted = {
        "changed": [True, False, False, True],
        "means": [mean, 100.0 / world, "nan", -mean],
    }
    return {"results": results, "wanted": wanted}


EVERY_WORLD = [
    stages_with_other_rows,
    experts_beside_shards,
    sharded_stages,
    an_overflow_on_one_rank,
    stages_with_two_meshes_each,
    skip_on_a_nan_of_one_rank,
    a_rank_without_gradients,
    stages_of_a_pipeline,
    *torch_rank_steps.EVERY_WORLD,
    *torch_rank_updates.EVERY_WORLD,
]
OF_TWO = [
    losses_of_ranks,
    two_clippers_of_stages,
    sequence_parallel,
    too_many_skips_of_a_fused_optimizer,
    a_scaler_around_attached_stages,
    a_scaler_of_shards,
    attached_stages,
    a_copy_of_a_clipper_of_stages,
    made_before_sharding,
    frozen_on_all_ranks,
    too_many_skips_of_shards,
    flat_parameters_of_fsdp1,
    raise_on_a_nan_of_one_rank,
    observe_a_sharded_norm,
    *torch_rank_steps.OF_TWO,
    *torch_rank_updates.OF_TWO,
]
"""Cases in which four ranks do the same as two, in twice the time."""


OF_FOUR = [a_process_group_across_shards, *torch_rank_updates.OF_FOUR]


def attempt(function, *arguments):
    try:
        return function(*arguments)
    except Exception:  # noqa: BLE001  the test of this case shows the traceback
        return {"failed": traceback.format_exc()}


def main(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous{world}",
        rank=rank,
        world_size=world,
        timeout=timedelta(minutes=2),  # ranks that wait for each other end then
    )
    results = {}
    for size, name, case in RUNS:
        if size == world:
            results[f"{name}: {case}"] = attempt(run, case, LAYOUTS[name])
    for size, name, case in UPDATE_RUNS:
        if size == world:
            results[f"update, {name}: {case}"] = attempt(
                run_updates, case, LAYOUTS[name]
            )
    if world == 4:
        functions = [*EVERY_WORLD, *OF_FOUR]
        results["save_half_way"] = attempt(save_half_way, folder)
    else:
        functions = [*EVERY_WORLD, *OF_TWO]
        results["load_half_way"] = attempt(load_half_way, folder)
    for function in functions:
        results[function.__name__] = attempt(function)
    (folder / f"{world}.{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    for world in WORLDS:
        # Forked ranks do not import torch again.
        torch.multiprocessing.start_processes(
            main, args=(world, Path(sys.argv[1])), nprocs=world, start_method="fork"
        )
