"""What the command lines of all benchmarks share: `--seconds`, `--json`, `--quick`."""

import argparse
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any


def parser(
    description: str, *, seconds: float | None = None, per: str = "model"
) -> argparse.ArgumentParser:
    """Return a parser of the shared options; seconds are for what goes on in rounds."""
    made = argparse.ArgumentParser(description=description.splitlines()[0])
    add = made.add_argument
    if seconds is not None:
        told = f"per {per} (default {seconds:g})"
        add("--seconds", type=float, default=seconds, help=told)
    add("--json", type=Path, metavar="FILE", help="write all numbers there, too")
    add("--quick", action="store_true", help="something tiny: only a trial")
    return made


def parse(made: argparse.ArgumentParser) -> argparse.Namespace:
    """Return the options; a trial takes no time, and what cannot be saved is refused.

    Raises:
      SystemExit: the folder of a file to be written is not there.
    """
    options = made.parse_args()
    for name in ("json", "picture"):
        path = getattr(options, name, None)
        if path and not path.parent.is_dir():
            made.error(f"--{name}: there is no folder {str(path.parent)!r}")
    if options.quick and hasattr(options, "seconds"):
        options.seconds = 0.0
    return options


def save(path: Path | None, *packages: str, **found: Any) -> None:
    """Write the numbers as JSON, after what they were measured with."""
    if path is None:
        return
    about = {
        "machine": platform.machine(),
        "processors": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("numpy", *packages)},
    }
    path.write_text(json.dumps(about | found, indent=1) + "\n")
    print(f"\nAll numbers are in {path}")
