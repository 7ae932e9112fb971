"""FSDP2 over two processes: one norm of all shards, and a checkpoint with the history.

Run it: `python examples/fsdp2.py`. It starts two processes on this machine's CPU. After
half of the training everything is saved, and a second model goes on from there. Each
norm is compared to that of the same gradients, gathered. `--save weights.pt` writes the
whole weights, which any one process can load.
"""

import argparse
import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
)
from torch.distributed.fsdp import fully_shard

from autoclip_torch import QuantileClip

RANKS = 2


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 33), nn.Tanh(), nn.Linear(33, 1))


class Training:
    """A sharded model, its optimizer and its clipper."""

    def __init__(self, seed: int) -> None:
        self.model = network(seed)
        for layer in (self.model[0], self.model[2]):
            fully_shard(layer)
        fully_shard(self.model)
        # The clipper comes after fully_shard, which replaces the parameters.
        self.clipper = QuantileClip(self.model, quantile=0.5, scope="global")
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)

    def step(self, x: Tensor, y: Tensor) -> tuple[float, float]:
        """Take a step; return the clipper's norm and that of the whole gradients."""
        self.optimizer.zero_grad()
        nn.functional.mse_loss(self.model(x), y).backward()
        whole = [p.grad.full_tensor() for p in self.model.parameters()]
        decision = self.clipper.step()
        self.optimizer.step()
        return decision.norm.item(), torch.nn.utils.get_total_norm(whole).item()

    def save(self, folder: Path) -> None:
        state = {"model": self.model.state_dict(), "clipper": self.clipper}
        dcp.save(state, checkpoint_id=folder)

    def load(self, folder: Path) -> None:
        state = {"model": self.model.state_dict(), "clipper": self.clipper}
        dcp.load(state, checkpoint_id=folder)
        self.model.load_state_dict(state["model"])


def batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    """Rank by rank other data; every tenth batch is ten times as large."""
    torch.manual_seed(RANKS * step + rank)
    x = torch.randn(32, 16)
    return x, x.sum(1, keepdim=True) * (10 if step % 10 == 9 else 1)


def train(rank: int, folder: Path, steps: int, save: Path | None) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=RANKS)
    first, second = Training(seed=0), Training(seed=1)
    norms = [first.step(*batch(step, rank)) for step in range(steps // 2)]
    first.save(folder / "checkpoint")
    second.load(folder / "checkpoint")
    norms += [second.step(*batch(step, rank)) for step in range(steps // 2, steps)]
    gathered = StateDictOptions(full_state_dict=True)
    weights = get_model_state_dict(second.model, options=gathered)
    if rank == 0 and save is not None:
        torch.save(weights, save)
    if rank == 0:
        apart = max(abs(ours - whole) / whole for ours, whole in norms)
        metrics = second.clipper.metrics()
        print(f"largest norm          {max(whole for _, whole in norms):8.2f}")
        print(f"threshold             {metrics['clip/threshold']:8.2f}")
        print(f"steps, both halves    {metrics['clip/steps']:8.0f}")
        print(f"clipped               {metrics['clip/clip_rate']:8.0%}")
        print(f"sharded to gathered   {apart:8.0e} apart at most")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        # Forked, the ranks need not import torch again.
        torch.multiprocessing.start_processes(
            train,
            args=(Path(folder), options.steps, options.save),
            nprocs=RANKS,
            start_method="fork",
        )


if __name__ == "__main__":
    main()
