"""The share of a training step that clipping takes, in PyTorch, with AdamW.

Run it as `python benchmarks/share.py`; `--help` lists the options. Each round takes one
backward pass. Every clipper then clips the same gradients, and AdamW steps with and
without `TrustClip`. A share is the time that a way of clipping adds, divided by the
time of the whole step with it.
"""

import argparse
import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import command
from autoclip_torch import TrustClip
from contenders import HISTORY, REFERENCE, THREADS, make_contenders
from regimes import ALL, NOTHING, REGIMES
from shares import EACH, FIXED, GLOBAL, NO_CLIPPING, TRUST, UNIT, WAYS, find_shares
from timing import Timed, Times, alternate, clock, spread
from training_models import MODELS, Training, tiny

CONTENDERS = {FIXED: REFERENCE, GLOBAL: GLOBAL, EACH: EACH, UNIT: UNIT}
STEPS = {way: [f"{way}, {regime}" for regime in REGIMES] for way in WAYS}


def main() -> None:
    """Measure the shares on each model."""
    parser = command.parser(__doc__, seconds=40.0)
    command.add_cpu_time(parser)
    options = command.parse(parser)
    threads = 1 if options.cpu_time else THREADS
    torch.set_num_threads(threads)
    # Clipping and the optimizer's step are timed apart; in a run that is a mistake.
    warnings.filterwarnings("ignore", r".*clipper.step\(\) has no effect")
    models = {"tiny": tiny} if options.quick else MODELS
    taken = {name: measure(make(), options) for name, make in models.items()}
    numbers = {
        "milliseconds": {name: spread_all(parts) for name, parts in taken.items()},
        "shares": {
            name: find_shares(whole_steps(parts), STEPS)
            for name, parts in taken.items()
        },
    }
    command.finish(options, "share", "torch", threads=threads, **numbers)


def measure(training: Training, options: argparse.Namespace) -> Times:
    """Return what the parts of a training step take, with each way to clip."""
    parts = make_parts(training, command.choose_clock(options))
    return alternate(parts, options.seconds)


def whole_steps(taken: Times) -> Times:
    """Return the seconds of the whole steps that contain the parts, by their names."""
    backward, adamw = taken["backward"], taken["AdamW"]
    without = [a + b for a, b in zip(backward, adamw, strict=True)]
    steps = {NO_CLIPPING: without}
    for way, names in STEPS.items():
        # The step of an optimizer with `TrustClip` contains the step of AdamW.
        others = backward if way == TRUST else without
        for name in names:
            steps[name] = [a + b for a, b in zip(others, taken[name], strict=True)]
    return steps


def spread_all(taken: Times) -> dict[str, dict[str, float]]:
    """Return median and quartiles of each part, in milliseconds."""
    return {
        name: spread([1e3 * seconds for seconds in times])._asdict()
        for name, times in taken.items()
    }


def make_parts(training: Training, now: Callable[[], float]) -> dict[str, Timed]:
    """Return the parts of a step by name, timed by `now`."""
    model = training.model
    weights = [parameter.detach().clone() for parameter in model.parameters()]

    def backward() -> None:
        training.loss().backward()

    parts = {"backward": clock(backward, model.zero_grad, now)}
    parameters = list(model.parameters())
    set_gradients(parameters, weights, 1.0)
    contenders = {c.name: c for c in make_contenders(parameters)}
    for regime, factor in REGIMES.items():
        for way, name in CONTENDERS.items():
            contender = contenders[name]

            def prepare(
                factor: float = factor, restore: Any = contender.restore
            ) -> None:
                restore()
                set_gradients(parameters, weights, factor)

            parts[f"{way}, {regime}"] = clock(contender.step, prepare, now)
    _, optimizer = make_optimizer(model, 1e-6)
    parts["AdamW"] = clock_step(optimizer, weights, now)
    for regime, rate in {NOTHING: 1e-6, ALL: 0.1}.items():
        copied, optimizer = make_optimizer(model, rate)
        TrustClip(copied, optimizer, history_length=HISTORY)
        parts[f"{TRUST}, {regime}"] = clock_step(optimizer, weights, now)
    return parts


def make_optimizer(
    model: nn.Module, rate: float
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a copy of a model, and an AdamW of the copy."""
    copied = copy.deepcopy(model)
    return copied, torch.optim.AdamW(copied.parameters(), lr=rate)


def clock_step(
    optimizer: torch.optim.Optimizer, weights: list[Tensor], now: Callable[[], float]
) -> Timed:
    """Return the timed step of an optimizer, from the same weights each time."""
    parameters = optimizer.param_groups[0]["params"]
    return clock(optimizer.step, lambda: set_gradients(parameters, weights, 1.0), now)


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
