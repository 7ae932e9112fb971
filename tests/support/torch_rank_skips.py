"""Cases of `torch_ranks.py`: norms that are not finite, skips, scalers and losses."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from autoclip_core import Drop, Fixed
from autoclip_torch import Clipper, NormClip
from autoclip_torch.agreement import check_agreement

from .torch_layouts import (
    CLIPPERS,
    STEPS,
    Net,
    batch,
    fsdp,
    full,
    train,
    weights,
    whole,
)

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
    skip_on_a_nan_of_one_rank,
    an_overflow_on_one_rank,
    a_rank_without_gradients,
]

OF_TWO = [
    too_many_skips_of_shards,
    too_many_skips_of_a_fused_optimizer,
    a_scaler_of_shards,
    a_scaler_around_attached_stages,
    raise_on_a_nan_of_one_rank,
    frozen_on_all_ranks,
    losses_of_ranks,
]
