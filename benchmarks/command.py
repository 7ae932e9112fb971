"""What all benchmarks share: `--seconds`, `--json`, `--quick`, and how they end."""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from layout import plain
from tables import make_tables

CPU_FACTS = Path("/proc/cpuinfo")


def parser(
    description: str, *, seconds: float | None = None, per: str = "model"
) -> argparse.ArgumentParser:
    """Return a parser of the shared options; seconds are for what goes on in rounds."""
    made = argparse.ArgumentParser(description=description.splitlines()[0])
    add = made.add_argument
    if seconds is not None:
        meaning = f"per {per} (default {seconds:g})"
        add("--seconds", type=float, default=seconds, help=meaning)
    add("--json", type=Path, metavar="FILE", help="write all numbers there, too")
    add("--quick", action="store_true", help="something tiny: only a trial")
    return made


def add_cpu_time(made: argparse.ArgumentParser) -> None:
    """Add the option that measures CPU time in one thread."""
    meaning = "measure CPU time in one thread, on a machine that does other work"
    made.add_argument("--cpu-time", action="store_true", help=meaning)


def choose_clock(options: argparse.Namespace) -> Callable[[], float]:
    """Return the clock that `--cpu-time` chooses."""
    return time.process_time if options.cpu_time else time.perf_counter


def parse(made: argparse.ArgumentParser) -> argparse.Namespace:
    """Return the options; a trial takes no time, and what cannot be saved is refused.

    Raises:
      SystemExit: the folder of a file to be written is not there.
    """
    options = made.parse_args()
    if options.json and not options.json.parent.is_dir():
        made.error(f"--json: there is no folder {str(options.json.parent)!r}")
    if options.quick and hasattr(options, "seconds"):
        options.seconds = 0.0
    return options


def finish(
    options: argparse.Namespace, script: str, *packages: str, **numbers: Any
) -> None:
    """Print the tables of what a script found, and save it where asked to.

    Args:
      options: of the command line; `--json` says where the numbers go.
      script: which one it was; `tables.py` knows what its numbers mean.
      packages: whose versions matter.
      found: all numbers.
    """
    saved = {"script": script, "trial": options.quick, "machine": about(*packages)}
    saved |= numbers
    for name, rows in make_tables(saved).items():
        print(f"\n{name}\n\n{plain(rows)}")
    if options.json:
        options.json.write_text(json.dumps(saved, indent=1) + "\n")
        print(f"\nAll numbers are in {options.json}")


def about(*packages: str) -> dict[str, Any]:
    """Return what the numbers were measured with."""
    return {
        "processor": processor(),
        "processors": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("numpy", *packages)},
    }


def processor() -> str:
    """Return the model of the processor, as the system calls it."""
    facts = CPU_FACTS.read_text().splitlines() if CPU_FACTS.exists() else []
    models = [line.partition(":")[2] for line in facts if line.startswith("model name")]
    return models[0].strip() if models else platform.processor() or platform.machine()
