"""Measure the peak of what one step allocates: torch's memory, and NumPy's.

Run it as `python benchmarks/memory.py`. All gradients are clipped.
"""

import tracemalloc
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from contenders import make_contenders
from models import MODELS, make_parameters, set_gradients
from peers import make_peers

FACTOR = 100.0
"""A gradient over its weight: all are clipped."""


def main() -> None:
    """Print a line per contender and model."""
    print("peak KiB of one step, torch + NumPy; gradients: MiB of the gradients\n")
    print(f"{'':24}" + "".join(f"{name:>22}" for name in MODELS))
    columns = [measure(name) for name in MODELS]
    for name in columns[0]:
        cells = (column.get(name, "") for column in columns)
        print(f"{name:24}" + "".join(f"{cell:>22}" for cell in cells))


def measure(model: str) -> dict[str, str]:
    """Return a cell per contender."""
    parameters = make_parameters(MODELS[model]())
    set_gradients(parameters, 1.0)
    peers, _ = make_peers(parameters)
    size = 4 * sum(parameter.numel() for parameter in parameters)
    cells = {"gradients": f"{size / 2**20:.1f} MiB"}
    for contender in [*make_contenders(parameters), *peers]:

        def prepare(restore: Callable[[], Any] = contender.restore) -> None:
            restore()
            set_gradients(parameters, FACTOR)

        prepare()
        contender.step()
        prepare()
        torch_peak = peak_of_torch(contender.step)
        prepare()
        cells[contender.name] = (
            f"{torch_peak / 2**10:.0f} + {peak_of_python(contender.step) / 2**10:.0f}"
        )
    return cells


def peak_of_torch(step: Callable[[], Any]) -> int:
    """Return the most bytes of torch's CPU allocator that a step held at a time."""
    activities = [ProfilerActivity.CPU]
    with profile(activities=activities, profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes):
        held += change
        peak = max(peak, held)
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
    torch.set_num_threads(2)
    main()
