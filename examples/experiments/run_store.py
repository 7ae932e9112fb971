"""Runs whose results are kept as they end: what was stopped goes on where it was."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple


def read_results(path: Path, run_type: type[NamedTuple]) -> dict[Any, dict[str, Any]]:
    """Return the stored results by run. Half a line, of a killed process, is left out.

    Args:
      path: a file with a JSON object in each line.
      run_type: its fields name the values that identify a run.
    """
    results = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for line in lines:
        try:
            result = json.loads(line)
        except json.JSONDecodeError:
            continue
        results[run_type(*(result[name] for name in run_type._fields))] = result
    return results


def run_missing(
    function: Callable[[Any], dict[str, Any]],
    runs: Sequence[Any],
    path: Path,
    workers: int,
) -> dict[Any, dict[str, Any]]:
    """Run what the file lacks, append each result to it, and return all results."""
    run_type = type(runs[0])
    results = read_results(path, run_type)
    missing = [run for run in runs if run not in results]
    with path.open("a", encoding="utf-8") as file:
        if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            file.write("\n")
        done = zip(missing, call_all(function, missing, workers), strict=True)
        for count, (run, result) in enumerate(done, 1):
            file.write(json.dumps(result, ensure_ascii=False, allow_nan=False) + "\n")
            file.flush()
            results[run] = result
            print(f"\r{count}/{len(missing)}", end="", file=sys.stderr)
    return results


def call_all(
    function: Callable[[Any], Any], runs: Sequence[Any], workers: int
) -> Iterator[Any]:
    """Yield the result of each run in order; one worker runs them in this process."""
    if workers == 1:
        yield from map(function, runs)
        return
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        yield from pool.map(function, runs)
