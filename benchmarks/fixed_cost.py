"""Split a step of a clipper into its parts, each timed within the step.

Run it as `python benchmarks/fixed_cost.py`; `--help` tells the options. All gradients
are clipped. What is neither norms nor decision nor product is the rest: to look up the
gradients, and to return the decision as tensors.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import command
from autoclip_torch import Clipper
from contenders import THREADS, Parameters, make_clippers
from models import MODELS, make_parameters, set_gradients, tiny
from regimes import ALL, REGIMES
from timing import Timed, alternate

PARTS = {"norms": "measure", "decide": "decide", "scale": "scale"}
"""The methods of a stepper; recording and counting are in `decide`."""
SHOWN = (
    "NormClip",
    "QuantileClip, global",
    "QuantileClip, per parameter",
    "AGC, per unit",
)


def main() -> None:
    """Split the steps on each model."""
    options = command.parse(command.parser(__doc__, seconds=4.0))
    torch.set_num_threads(THREADS)
    models = {"tiny": tiny} if options.quick else MODELS
    found = {
        name: split(make_parameters(shapes()), options.seconds)
        for name, shapes in models.items()
    }
    about = {"threads": THREADS, "microseconds": found}
    command.finish(options, "fixed_cost", "torch", **about)


def split(parameters: Parameters, seconds: float) -> dict[str, dict[str, float]]:
    """Return the median microseconds of each part of each clipper's step."""
    set_gradients(parameters, 1.0)
    clippers = make_clippers(parameters)
    logs: dict[str, list[dict[str, float]]] = {name: [] for name in SHOWN}
    steps = {name: logged(clippers[name], parameters, logs[name]) for name in SHOWN}
    alternate(steps, seconds)
    return {
        name: {part: 1e6 * statistics.median(s[part] for s in log) for part in log[0]}
        for name, log in logs.items()
    }


def logged(
    clipper: Clipper, parameters: Parameters, log: list[dict[str, float]]
) -> Timed:
    """Return a timed step that logs the seconds of its parts."""
    seen = clipper.state_dict()
    took: dict[str, float] = {}
    stepper = clipper._stepper
    for part, method in PARTS.items():
        setattr(stepper, method, noted(getattr(stepper, method), part, took))

    def timed() -> float:
        clipper.load_state_dict(seen)
        set_gradients(parameters, REGIMES[ALL])
        took.update(dict.fromkeys(PARTS, 0.0))
        start = time.perf_counter()
        clipper.step()
        seconds = time.perf_counter() - start
        log.append({"step": seconds, **took, "rest": seconds - sum(took.values())})
        return seconds

    return timed


def noted(
    function: Callable[..., Any], part: str, took: dict[str, float]
) -> Callable[..., Any]:
    """Return a function that adds what it took to its part."""

    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **kwargs)
        took[part] += time.perf_counter() - start
        return result

    return call


if __name__ == "__main__":
    main()
