"""Writes and reads a log: CSV for table programs, JSON lines with the settings."""

import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from os import PathLike, fspath
from typing import Any, NamedTuple

import numpy as np

from autoclip_core.checks import format_error
from autoclip_core.files.cells import is_empty, parse_number
from autoclip_core.files.collect import list_names
from autoclip_core.files.formats.csv_rows import read_csv_rows
from autoclip_core.files.formats.json_rows import read_json_lines
from autoclip_core.files.open_file import open_bytes, open_lines
from autoclip_core.files.replace_file import open_replacement
from autoclip_core.record.recorder import StepRecorder
from autoclip_core.record.saved import to_json
from autoclip_core.record.step import Array
from autoclip_core.record.store import STEP

Path = str | PathLike[str]

NAMES = STEP.names or ()
"""The columns of a log, apart from those of `Half.run`."""

ROWS, OTHERS = "rows", "other_clippers"

UPDATE = "update_"
"""What the names of the columns of updates begin with, except "step"."""


class Half(NamedTuple):
    """The columns of gradients or of updates in a file."""

    steps: Array
    """The steps, as an array of `STEP`."""
    run: Mapping[str, int]
    """What is the same in each step, by column: the rows, and other clippers."""
    prefix: str = ""
    """What the names begin with: "" for gradients."""


def list_halves(log: StepRecorder) -> list[Half]:
    """Return the columns of a log: of its gradients, of its updates, or both."""
    prefix = UPDATE if log._is_of_updates else ""
    others = log._run_totals().get(OTHERS, 0)
    run = {ROWS: log._row_count} | ({OTHERS: int(others)} if others else {})
    half = Half(log._store.steps(), run, prefix)
    return [half, *([] if log.updates is None else list_halves(log.updates))]


def write_csv(path: Path, *halves: Half) -> None:
    """Write the same steps of each half as CSV; every number reads back unchanged."""
    with open_replacement(path, newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(list_columns(halves))
        for step in join_halves(halves):
            writer.writerow([int(v) if isinstance(v, bool) else v for v in step])


def list_columns(halves: Sequence[Half]) -> list[str]:
    """Return the names of the columns of a file."""
    columns = ((half.prefix, (*NAMES[1:], *half.run)) for half in halves)
    return [NAMES[0], *(prefix + name for prefix, names in columns for name in names)]


def join_halves(halves: Sequence[Half]) -> Iterator[list[Any]]:
    """Yield the numbers of each step, in the order of the columns."""
    columns = [half.steps.tolist() for half in halves]
    for steps in zip(*columns, strict=True):
        values = [
            (*step[1:], *half.run.values())
            for half, step in zip(halves, steps, strict=True)
        ]
        yield [steps[0][0], *chain.from_iterable(values)]


def write_jsonl(path: Path, about: Mapping[str, Any], *halves: Half) -> None:
    """Write a line about the run, then one line per stored step.

    JSON has no infinity and no NaN: they are written as the strings "inf" and "nan".
    """
    names = list_columns(halves)
    with open_replacement(path, encoding="utf-8") as file:
        print(json.dumps({"clip_log": about}), file=file)
        for step in join_halves(halves):
            fields = {n: to_json(v) for n, v in zip(names, step, strict=True)}
            print(json.dumps(fields), file=file)


def read_csv(path: Path) -> tuple[dict[str, Any], Array]:
    """Return the updates in a file that `write_csv` wrote, if any, and the steps."""
    with open_bytes(fspath(path)) as file:
        return rows_to_steps(read_csv_rows(open_lines(file)), str(path))


def read_jsonl(path: Path) -> tuple[dict[str, Any], Array]:
    """Return the content of the line about the run, and the steps."""
    about: dict[str, Any] = {}

    def steps(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for row in rows:
            if "clip_log" in row:
                check_is_object(row["clip_log"])
                about.update(row["clip_log"])
            else:
                yield row

    with open_bytes(fspath(path)) as file:
        more, array = rows_to_steps(steps(read_json_lines(open_lines(file))), str(path))
    if "updates" in more:
        more["updates"] = {**about.get("updates", {}), **more["updates"]}
    return {**about, **more}, array


def check_is_object(value: Any) -> None:
    """Check that the line about a run holds a JSON object."""
    if not isinstance(value, dict):
        rule = "a JSON object, as to_jsonl wrote it"
        way_out = "delete the line to read the steps only"
        raise ValueError(format_error("the line clip_log", rule, value, way_out))


def rows_to_steps(
    rows: Iterable[Mapping[str, Any]], source: str
) -> tuple[dict[str, Any], Array]:
    """Return what the rows of a log say about its run, and its steps.

    Columns may have the prefix "clip/". Those with "update_" hold the updates; they are
    the steps if there are no others.
    """
    columns = collect_columns(rows)
    table = {name.removeprefix("clip/"): cells for name, cells in columns.items()}
    gradients = {n: c for n, c in table.items() if not n.startswith(UPDATE)}
    updates = {
        n.removeprefix(UPDATE): c for n, c in table.items() if n not in gradients
    }
    updates |= {"step": table["step"]} if "step" in table else {}
    if not {"norm", "threshold"} <= updates.keys():
        return read_run(gradients), table_to_steps(gradients, source)
    about: dict[str, Any] = {"is_of_updates": True, **read_run(updates)}
    steps = table_to_steps(updates, source)
    if "norm" not in gradients:
        return about, steps
    about = {"updates": {**about, "steps": steps}, **read_run(gradients)}
    return about, table_to_steps(gradients, source)


def collect_columns(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the cells of each column; a cell that a row lacks is None."""
    columns: dict[str, list[Any]] = {}
    for place, row in enumerate(rows):
        for name, cell in row.items():
            if name not in columns:
                columns[name] = [None] * place
            columns[name].append(cell)
        if len(row) < len(columns):
            for column in columns.values():
                column += [None] * (place + 1 - len(column))
    return columns


def read_run(table: Mapping[str, list[Any]]) -> dict[str, int]:
    """Return the numbers of `Half.run` that the table has."""
    run = {}
    for name, key in ((ROWS, "row_count"), (OTHERS, OTHERS)):
        counts = np.array(parse_numbers(table.get(name, ()), name))
        if counts.size:
            run[key] = int(check_whole(counts, name).max())
    return run


def table_to_steps(table: Mapping[str, list[Any]], source: str) -> Array:
    """Return the columns of a table as an array of `STEP`; errors name the source."""
    missing = [name for name in ("norm", "threshold") if name not in table]
    if missing and table:
        raise ValueError(
            f"{source} must have the columns norm and threshold, got "
            f"{list_names(table)}; to_csv and to_jsonl write them"
        )
    columns = {
        name: np.array(parse_numbers(table[name], name))
        for name in NAMES
        if name in table
    }
    if len({len(column) for column in columns.values()}) > 1:
        counts = ", ".join(f"{name} {len(c)}" for name, c in columns.items())
        raise ValueError(f"{source} must have no empty cells, got numbers in {counts}")
    norm = columns.get("norm", np.empty(0))
    threshold = columns.get("threshold", np.empty(0))
    is_above = norm > threshold
    steps = np.zeros(len(norm), STEP)
    steps["step"] = np.arange(len(norm))
    steps["finite"] = np.isfinite(norm)
    steps["clipped"] = is_above & np.isfinite(norm)
    steps["scale"] = np.where(is_above, threshold / np.where(is_above, norm, 1.0), 1.0)
    steps["scale"][~np.isfinite(norm)] = math.nan
    for name, column in columns.items():
        steps[name] = check_whole(column, name) if name == "step" else column
    return steps


def check_whole(column: Array, name: str) -> Array:
    """Return the numbers of steps or of rows, which must be whole numbers."""
    is_valid = (column >= 0) & (column <= 2.0**53) & (column == np.floor(column))
    if not is_valid.all():
        value = float(column[~is_valid][0])
        raise ValueError(format_error(name, "a whole number >= 0", value, ""))
    return column


def parse_numbers(cells: Iterable[Any], name: str) -> list[float]:
    """Return the numbers of a column; empty cells are left out.

    >>> parse_numbers(["1.5", "", None, "NaN", True], "norm")
    [1.5, nan, 1.0]
    """
    numbers = []
    for row, cell in enumerate(cells, start=1):
        if is_empty(cell):
            continue
        try:
            numbers.append(parse_number(cell))
        except ValueError:
            raise ValueError(
                f"column {name!r} must hold numbers, got {cell!r} in row {row}"
            ) from None
    return numbers
