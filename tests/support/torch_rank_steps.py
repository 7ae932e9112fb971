"""Cases of `torch_ranks.py`: what ranks hold, and ranks that leave out a step."""

import itertools
import warnings

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from autoclip_core import Fixed
from autoclip_core.clipper.norms import NORMS
from autoclip_torch import AGC, NormClip, TrustClip
from autoclip_torch.agreement import check_agreement
from autoclip_torch.gradients.ranks import find_device

from .torch_gradients import true_norms


def message_of(function, *arguments):
    """Return the error message of a call, or None."""
    try:
        function(*arguments)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return None


def dense_and_expert():
    """Return the parameters of fastmoe#29 with their gradients; experts differ."""
    pairs = [
        ("dense", nn.Parameter(torch.ones(3))),
        ("expert", nn.Parameter(torch.ones(1))),
    ]
    for (_, parameter), value in zip(
        pairs, (2.0, 3.0 + 2 * dist.get_rank()), strict=True
    ):
        parameter.grad = torch.full_like(parameter, value)
    return pairs


def replicas_and_experts():
    """A dense parameter on all ranks, and a plain expert on each, in one norm."""
    world, found = dist.get_world_size(), []
    experts = [3.0 + 2 * rank for rank in range(world)]
    for norm, is_replica in itertools.product(
        NORMS, ("dense", lambda name, p: len(p) == 3)
    ):
        pairs = dense_and_expert()
        clipper = NormClip(
            pairs, 1.0, norm=norm, process_group=dist.group.WORLD, replicated=is_replica
        )
        value = clipper.step().norm.item()
        wanted = true_norms(np.array([2.0] * 3 + experts), "global", norm).item()
        scaled = [p.grad[0].item() * value for _, p in pairs]
        found.append([value, wanted, scaled, [2.0, experts[dist.get_rank()]]])
    return {"found": found}


def replicas_shards_and_experts():
    """All three kinds in one norm: shards, a plain copy, and a plain expert."""
    torch.manual_seed(0)
    world = dist.get_world_size()
    sharded = fully_shard(nn.Linear(3, 5))
    for p in sharded.parameters():
        p.grad = torch.full_like(p, 0.5)
    pairs = [*dense_and_expert(), *sharded.named_parameters()]
    clipper = NormClip(pairs, 1.0, process_group=dist.group.WORLD, replicated=["dense"])
    experts = [3.0 + 2 * rank for rank in range(world)]
    gradient = np.array([2.0] * 3 + experts + [0.5] * 20)
    return {
        "norm": clipper.step().norm.item(),
        "wanted": float(np.linalg.norm(gradient)),
    }


def misused_replicas():
    """Return the errors and warnings of a first step in which ranks count wrongly."""

    def step(pairs, **keywords):
        clipper = NormClip(pairs, 1.0, process_group=dist.group.WORLD, **keywords)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            error = message_of(clipper.step)
        return error or [str(warning.message) for warning in caught]

    rank = dist.get_rank()
    return {
        "undeclared": step(dense_and_expert()),
        "declared as none": step(dense_and_expert(), replicated=()),
        "all are copies": step(dense_and_expert()[:1]),
        "not copies": step(dense_and_expert(), replicated=["dense", "expert"]),
        "on one rank": step(
            dense_and_expert(), replicated=lambda name, p: name == "dense" and rank == 0
        ),
        "unnamed": step([p for _, p in dense_and_expert()]),
    }


def shards(policy=None):
    """Return two sharded parameters, with gradients, as one shard on each rank."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    made = []
    for value in (1.0, 2.0):
        local = torch.full((2, 2), value)
        made.append(nn.Parameter(DTensor.from_local(local, mesh, [Shard(0)])))
        made[-1].grad = DTensor.from_local(local * 3, mesh, [Shard(0)])
    return made


def stage():
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.full((2,), 1.0 + dist.get_rank())
    return [parameter]


LAYOUTS = {
    "shards": lambda: NormClip(shards(), 1.0),
    "shards and weights": lambda: AGC(shards(), 0.1),
    "largest": lambda: NormClip(shards(), 1.0, norm="max"),
    "stages": lambda: NormClip(stage(), 1.0, process_group=dist.group.WORLD),
    "losses of replicas": lambda: NormClip(stage(), 1.0, loss_policy=Fixed(9.0)),
}


def take(clipper):
    needs_loss = clipper.loss_policy is not None
    clipper.step(loss=1.0) if needs_loss else clipper.step()


def a_left_out_step():
    """The last rank leaves out one of three steps before the check; or the first."""
    last = dist.get_rank() == dist.get_world_size() - 1
    errors = {}
    for name, make in LAYOUTS.items():
        for left_out in (0, 2):
            clipper = make()

            def run(clipper=clipper, left_out=left_out):
                for step in range(3):
                    if not (last and step == left_out):
                        take(clipper)
                check_agreement(clipper)

            errors[f"{name}, {left_out}"] = message_of(run)
    clipper = AGC(shards(), 0.1)
    clipper.step()
    call = clipper.threshold if last else clipper.step
    return {"errors": errors, "threshold": message_of(call)}


def left_out_steps_that_balance():
    """The first rank leaves out the second step, the last rank the fourth."""
    rank, world = dist.get_rank(), dist.get_world_size()
    errors = {}
    for name, make in LAYOUTS.items():
        clipper = make()
        optimizer = torch.optim.SGD(clipper.parameters, lr=0.1)

        def run(clipper=clipper, optimizer=optimizer):
            for step in range(6):
                if (rank, step) not in ((0, 1), (world - 1, 3)):
                    take(clipper)
                optimizer.step()

        errors[name] = message_of(run)
    return {"errors": errors}


def a_left_out_update():
    """The first rank leaves out an update after its clip, as after an exception."""
    errors = {}
    for name, make in LAYOUTS.items():
        clipper = make()
        optimizer = torch.optim.SGD(clipper.parameters, lr=0.1)

        def run(clipper=clipper, optimizer=optimizer):
            for step in range(6):
                take(clipper)
                if (dist.get_rank(), step) != (0, 4):
                    optimizer.step()

        errors[name] = message_of(run)
    return {"errors": errors}


def steps_of_a_trust_clip():
    """Both halves of sharded ranks pass the check; then one rank leaves out a step."""
    torch.manual_seed(0)
    model = fully_shard(nn.Linear(3, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clipper = TrustClip(model, optimizer)

    def step():
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.5)
        optimizer.step()

    step()
    agree = message_of(check_agreement, clipper)
    if dist.get_rank() == 0:
        return {"agree": agree, "left out": message_of(step)}
    return {"agree": agree, "left out": message_of(check_agreement, clipper)}


def steps_that_agree():
    """Sharded steps pass the check, with threshold() and another optimizer between."""
    clipper = AGC(shards(), 0.1)
    half = torch.optim.SGD(clipper.parameters[:1], lr=0.1)
    optimizer = torch.optim.SGD(clipper.parameters, lr=0.1)
    for step in range(4):
        clipper.step()
        optimizer.step()
        if dist.get_rank() == 0:
            half.step()  # it does not step all parameters, so it does not count
        clipper.threshold()
        if step == 2:
            check_agreement(clipper)
    check_agreement(clipper)
    return {"steps": clipper.metrics()["clip/steps"]}


def a_change_of_parameters():
    """All ranks remove a parameter, or only the last one."""
    last = dist.get_rank() == dist.get_world_size() - 1
    found = {}
    group = {"process_group": dist.group.WORLD}
    for kind, keywords in {"shards": {}, "stages": group}.items():
        for alone in (False, True):
            parameters = shards() if kind == "shards" else [*stage(), *stage()]
            clipper = NormClip(parameters, 1.0, scope="parameter", **keywords)
            take(clipper)
            if last or not alone:
                clipper.remove_params(parameters[:1])
            error = message_of(take, clipper)
            rows = len(clipper.names)
            if error is None:
                take(clipper)
                rows = len(clipper.step().norm)
            found[f"{kind}, {'alone' if alone else 'all'}"] = [error, rows]
    return {"found": found}


def devices_of_collectives():
    """Return where ranks communicate: on the device of the mesh, also with offload."""
    cpu, cuda, first = map(torch.device, ("cpu", "cuda", "cuda:1"))
    world = [dist.group.WORLD]
    return {
        "mesh": NormClip(shards(), 1.0)._stepper.ranks.device.type,
        "offloaded": str(find_device(world, cuda, cpu)),
        "on the mesh": str(find_device(world, cuda, first)),
        "no mesh": str(find_device(world, None, cpu)),
        "no backend": find_device(world, None, torch.device("meta")).type,
    }


def sum_by_hand(gradient):
    dist.all_reduce(gradient)


def average_by_hand(gradient):
    """As in the tutorial of torch, which writes to `data`."""
    dist.all_reduce(gradient.data)
    gradient.data /= dist.get_world_size()


def clip_again(gradient):
    """After a collective for a log."""
    dist.all_reduce(torch.ones(()))
    gradient.clamp_(-0.1, 0.1)


def add_noise(gradient):
    gradient += torch.randn_like(gradient)


def gradients_after_the_clip():
    """Return the warnings of loops that sum gradients after the clip, or before it."""
    loops = {
        "sum": (None, sum_by_hand),
        "average": (None, average_by_hand),
        "sum before": (sum_by_hand, None),
        "clip again": (None, clip_again),
        "noise": (None, add_noise),
    }
    found = {}
    for name, (before, after) in loops.items():
        torch.manual_seed(dist.get_rank())
        weight = nn.Parameter(torch.zeros(3, 4))
        clipper = NormClip([weight], 1.0)
        optimizer = torch.optim.SGD([weight], lr=0.1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(14):
                weight.grad = torch.randn(3, 4)
                for step in (before, lambda gradient: clipper.step(), after):  # noqa: B023
                    if step is not None:
                        step(weight.grad)
                optimizer.step()
        found[name] = [str(warning.message) for warning in caught]
    return {"found": found}


EVERY_WORLD = [
    replicas_and_experts,
    replicas_shards_and_experts,
    a_left_out_step,
    left_out_steps_that_balance,
    a_left_out_update,
]
OF_TWO = [
    misused_replicas,
    steps_that_agree,
    steps_of_a_trust_clip,
    a_change_of_parameters,
    devices_of_collectives,
    gradients_after_the_clip,
]
