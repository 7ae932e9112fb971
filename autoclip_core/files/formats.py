"""Reads the columns of CSV and JSON lines from W&B, TensorBoard and `ClipLog`."""

import csv
import json
from collections.abc import Iterable
from typing import Any

Table = dict[str, list[Any]]
"""Cells by column; an empty cell is "" or None."""


def read_csv_table(lines: Iterable[str], delimiter: str = ",") -> Table:
    """Return the columns of a CSV with a header; short lines end with empty cells.

    If a file has a single column and no header, the column is named "norm".

    Raises:
      ValueError: a line is longer than the header, or two columns have the same name.

    >>> read_csv_table(["step,norm", "0,1.5", "1,"])
    {'step': ['0', '1'], 'norm': ['1.5', '']}
    """
    rows = [row for row in csv.reader(lines, delimiter=delimiter) if row]
    if not rows:
        return {}
    header = [name.strip() for name in rows[0]]
    if len(header) == 1 and is_number(header[0]):
        return {"norm": [row[0] for row in rows]}
    table: Table = {name: [] for name in header}
    if len(table) < len(header):
        duplicate = next(name for name in header if header.count(name) > 1)
        raise ValueError(
            f"the columns must have different names, got {duplicate!r} twice"
        )
    for number, row in enumerate(rows[1:], start=2):
        if len(row) > len(header):
            raise ValueError(
                f"line {number} must have {len(header)} cells as the header, got "
                f"{len(row)}"
            )
        row += [""] * (len(header) - len(row))
        for name, cell in zip(header, row, strict=True):
            table[name].append(cell)
    return table


def read_jsonl_table(lines: Iterable[str]) -> tuple[Table, list[dict[str, Any]]]:
    """Return the columns of JSON lines, and the lines that hold only nested values.

    A line is an object, or a number, which goes into the column "norm". If a line lacks
    a column, the cell is empty.

    Raises:
      ValueError: a line is neither an object nor a number.

    >>> read_jsonl_table(['{"norm": 1.5}', '{"norm": "inf", "step": 1}'])[0]
    {'norm': [1.5, 'inf'], 'step': [None, 1]}
    """
    table: Table = {}
    other_lines: list[dict[str, Any]] = []
    count = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = parse_line(line, number)
        cells = {k: v for k, v in row.items() if not isinstance(v, dict | list)}
        if not cells:
            other_lines.append(row)
            continue
        for name, value in cells.items():
            table.setdefault(name, [None] * count).append(value)
        count += 1
        for column in table.values():
            column += [None] * (count - len(column))
    return table, other_lines


def parse_line(line: str, number: int) -> dict[str, Any]:
    """Return one JSON line as an object; `number` is for errors."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"line {number} is not JSON: {error}") from None
    if isinstance(row, dict):
        return row
    if isinstance(row, int | float | str):
        return {"norm": row}
    raise ValueError(
        f"line {number} must be an object or a number, got {line.strip()[:40]!r}"
    )


def parse_numbers(cells: Iterable[Any], name: str) -> list[float]:
    """Return the numbers of a column; empty cells are left out.

    Raises:
      ValueError: a cell is not a number.

    >>> parse_numbers(["1.5", "", None, "NaN", True], "norm")
    [1.5, nan, 1.0]
    """
    numbers = []
    for row, cell in enumerate(cells, start=1):
        if cell is None or (isinstance(cell, str) and not cell.strip()):
            continue
        try:
            numbers.append(float(cell))
        except (TypeError, ValueError):
            raise ValueError(
                f"column {name!r} must hold numbers, got {cell!r} in row {row}"
            ) from None
    return numbers


def is_number(text: str) -> bool:
    """Return whether a cell is a number; NaN and infinity are numbers too."""
    try:
        float(text)
    except ValueError:
        return False
    return True
