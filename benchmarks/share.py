"""The share of a training step that clipping takes, in PyTorch, with AdamW.

Run it as `python benchmarks/share.py`; `--help` lists the options. Each round takes one
backward pass. Every clipper then clips the same gradients, and AdamW steps with and
without `TrustClip`. A share is the time that a way of clipping
adds, divided by the time of the whole step with it.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import command
from autoclip_torch import TrustClip
from contenders import HISTORY, REFERENCE, THREADS, make_contenders
from timing import LEAST_ROUNDS, spread
from training_models import MODELS, Training, tiny

SHOWN = (REFERENCE, "QuantileClip, global", "QuantileClip, per parameter")
SHOWN += ("AGC, per unit",)
FACTORS = {"nothing clipped": 0.01, "all clipped": 100.0}
"""A gradient over its weight; the thresholds are at about 1."""


def main() -> None:
    """Measure the shares on each model."""
    parser = command.parser(__doc__, seconds=40.0)
    meaning = "measure CPU time in one thread, on a machine that does other work"
    parser.add_argument("--cpu-time", action="store_true", help=meaning)
    options = command.parse(parser)
    threads = 1 if options.cpu_time else THREADS
    torch.set_num_threads(threads)
    models = {"tiny": tiny} if options.quick else MODELS
    taken = {name: measure(make(), options) for name, make in models.items()}
    found = {
        "milliseconds": {name: spread_all(parts, 1e3) for name, parts in taken.items()},
        "shares": {name: spread_all(find_shares(x), 1) for name, x in taken.items()},
    }
    command.finish(options, "share", "torch", threads=threads, **found)


Taken = dict[str, list[float]]
"""The seconds of each part of a step, round by round."""


def measure(training: Training, options: argparse.Namespace) -> Taken:
    """Return what the parts of a training step take, with each way to clip."""
    now = time.process_time if options.cpu_time else time.perf_counter
    parts = make_parts(training)
    taken: Taken = {name: [] for name in parts}
    end = time.perf_counter() + options.seconds
    while len(taken["backward"]) < LEAST_ROUNDS or time.perf_counter() < end:
        for name, (prepare, part) in parts.items():
            prepare()
            start = now()
            part()
            taken[name].append(now() - start)
    return taken


def find_shares(taken: Taken) -> Taken:
    """Return the share of each way to clip in the step that contains it."""
    shares: Taken = {}
    for name in taken:
        if name in ("backward", "AdamW"):
            continue
        # The step of an optimizer with `TrustClip` contains the step of AdamW.
        is_step = name.startswith("TrustClip")
        rounds = zip(taken[name], taken["backward"], taken["AdamW"], strict=True)
        shares[name] = [
            1 - (backward + step) / (backward + part + (0 if is_step else step))
            for part, backward, step in rounds
        ]
    return shares


def spread_all(taken: Taken, factor: float) -> dict[str, dict[str, float]]:
    """Return median and quartiles of each part, times a factor."""
    return {
        name: spread([factor * number for number in numbers])._asdict()
        for name, numbers in taken.items()
    }


Part = tuple[Callable[[], Any], Callable[[], Any]]
"""What prepares a part, not timed, and the part."""


def make_parts(training: Training) -> dict[str, Part]:
    """Return the parts of a step by name, in the order in which they run."""
    model = training.model
    parameters = [p for p in model.parameters() if p.requires_grad]
    weights = [parameter.detach().clone() for parameter in parameters]

    def backward() -> None:
        training.loss().backward()

    parts: dict[str, Part] = {"backward": (model.zero_grad, backward)}
    backward()
    set_gradients(parameters, weights, 1.0)
    contenders = {c.name: c for c in make_contenders(parameters)}
    for regime, factor in FACTORS.items():
        for name in SHOWN:
            contender = contenders[name]

            def prepare(
                factor: float = factor, restore: Any = contender.restore
            ) -> None:
                restore()
                set_gradients(parameters, weights, factor)

            parts[f"{name}, {regime}"] = prepare, contender.step
    return parts | make_optimizers(model, parameters, weights)


def make_optimizers(
    model: nn.Module, parameters: list[nn.Parameter], weights: list[Tensor]
) -> dict[str, Part]:
    """Return a step of AdamW alone, and with `TrustClip` in and beyond its bound."""

    def prepare() -> None:
        set_gradients(parameters, weights, 1.0)

    alone = torch.optim.AdamW(parameters, lr=1e-6)
    parts: dict[str, Part] = {"AdamW": (prepare, alone.step)}
    for name, rate in {"nothing clipped": 1e-6, "all clipped": 0.1}.items():
        optimizer = torch.optim.AdamW(parameters, lr=rate)
        TrustClip(model, optimizer, history_length=HISTORY)
        parts[f"TrustClip, {name}"] = prepare, optimizer.step
    return parts


@torch.no_grad()
def set_gradients(
    parameters: list[nn.Parameter], weights: list[Tensor], factor: float
) -> None:
    """Restore the weights, and make each gradient `factor` times its weight."""
    for parameter, weight in zip(reversed(parameters), reversed(weights), strict=True):
        parameter.copy_(weight)
        parameter.grad = weight * factor


if __name__ == "__main__":
    main()
