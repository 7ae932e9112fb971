"""Split a step of a clipper into its parts, each timed within the step.

Run it as `python benchmarks/fixed_cost.py`; `--help` lists the options. All gradients
are clipped. What is neither norms nor decision nor product is the rest: to look up the
gradients, and to return the decision as tensors. Before a step, a clipper compares its
parameters with those of its optimizer or its module, and in some steps checks that it
clips what is trained; both are timed on their own.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

import command
from autoclip_torch import Clipper, NormClip
from autoclip_torch.observer.active_clippers import check_coverage
from contenders import THREADS, Parameters, make_clippers
from models import MODELS, make_parameters, set_gradients, tiny
from regimes import ALL, REGIMES
from timing import Timed, alternate, clock

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
    split_steps = {
        name: split(make_parameters(shapes()), options.seconds)
        for name, shapes in models.items()
    }
    torch.set_num_threads(1)
    checks = {
        name: time_checks(make_parameters(shapes()), options.seconds)
        for name, shapes in models.items()
    }
    about = {"threads": THREADS, "microseconds": split_steps, "checks": checks}
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


def time_checks(parameters: Parameters, seconds: float) -> dict[str, float]:
    """Return the mean microseconds of the checks of each step, and of a whole step.

    It is CPU time of one thread: threads that wait for each other count as busy. Not
    all is compared in every step, so the median would hide the cost. What it takes to
    read the clock is subtracted.
    """
    set_gradients(parameters, 1.0)
    optimizer = torch.optim.SGD(parameters)
    by_hand = NormClip(make_module(parameters), max_norm=1.0)
    attached = NormClip(parameters, max_norm=1.0)
    attached.attach(optimizer)
    swap = attached._coverage.swap
    assert swap is not None
    decision = by_hand.step()

    def check_by_hand() -> None:
        by_hand._parameters.follow()
        check_coverage(by_hand, [optimizer])
        by_hand._loop_check._other_model.end_clip(decision)
        by_hand._loop_check._other_model.restart()

    def check_attached() -> None:
        attached._follow_optimizers(optimizer)
        swap(optimizer, (), {})  # torch calls it after the step

    contenders = {
        "step": NormClip(parameters, max_norm=1e30).step,
        "by hand, with a module": check_by_hand,
        "attached to an optimizer": check_attached,
        "clock": lambda: None,
    }
    steps = {
        name: clock(step, now=time.process_time) for name, step in contenders.items()
    }
    alternate(steps, 0.0)  # the first comparison lists the members
    taken = alternate(steps, seconds)
    means = {name: 1e6 * statistics.fmean(times) for name, times in taken.items()}
    clock_mean = means.pop("clock")
    return {name: mean - clock_mean for name, mean in means.items()}


def make_module(parameters: Parameters) -> torch.nn.Module:
    """Return a tree of modules: a leaf for two parameters, a branch for two leaves."""
    leaves = [
        torch.nn.ParameterList(parameters[i : i + 2]) for i in _every_second(parameters)
    ]
    return torch.nn.ModuleList(
        torch.nn.ModuleList(leaves[i : i + 2]) for i in _every_second(leaves)
    )


def _every_second(items: Sequence[Any]) -> range:
    return range(0, len(items), 2)


def logged(
    clipper: Clipper, parameters: Parameters, log: list[dict[str, float]]
) -> Timed:
    """Return a timed step that logs the seconds of its parts."""
    state = clipper.state_dict()
    took: dict[str, float] = {}
    stepper = clipper._stepper
    for part, method in PARTS.items():
        setattr(stepper, method, noted(getattr(stepper, method), part, took))

    def timed() -> float:
        clipper.load_state_dict(state)
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
