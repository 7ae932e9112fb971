"""The ranks of `test_engines.py`: `python -m tests.support.engine_ranks DIR`.

Two processes train with engines that clip by themselves, threshold first. Each writes
`DIR/RANK.json`: the norms, limits and weights of each engine, or its traceback.
"""

import json
import os
import sys
import traceback
import warnings
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from fairscale.nn.data_parallel import ShardedDataParallel
from fairscale.optim import OSS
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from autoclip_torch import NormClip, QuantileClip

WORLD, STEPS, MICRO_BATCHES, RATE = 2, 12, 2, 0.05


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))


def make_batches(step, rank):
    """Return the micro-batches of a rank; every third step has large targets."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    scale = 10.0 if step % 3 == 2 else 1.0
    return [
        (
            torch.randn(4, 6, generator=generator),
            torch.randn(4, 1, generator=generator) * scale,
        )
        for _ in range(MICRO_BATCHES)
    ]


def join(batches):
    """Return the micro-batches as one batch."""
    return tuple(torch.cat(part) for part in zip(*batches, strict=True))


def make_clipper(model):
    return QuantileClip(model, quantile=0.5, history_length=6, scope="global")


def get_limit(clipper):
    return min(clipper.threshold().item(), 1e9)


def zero(stage):
    """Return the run of a stage of DeepSpeed's ZeRO, with accumulated gradients."""

    def train():
        model = make_model()
        clipper = make_clipper(model)
        engine = start_engine(model, stage, clipping=1.0)
        norms, limits, applied = [], [], []
        for step in range(STEPS):
            for x, y in make_batches(step, dist.get_rank()):
                limit = get_limit(clipper)
                engine.optimizer.clip_grad = limit
                engine.backward(nn.functional.mse_loss(engine(x), y))
                engine.step()
                applied.append(engine.was_step_applied())
                if engine.was_step_applied():
                    clipper.observe(engine.get_global_grad_norm())
            norms.append(float(engine.get_global_grad_norm()))
            limits.append(limit)
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            weights = flatten(model)
        run = {"norms": norms, "limits": limits, "weights": weights}
        return run | {"applied": applied, "steps": clipper.metrics()["clip/steps"]}

    return train


def zero_after_a_clipper(stage):
    """Return a function that gives ZeRO an optimizer that clips, and the error."""

    def initialize_and_step():
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        optimizer = NormClip.as_optimizer(optimizer, max_norm=1.0)
        try:
            engine = start_engine(model, stage, clipping=0.0, optimizer=optimizer)
            for x, y in make_batches(0, dist.get_rank()):
                engine.backward(nn.functional.mse_loss(engine(x), y))
                engine.step()
        except ValueError as error:
            return {"error": str(error)}
        return {"error": None}

    return initialize_and_step


def plain_float32():
    """Without ZeRO DeepSpeed reports no norm in float32: the clipper is attached."""
    model = make_model()
    clipper = make_clipper(model)
    engine = start_engine(model, 0, clipping=0.0)
    clipper.attach(engine.optimizer)
    norms, limits = [], []
    for step in range(STEPS):
        limits.append(get_limit(clipper))
        for x, y in make_batches(step, dist.get_rank()):
            engine.backward(nn.functional.mse_loss(engine(x), y))
            engine.step()
        norms.append(clipper.metrics()["clip/norm"])
    run = {"norms": norms, "limits": limits, "weights": flatten(model)}
    reported = engine.get_global_grad_norm()
    return run | {"reported": reported, "steps": clipper.metrics()["clip/steps"]}


def start_engine(model, stage, clipping, optimizer=None):
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer or torch.optim.SGD(model.parameters(), lr=RATE),
        config={
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": MICRO_BATCHES,
            "gradient_clipping": clipping,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
        },
    )
    return engine


def train_by_hand(model, clipper, optimizer, clip):
    """Train with a function that clips to a limit and returns the norm."""
    norms, limits = [], []
    for step in range(STEPS):
        x, y = join(make_batches(step, dist.get_rank()))
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        limits.append(get_limit(clipper))
        norms.append(float(clip(limits[-1])))
        clipper.observe(norms[-1])
        optimizer.step()
    steps = clipper.metrics()["clip/steps"]
    return {"norms": norms, "limits": limits, "steps": steps}


def fsdp1():
    model = make_model()
    clipper = make_clipper(model)  # before wrapping
    cpu = torch.device("cpu")
    model = FullyShardedDataParallel(model, use_orig_params=True, device_id=cpu)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    run = train_by_hand(model, clipper, optimizer, model.clip_grad_norm_)
    with FullyShardedDataParallel.summon_full_params(model):
        return run | {"weights": flatten(model)}


def fairscale():
    model = make_model()
    optimizer = OSS(model.parameters(), optim=torch.optim.SGD, lr=RATE)
    # Its buffers keep the gradients of the step before, with the torch of today.
    wrapped = ShardedDataParallel(model, optimizer, reduce_buffer_size=0)
    clip = optimizer.clip_grad_norm
    run = train_by_hand(wrapped, make_clipper(model), optimizer, clip)
    return run | {"weights": flatten(model)}


def flatten(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()


ENGINES = {
    "DeepSpeed, ZeRO 1": zero(1),
    "DeepSpeed, ZeRO 2": zero(2),
    "DeepSpeed, ZeRO 3": zero(3),
    "DeepSpeed, plain float32": plain_float32,
    "FSDP1": fsdp1,
    "fairscale's OSS": fairscale,
}
MISUSES = {
    f"ZeRO {stage} after a clipper": zero_after_a_clipper(stage) for stage in (1, 2, 3)
}


def main(rank, folder):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD
    )
    # DeepSpeed would compile its operator for shared memory, which takes a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    results = {}
    for name, train in (ENGINES | MISUSES).items():
        try:
            results[name] = train()
        except Exception:  # noqa: BLE001  the test of this engine shows the traceback
            results[name] = {"failed": traceback.format_exc()}
    (folder / f"{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    torch.multiprocessing.start_processes(
        main, args=(Path(sys.argv[1]),), nprocs=WORLD, start_method="fork"
    )
