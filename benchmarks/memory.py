"""Measure the peak of what one step allocates: torch's memory, and NumPy's.

Run it as `python benchmarks/memory.py`. All gradients are clipped.
"""

import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import command
from contenders import THREADS, make_contenders
from models import MODELS, Shape, make_parameters, set_gradients, tiny
from peers import make_peers

FACTOR = 100.0
"""A gradient over its weight: all are clipped."""


def main() -> None:
    """Measure each contender on each model."""
    options = command.parse(command.parser(__doc__))
    torch.set_num_threads(THREADS)
    models = {"tiny": tiny} if options.quick else MODELS
    peaks = {name: measure(shapes) for name, shapes in models.items()}
    numbers = {"peak_bytes_of_torch_and_of_python": peaks}
    command.finish(options, "memory", "torch", **numbers)


def measure(shapes: Callable[[], Iterator[Shape]]) -> dict[str, tuple[int, ...]]:
    """Return the peaks of each contender, in bytes."""
    parameters = make_parameters(shapes())
    set_gradients(parameters, 1.0)
    peers, _ = make_peers(parameters)
    size = 4 * sum(parameter.numel() for parameter in parameters)
    peaks: dict[str, tuple[int, ...]] = {"gradients": (size,)}
    for contender in [*make_contenders(parameters), *peers]:

        def prepare(restore: Callable[[], Any] = contender.restore) -> None:
            restore()
            set_gradients(parameters, FACTOR)

        prepare()
        contender.step()
        prepare()
        torch_peak = peak_of_torch(contender.step)
        prepare()
        peaks[contender.name] = torch_peak, peak_of_python(contender.step)
    return peaks


def peak_of_torch(step: Callable[[], Any]) -> int:
    """Return the most bytes of torch's CPU allocator that a step held at a time."""
    activities = [ProfilerActivity.CPU]
    with profile(activities=activities, profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    used = peak = 0
    for _, change in sorted(changes):
        used += change
        peak = max(peak, used)
    return peak


def peak_of_python(step: Callable[[], Any]) -> int:
    """Return the same of what Python and NumPy allocated."""
    tracemalloc.start()
    try:
        step()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


if __name__ == "__main__":
    main()
