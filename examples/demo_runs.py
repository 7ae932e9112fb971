"""All runs of the demo, side by side in worker processes, with progress bars."""

from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib import import_module
from multiprocessing import get_context
from signal import SIG_IGN, SIGINT, signal

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from demo_table import mean_accuracy
from demo_task import Method, Run


def run_all(
    module: str,
    methods: Sequence[Method],
    seeds: Sequence[int],
    steps: int,
    workers: int,
    console: Console,
) -> dict[Method, list[Run]]:
    """Train every method with every seed; the result does not depend on the workers.

    Args:
      module: what has the framework's `train(method, seed, steps)`.
      methods: the rows of the table.
      seeds: each gives the same initial weights and batches to every method.
      steps: the length of a run.
      workers: how many runs go side by side, each in a process of its own.
      console: where the progress bars are shown.
    """
    # Frameworks hold threads and locks, which a forked process would inherit halfway.
    # Ctrl-C is for this process alone; it stops the others.
    spawn = get_context("spawn")
    with (
        ProcessPoolExecutor(workers, spawn, signal, (SIGINT, SIG_IGN)) as pool,
        progress_bars(console) as progress,
    ):
        bars = {
            method: progress.add_task(method.label, total=len(seeds), note="")
            for method in methods
        }
        futures = [
            pool.submit(train_one, module, method, seed, steps)
            for method in methods
            for seed in seeds
        ]
        runs: dict[Method, list[Run]] = defaultdict(list)
        try:
            for future in as_completed(futures):
                run = future.result()
                runs[run.method].append(run)
                note = f"accuracy {mean_accuracy(runs[run.method]):.3f}"
                progress.update(bars[run.method], advance=1, note=note)
        finally:
            pool.shutdown(cancel_futures=True)  # else a failure waits for all runs
    return {method: sorted(runs[method], key=lambda r: r.seed) for method in methods}


def train_one(module: str, method: Method, seed: int, steps: int) -> Run:
    """Train one network; this is what a worker does."""
    run: Run = import_module(module).train(method, seed, steps)
    return run


def progress_bars(console: Console) -> Progress:
    """Return one bar per method, counting seeds."""
    return Progress(
        TextColumn("{task.description:24}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )
