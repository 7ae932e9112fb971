"""Writes and reads a log: CSV for table programs, JSON lines with the run's settings.

The keys of the JSON lines are part of the format. "told" holds the totals that were
read from metrics, "past" the thinned steps.
"""

import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike, fspath
from typing import Any

import numpy as np

from autoclip_core.checks import format_error
from autoclip_core.files.cells import is_empty, parse_number
from autoclip_core.files.collect import list_names
from autoclip_core.files.csv_rows import read_csv_rows
from autoclip_core.files.json_rows import read_json_lines
from autoclip_core.files.open_file import open_bytes, open_lines
from autoclip_core.record.row_counts import RowCounts
from autoclip_core.record.step import Array
from autoclip_core.record.store import STEP, Store

from .replace_file import open_replacement

Path = str | PathLike[str]

NAMES = STEP.names or ()


def write_csv(path: Path, steps: Array) -> None:
    """Write steps as CSV; every number reads back unchanged."""
    with open_replacement(path, newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(NAMES)
        for step in steps.tolist():
            writer.writerow([int(v) if isinstance(v, bool) else v for v in step])


def write_jsonl(
    path: Path,
    store: Store,
    rows: RowCounts,
    settings: Mapping[str, str],
    logged_totals: Mapping[str, int],
) -> None:
    """Write a line about the run, then one line per stored step.

    JSON has no infinity and no NaN: they are written as the strings "inf" and "nan".
    """
    steps = store.steps()
    about: dict[str, Any] = {"settings": settings, "told": logged_totals}
    if rows.names:
        about["rows"] = rows.to_dict()
    if store.moved:
        highest = [list(map(to_json, step)) for step in store.highest().tolist()]
        about["past"] = {
            "stride": store.stride, "moved": store.moved, "highest": highest
        }  # fmt: skip
        about["totals"] = store.totals.to_dict()
    with open_replacement(path, encoding="utf-8") as file:
        print(json.dumps({"clip_log": about}), file=file)
        for step in steps.tolist():
            fields = {n: to_json(v) for n, v in zip(NAMES, step, strict=True)}
            print(json.dumps(fields), file=file)


def to_json(value: Any) -> Any:
    """Return a value as it is, or NaN and infinity as text."""
    is_nonfinite = isinstance(value, float) and not math.isfinite(value)
    return str(value) if is_nonfinite else value


def read_csv(path: Path) -> Array:
    """Return the steps in a file that `write_csv` wrote."""
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
        rows = read_json_lines(open_lines(file))
        return about, rows_to_steps(steps(rows), str(path))


def check_is_object(value: Any) -> None:
    """Check that the line about a run holds a JSON object."""
    if not isinstance(value, dict):
        rule = "a JSON object, as to_jsonl wrote it"
        way_out = "delete the line to read the steps only"
        raise ValueError(format_error("the line clip_log", rule, value, way_out))


def parse_past(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `Store.refill` from what `write_jsonl` wrote."""
    steps = [tuple(map(float, step)) for step in saved["highest"]]
    return {**saved, "highest": np.array(steps, STEP)}


def rows_to_steps(rows: Iterable[Mapping[str, Any]], source: str) -> Array:
    """Return the rows of a log as an array of `STEP`; see `table_to_steps`."""
    table: dict[str, list[Any]] = {}
    for place, row in enumerate(rows):
        for name, cell in row.items():
            if name not in table:
                table[name] = [None] * place
            table[name].append(cell)
        if len(row) < len(table):
            for column in table.values():
                column += [None] * (place + 1 - len(column))
    return table_to_steps(table, source)


def table_to_steps(table: Mapping[str, list[Any]], source: str) -> Array:
    """Return the columns of a table as an array of `STEP`.

    Args:
      table: cells by column; columns may have the prefix "clip/".
      source: the name of the file, for errors.

    Raises:
      ValueError: the column norm or threshold is missing, or a cell is not a number.
    """
    table = {name.removeprefix("clip/"): cells for name, cells in table.items()}
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
        steps[name] = check_steps(column) if name == "step" else column
    return steps


def check_steps(column: Array) -> Array:
    """Return the numbers of the steps, which must be whole numbers.

    Raises:
      ValueError: a number is negative, has a fraction or is above 2**53.
    """
    is_valid = (column >= 0) & (column <= 2.0**53) & (column == np.floor(column))
    if not is_valid.all():
        value = float(column[~is_valid][0])
        raise ValueError(format_error("step", "a whole number >= 0", value, ""))
    return column


def parse_numbers(cells: Iterable[Any], name: str) -> list[float]:
    """Return the numbers of a column; empty cells are left out.

    Raises:
      ValueError: a cell is not a number.

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
