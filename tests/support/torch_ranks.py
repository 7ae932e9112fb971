"""The ranks of `test_sharded.py`: `python -m tests.support.torch_ranks DIR`.

It starts four ranks and then two, which load what the four have saved. Each rank writes
`DIR/WORLD.RANK.json`: the result of each case, or its traceback.
"""

import copy
import json
import os
import sys
import traceback
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module

from autoclip_torch import NormClip, TrustClip, ValueClip

from . import (
    torch_rank_skips,
    torch_rank_stages,
    torch_rank_steps,
    torch_rank_updates,
)
from .torch_layouts import (
    CLIPPERS,
    LAYOUTS,
    RUNS,
    UPDATE_RUNS,
    Net,
    batch,
    fsdp,
    full,
    run,
    run_updates,
    train,
    weights,
)

WORLDS = (4, 2)


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


EVERY_WORLD = [
    *torch_rank_skips.EVERY_WORLD,
    *torch_rank_stages.EVERY_WORLD,
    *torch_rank_steps.EVERY_WORLD,
    *torch_rank_updates.EVERY_WORLD,
]
OF_TWO = [
    sequence_parallel,
    made_before_sharding,
    flat_parameters_of_fsdp1,
    observe_a_sharded_norm,
    *torch_rank_skips.OF_TWO,
    *torch_rank_stages.OF_TWO,
    *torch_rank_steps.OF_TWO,
    *torch_rank_updates.OF_TWO,
]
"""Cases in which four ranks do the same as two, in twice the time."""


OF_FOUR = [*torch_rank_stages.OF_FOUR, *torch_rank_updates.OF_FOUR]


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
