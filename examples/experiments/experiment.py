"""What the experiments do alike: options, runs side by side, a table, a JSON file."""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

EVIDENCE = Path(__file__).parents[2] / "docs" / "evidence"
"""Where the pictures and results of full runs lie."""


@dataclass(frozen=True)
class Table:
    """Text in rows under column heads; the first column is named, the others count."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __str__(self) -> str:
        """Return the table in Markdown."""
        line = "| " + " | ".join(self.columns) + " |"
        rule = "| --- |" + " ---: |" * (len(self.columns) - 1)
        return "\n".join(
            [line, rule, *("| " + " | ".join(r) + " |" for r in self.rows)]
        )


def read_options(
    doc: str,
    arguments: Sequence[str] | None = None,
    flags: Mapping[str, str] | None = None,
) -> Any:
    """Return the options every experiment has: quick, workers, output.

    `flags` are an experiment's further options, by name, with their help.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    cores = os.cpu_count() or 1
    parser.add_argument("--quick", action="store_true", help="a trial of some seconds")
    parser.add_argument("--workers", type=int, default=min(cores, 4))
    help_ = "folder for picture and results (default docs/evidence; a trial: a new one)"
    parser.add_argument("--output", type=Path, help=help_)
    for name, text in (flags or {}).items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    options = parser.parse_args(arguments)
    if options.output is None:
        quick = options.quick
        options.output = Path(tempfile.mkdtemp()) if quick else EVIDENCE
    options.output.mkdir(parents=True, exist_ok=True)  # now, and not after the runs
    return options


def run_all(function: Callable[..., Any], cells: Iterable[Any], workers: int) -> Any:
    """Return `function(*cell)` of every cell in order; one worker runs them here."""
    cells = list(cells)
    start = time.perf_counter()
    if workers == 1:
        found = [function(*cell) for cell in cells]
    else:
        # torch holds threads, which a forked process would inherit halfway.
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            found = []
            for result in pool.map(function, *zip(*cells, strict=True)):
                found.append(result)
                print(f"\r{len(found)}/{len(cells)}", end="", file=sys.stderr)
    print(
        f"\r{len(cells)} runs in {time.perf_counter() - start:.0f} s", file=sys.stderr
    )
    return found


def save(
    name: str, output: Path, tables: dict[str, Table], results: Sequence[Any]
) -> None:
    """Print the tables, and write them with the results to `output`/`name`.json."""
    for title, table in tables.items():
        print(f"\n{title}\n\n{table}")
    texts = {title: str(table) for title, table in tables.items()}
    write_json(output / f"{name}.json", texts, results)
    print(f"\nThe picture and the results are {output / name}.png and .json")


def write_json(path: Path, tables: dict[str, str], results: Sequence[Any]) -> None:
    """Write the file, a result a line; NaN and infinity are errors."""
    lines = [json.dumps(r, default=float, allow_nan=False) for r in results]
    named, listed = json.dumps(tables, indent=1, ensure_ascii=False), ",\n".join(lines)
    text = f'{{"tables": {named},\n"results": [\n{listed}\n]}}\n'
    path.write_text(text, encoding="utf-8")
