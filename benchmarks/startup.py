"""CPU time of the first second: the import of each adapter, and two commands.

Run it as `python benchmarks/startup.py`; `--help` lists the options. Each import and
each command runs in processes of its own. The import of the framework is not counted.
The garbage collection that starts during an import is listed on its own, because it
traverses what the framework has made.
"""

import os
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

import command
from layout import spaced
from timing import spread

FRAMEWORKS = {
    "autoclip_torch": "torch",
    "autoclip_jax": "jax, optax",
    "autoclip_tf": "keras, tensorflow",
}
ROWS = 10**6

TIMED_IMPORT = """
import {framework}
import gc, time
times, now = [], time.process_time
gc.callbacks.append(lambda phase, about: times.append(now()))
start = now()
import {adapter}
total, collected = now() - start, sum(times[1::2]) - sum(times[::2])
print(1e3 * (total - collected), 1e3 * collected)
"""


def run(*arguments: str) -> str:
    """Run Python in a new process, and return what it prints."""
    quiet = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    command_line = [sys.executable, *arguments]
    return subprocess.run(
        command_line, capture_output=True, text=True, check=True, env=quiet
    ).stdout


def time_import(adapter: str, rounds: int) -> dict[str, Any]:
    """Return the milliseconds of an import, and of the collections during it."""
    code = TIMED_IMPORT.format(framework=FRAMEWORKS[adapter], adapter=adapter)
    run("-c", code)  # compiles the files
    pairs = [map(float, run("-c", code).split()) for _ in range(rounds)]
    imports, collections = map(spread, zip(*pairs, strict=True))
    return {"itself": imports._asdict(), "collections": collections._asdict()}


def time_command(rounds: int, *arguments: str) -> dict[str, Any]:
    """Return the milliseconds of a command."""
    times = [_children_seconds()]
    for _ in range(rounds):
        run("-m", "autoclip_core", *arguments)
        times.append(_children_seconds())
    return {"itself": spread([1e3 * (b - a) for a, b in pairwise(times)])._asdict()}


def _children_seconds() -> float:
    """Return the CPU time of all processes that have ended."""
    used = os.times()
    return used.children_user + used.children_system


def write_norms(path: Path, rows: int) -> None:
    """Write a CSV of steps and norms."""
    norms = np.random.default_rng(0).lognormal(size=rows)
    lines = (f"{step},{norm:.6g}" for step, norm in enumerate(norms))
    path.write_text("\n".join(["step,grad_norm", *lines]) + "\n")


def main() -> None:
    """Time the imports and the commands."""
    options = command.parse(command.parser(__doc__))
    adapters, rounds, rows = list(FRAMEWORKS), 5, ROWS
    if options.quick:
        adapters, rounds, rows = [], 2, 100
    results = {f"import {name}": time_import(name, rounds) for name in adapters}
    results["autoclip --help"] = time_command(rounds, "--help")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "norms.csv"
        write_norms(path, rows)
        took = time_command(min(rounds, 3), "suggest", str(path))
        results[f"autoclip suggest, {spaced(rows)} rows"] = took
    command.finish(options, "startup", results=results)


if __name__ == "__main__":
    main()
