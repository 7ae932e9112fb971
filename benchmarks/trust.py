"""Time and memory of a training step with `TrustClip`, against the optimizer's alone.

Run it as `python benchmarks/trust.py`. The target is 1.25 for foreach AdamW on
ResNet-50 and GPT. Within the bound, no weight is written again; beyond it, every row
is. On a machine that does other work, `--cpu-time` compares CPU time in one thread.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

import command
from autoclip_torch import TrustClip
from contenders import HISTORY, THREADS
from memory import peak_of_torch
from models import MODELS, Shape, make_parameters, tiny
from timing import alternate, clock, compare

KINDS = ("foreach", "fused")
RATES = {"TrustClip, within the bound": 1e-6, "TrustClip, beyond the bound": 0.1}
"""Learning rates. The root mean square of an update of AdamW is about the rate."""


def main() -> None:
    """Compare on each model, for each implementation of AdamW."""
    options = command.parse(make_parser())
    threads = 1 if options.cpu_time else THREADS
    now = command.choose_clock(options)
    torch.set_num_threads(threads)
    models = {"tiny": tiny} if options.quick else MODELS
    results: list[dict[str, Any]] = []
    memory: dict[str, dict[str, Any]] = {}
    for name, shapes in models.items():
        for kind in KINDS:
            steps = make_steps(shapes, kind)
            memory.setdefault(kind, {})[name] = measure_memory(shapes, steps)
            timed = {label: clock(step, now=now) for label, step in steps.items()}
            taken = alternate(timed, options.seconds)
            alone = taken[f"AdamW, {kind}"]
            results += compare(taken, alone, model=name, kind_of_adamw=kind)
            print(f"{name}, {kind}: measured", flush=True)
    numbers = {"results": results, "bytes": memory}
    numbers["clock"] = now.__name__
    command.finish(options, "trust", "torch", threads=threads, **numbers)


def make_parser() -> argparse.ArgumentParser:
    """Return the options of this benchmark."""
    parser = command.parser(__doc__, seconds=5.0, per="model and kind")
    command.add_cpu_time(parser)
    return parser


def make_steps(
    shapes: Callable[[], Iterator[Shape]], kind: str
) -> dict[str, Callable[[], object]]:
    """Return the steps of an optimizer alone and of two with a `TrustClip`."""
    steps = {f"AdamW, {kind}": make_optimizer(make_model(shapes), kind, 1e-6).step}
    for name, rate in RATES.items():
        model = make_model(shapes)
        optimizer = make_optimizer(model, kind, rate)
        clipper = TrustClip(model, optimizer, history_length=HISTORY)
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        clipper._filter.observe(norm * (1 + torch.rand(HISTORY)))
        steps[name] = optimizer.step
    return steps


def measure_memory(
    shapes: Callable[[], Iterator[Shape]], steps: dict[str, Callable[[], object]]
) -> dict[str, int]:
    """Return the bytes of the weights, and the peak of the first two steps of each.

    The first step allocates what is kept: the moments, and the copy of the weights.
    """
    sizes = {"weights": 4 * sum(map(math.prod, shapes()))}
    for name, step in steps.items():
        sizes[f"{name}, first step"] = peak_of_torch(step)
        sizes[f"{name}, second step"] = peak_of_torch(step)
    return sizes


def make_model(shapes: Callable[[], Iterator[Shape]]) -> torch.nn.Module:
    """Return a module of parameters whose gradients equal the weights."""
    model = torch.nn.Module()
    model.weights = torch.nn.ParameterList(make_parameters(shapes()))
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()
    return model


def make_optimizer(
    model: torch.nn.Module, kind: str, rate: float
) -> torch.optim.Optimizer:
    """Return an AdamW, "foreach" or "fused"."""
    return torch.optim.AdamW(
        model.parameters(), lr=rate, foreach=kind == "foreach", fused=kind == "fused"
    )


if __name__ == "__main__":
    main()
