"""Train a recurrent network with and without clipping: a table and a picture.

Run it as `python examples/demo.py`; `--help` lists the options.
"""

import argparse
import os
import sys
import time
from importlib.util import find_spec
from pathlib import Path

MODULES = {"torch": "demo_torch", "tf": "demo_tf", "jax": "demo_jax"}
"""The module of each framework, with a function `train(method, seed, steps)`."""

NEEDS = {
    "torch": ["torch", "array_api_compat", "autoclip_torch"],
    "tf": ["tensorflow", "keras", "autoclip_tf"],
    "jax": ["jax", "optax", "autoclip_jax"],
}
COMMON_NEEDS = ["numpy", "sklearn", "matplotlib", "rich", "autoclip_core"]
PIP_NAMES = {"sklearn": "scikit-learn", "array_api_compat": "array-api-compat"}
FORMATS = (".png", ".pdf", ".svg")


def main() -> int:
    """Run the demo and return the exit status."""
    options = read_options()
    problem = find_problem(options.framework, options.output)
    if problem:
        print(f"demo: {problem}", file=sys.stderr)
        return 2
    try:
        compare(options)
    except KeyboardInterrupt:
        print("demo: stopped", file=sys.stderr)
        return 130
    return 0


def read_options() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--framework", choices=MODULES, default="torch")
    add("--seeds", type=positive, default=5, help="runs per method (default 5)")
    add("--steps", type=positive, default=1200, help="length of a run (default 1200)")
    cores = os.cpu_count() or 1
    add("--workers", type=positive, default=min(cores, 4), help="runs side by side")
    add("--output", type=Path, default=Path("demo.png"), help="the picture's file")
    add("--quick", action="store_true", help="2 seeds, 40 steps: a trial")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.steps = 2, 40
    return options


def positive(text: str) -> int:
    """Return a whole number above 0."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be >= 1, got {number}")
    return number


def find_problem(framework: str, output: Path) -> str | None:
    """Return why the demo cannot run here, in one line, or None."""
    missing = [n for n in NEEDS[framework] + COMMON_NEEDS if find_spec(n) is None]
    if missing:
        names = ", ".join(PIP_NAMES.get(name, name) for name in missing)
        return (
            f"not installed: {names}. `make demo` installs everything; so does "
            f'pip install "autoclip-toolkit[{framework},plot]" scikit-learn rich'
        )
    if output.suffix not in FORMATS:
        return f"--output must end in {', '.join(FORMATS)}, got {str(output)!r}"
    if not output.parent.is_dir():
        return f"--output: there is no folder {str(output.parent)!r}"
    return None


def compare(options: argparse.Namespace) -> None:
    """Train everything, print the table, save the picture."""
    # Only here is it known that the packages are installed.
    from rich.console import Console

    from demo_picture import draw
    from demo_runs import run_all
    from demo_table import LEGEND, make_table, verdict
    from demo_task import METHODS, SETTING

    width = None if sys.stdout.isatty() else 100  # rich takes a pipe to be 80 wide
    console = Console(highlight=False, width=width)
    console.print(SETTING, end="\n\n", soft_wrap=True)
    start = time.perf_counter()
    runs = run_all(
        MODULES[options.framework],
        METHODS,
        range(options.seeds),
        options.steps,
        options.workers,
        console,
    )
    seconds = time.perf_counter() - start
    count = len(METHODS) * options.seeds
    console.print(f"{count} runs of {options.steps} steps in {seconds:.0f} s")
    console.print(make_table(runs))
    console.print(LEGEND, end="\n\n", soft_wrap=True)
    console.print(verdict(runs), soft_wrap=True)
    draw(runs, options.output)
    console.print(f"The picture is in {options.output}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
