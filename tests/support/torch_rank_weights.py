"""The ranks of `test_rank_weights.py`: run this module with a folder.

Each case has two ranks with process groups of their own. Each rank writes
`RANK.json`: the warnings of each case.
"""

import copy
import json
import socket
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from autoclip_torch import NormClip, QuantileClip, TrustClip, UpdateClipper

from .torch_ranks import attempt

STEPS = 8


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 1))


def sgd(model):
    return SGD(model.parameters(), lr=0.1)


def train(model, *functions, optimizer=None, steps=STEPS, after=None):
    """Take steps with data that differ from rank to rank."""
    optimizer = optimizer or sgd(model)
    torch.manual_seed(dist.get_rank())
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(4, 8)
        (model(x) - x[:, :1]).square().mean().backward()
        for function in functions:
            function()
        optimizer.step()
        if after is not None:
            after()


def apart(*arguments, **keywords):
    """Train in lockstep: the ranks meet in each step."""
    train(*arguments, after=dist.barrier, **keywords)


# One warning on each rank.


def run_pipeline(make):
    """torchtitan#596: each rank has one stage of a model, and clips its own norm."""
    rank = dist.get_rank()
    layer = network()[2 * rank]
    stage = PipelineStage(layer, rank, 2, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, 2, loss_fn=lambda y, t: (y - t).square().mean())
    optimizer = sgd(layer)
    step = make(layer, optimizer)
    for seed in range(STEPS):
        torch.manual_seed(seed)
        optimizer.zero_grad()
        if rank == 0:
            schedule.step(torch.randn(4, 8))
        else:
            schedule.step(target=torch.zeros(4, 1))
        step()
        optimizer.step()


def stages_by_hand():
    run_pipeline(lambda layer, _: NormClip(layer, 1.0).step)


def stages_attached():
    def make(layer, optimizer):
        QuantileClip(layer, 0.9, scope="global").attach(optimizer)
        return int

    run_pipeline(make)


def stages_with_trust_clip():
    run_pipeline(lambda layer, optimizer: TrustClip(layer, optimizer) and int)


def copies_of_shards():
    """SpecForge#663: the clipper has fp32 copies of the shards of FSDP1."""
    cpu = torch.device("cpu")
    strategy = ShardingStrategy.SHARD_GRAD_OP
    model = network().to(torch.bfloat16)
    model = FullyShardedDataParallel(model, sharding_strategy=strategy, device_id=cpu)
    shards = [*model.parameters()]
    copies = [p.detach().clone().float().requires_grad_() for p in shards]
    optimizer, clipper = SGD(copies, lr=0.1), NormClip(copies, 1.0)
    torch.manual_seed(dist.get_rank())
    for _ in range(STEPS):
        model(torch.randn(4, 8, dtype=torch.bfloat16)).square().mean().backward()
        for shard, each in zip(shards, copies, strict=True):
            each.grad, shard.grad = shard.grad.float(), None
        clipper.step()
        optimizer.step()
        for shard, each in zip(shards, copies, strict=True):
            shard.data.copy_(each.data)


def experts_beside_copies():
    """The ranks hold the same parameters, and one expert each of the same shape."""
    model = network()
    torch.manual_seed(1 + dist.get_rank())
    model[0].reset_parameters()
    apart(model, NormClip(model, 1.0).step)


def large_shards():
    """The norms of large random tensors are close."""
    torch.manual_seed(dist.get_rank())
    shard = nn.Parameter(torch.randn(1_000_000))
    clipper, optimizer = NormClip([shard], 1.0), SGD([shard], lr=0.1)
    for _ in range(STEPS):
        shard.grad = shard.detach().clone()
        clipper.step()
        optimizer.step()
        dist.barrier()


# No warning.


def replicas():
    train(
        model := DistributedDataParallel(network(dist.get_rank())),
        NormClip(model, 1).step,
    )


def replicas_with_trust_clip():
    model = DistributedDataParallel(network(dist.get_rank()))
    TrustClip(model, optimizer := sgd(model))
    train(model, optimizer=optimizer)


def local_sgd():
    """The replicas start equal, and average their weights in each fourth step."""
    count = 0

    def average():
        nonlocal count
        count += 1
        if count % 4 == 0:
            for p in model.parameters():
                dist.all_reduce(p.data)
                p.data /= 2

    model = network()
    train(model, NormClip(model, 1.0).step, after=average)


def a_copied_clipper_in_local_sgd():
    """The copy begins when the weights of the ranks differ."""
    model = network()
    optimizer = NormClip.as_optimizer(sgd(model), 1.0)
    apart(model, optimizer=optimizer, steps=3)
    model, optimizer = copy.deepcopy((model, optimizer))
    apart(model, optimizer=optimizer)


def a_resumed_run_of_local_sgd():
    """Each rank continues its own copy."""
    model = network()
    before = NormClip(model, 1.0)
    apart(model, before.step)
    after = NormClip(model, 1.0)
    after.load_state_dict(before.state_dict())
    apart(model, after.step)


def replicas_that_differ_by_rounding():
    model = network()
    torch.manual_seed(dist.get_rank())
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 1e-4 * torch.randn_like(p))
    apart(model, NormClip(model, 1.0).step)


def shards_of_fsdp2():
    model = fully_shard(network())
    train(model, NormClip(model, 1.0).step)


def stages_with_a_process_group():
    group = dist.group.WORLD
    run_pipeline(lambda layer, _: NormClip(layer, 1.0, process_group=group).step)


def a_clipper_on_one_rank():
    if dist.get_rank() == 0:
        model = network()
        train(model, NormClip(model, 1.0).step)
    dist.barrier()


def another_clipper_on_one_rank():
    """One rank has a further clipper, and steps it first."""
    model, other = network(), network(1)
    further = [NormClip(other, 1.0).step] if dist.get_rank() == 0 else []
    for p in other.parameters():
        p.grad = torch.ones_like(p)
    apart(model, *further, NormClip(model, 1.0).step)


def two_networks_in_another_order():
    models = [network(), network(1)]
    for model in models:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
    clippers = [NormClip(model, 1.0) for model in models]
    order = clippers if dist.get_rank() == 0 else clippers[::-1]
    apart(network(), *[clipper.step for clipper in order])


def a_norm_for_each_parameter():
    model = network(dist.get_rank())
    apart(model, QuantileClip(model, 0.5).step)


def a_clipper_for_each_parameter():
    model = network(dist.get_rank())
    clippers = [NormClip([p], 1.0) for p in model[0].parameters()]
    apart(model, *[clipper.step for clipper in clippers])


def updates():
    model = network(dist.get_rank())
    optimizer = sgd(model)
    UpdateClipper(model, optimizer, NormClip(model, 1.0).policy, scope="global")
    apart(model, optimizer=optimizer)


def dry_runs():
    model = network(dist.get_rank())
    apart(model, NormClip(model, 1.0, dry_run=True).step)


def one_rank_after_the_other():
    """Clients of a federation: each begins with the weights of another round."""
    for rank in range(2):
        if rank == dist.get_rank():
            model = network(rank)
            train(model, NormClip(model, 1.0).step)
        dist.barrier()


def weights_that_are_not_finite():
    model = network(dist.get_rank())
    if dist.get_rank() == 0:
        nn.init.constant_(model[2].bias, float("inf"))
    apart(model, NormClip(model, 1.0).step)


def no_process_group_after_two_steps():
    model = network(dist.get_rank())
    clipper = NormClip(model, 1.0)
    apart(model, clipper.step, steps=2)
    dist.destroy_process_group()
    for _ in range(STEPS):
        clipper.step()


def a_store_that_is_closed():
    """Rank 0 ends, and the store with it; rank 1 goes on."""
    model = network(dist.get_rank())
    clipper = NormClip(model, 1.0)
    apart(model, clipper.step, steps=3)
    if dist.get_rank() == 1:
        wait_until_closed(dist.distributed_c10d._get_default_store())
        for _ in range(STEPS):
            clipper.step()
    dist.destroy_process_group()


def wait_until_closed(store):
    deadline = time.monotonic() + 30
    try:
        while time.monotonic() < deadline:
            store.check(["key"])
            time.sleep(0.01)
    except RuntimeError:
        return
    raise AssertionError("the store is still open")


ONE = [
    stages_by_hand,
    stages_attached,
    stages_with_trust_clip,
    copies_of_shards,
    experts_beside_copies,
    large_shards,
]
NONE = [
    replicas,
    replicas_with_trust_clip,
    local_sgd,
    a_copied_clipper_in_local_sgd,
    a_resumed_run_of_local_sgd,
    replicas_that_differ_by_rounding,
    shards_of_fsdp2,
    stages_with_a_process_group,
    a_clipper_on_one_rank,
    another_clipper_on_one_rank,
    two_networks_in_another_order,
    a_norm_for_each_parameter,
    a_clipper_for_each_parameter,
    updates,
    dry_runs,
    one_rank_after_the_other,
    weights_that_are_not_finite,
    no_process_group_after_two_steps,
    a_store_that_is_closed,
]


def record(function):
    """Return the warnings of this check."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    texts = [str(warning.message) for warning in caught]
    return [text for text in texts if "hold different parameters" in text]


def main(rank, ports, folder):
    torch.set_num_threads(1)
    results = {}
    for function, port in zip([*ONE, *NONE], ports, strict=True):
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://127.0.0.1:{port}",
            rank=rank,
            world_size=2,
            timeout=timedelta(minutes=1),
        )
        results[function.__name__] = attempt(record, function)
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
    (folder / f"{rank}.json").write_text(json.dumps(results))


def find_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


if __name__ == "__main__":
    ports = find_ports(len(ONE) + len(NONE))
    torch.multiprocessing.start_processes(
        main, args=(ports, Path(sys.argv[1])), nprocs=2, start_method="fork"
    )
