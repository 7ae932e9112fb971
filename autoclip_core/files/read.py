"""Reads a series of norms from CSV, JSON lines or .npy, from a path or stdin."""

import io
import json
import re
import sys
from tokenize import TokenError
from typing import Any, NamedTuple

import numpy as np

from .formats import Table, parse_numbers, read_csv_table, read_jsonl_table

INDEX_WORDS = {"step", "steps", "epoch", "epochs", "time", "timestamp", "runtime"}
"""Names of columns that hold the step or the time."""

QUALIFIERS = {"global", "wall", "relative", "process", "train", "trainer", "training"}
"""Words that may stand before the name of such a column, as in "global step"."""


class Series(NamedTuple):
    """The norms in a file."""

    column: str
    """The name of their column."""
    norms: list[float]


def read_series(path: str, column: str | None = None) -> Series:
    """Return the norms of a file; "-" is stdin.

    Args:
      path: the file; its content determines the format, not its name.
      column: the column of the norms; None to choose it with `choose_column`.

    Raises:
      OSError: the file cannot be read.
      ValueError: the column does not exist, contains text, or is empty.
    """
    return table_to_series(read_table(path)[0], column)


def table_to_series(table: Table, column: str | None) -> Series:
    """Return the norms in a table, from the column that `choose_column` returns."""
    name = choose_column(table, column)
    norms = parse_numbers(table[name], name)
    if not norms:
        raise ValueError(f"column {name!r} is empty: it must hold at least one norm")
    return Series(name, norms)


def read_table(path: str) -> tuple[Table, list[dict[str, Any]]]:
    """Return the columns of a file of any of the three formats.

    The second value holds the JSON lines with only nested values, such as the first
    line of `ClipLog.to_jsonl`.
    """
    if path == "-":
        data = sys.stdin.buffer.read()
    else:
        with open(path, "rb") as file:
            data = file.read()
    if data.startswith(b"\x93NUMPY"):
        return array_to_table(load_array(data)), []
    text = data.decode("utf-8-sig")
    start = text.lstrip()[:1]
    if start == "[":
        text = "\n".join(json.dumps(line) for line in json.loads(text))
    if start in ("{", "["):
        return read_jsonl_table(text.splitlines())
    header = text.lstrip().partition("\n")[0]
    unquoted = re.sub(r'"[^"]*"', "", header)
    delimiter = max(",;\t", key=unquoted.count)  # a comma if there is none of them
    return read_csv_table(io.StringIO(text, newline=""), delimiter), []


def load_array(data: bytes) -> Any:
    """Return the array of a .npy file; a damaged header raises ValueError."""
    try:
        return np.load(io.BytesIO(data), allow_pickle=False)
    except (SyntaxError, MemoryError, TokenError) as error:
        raise ValueError(f"the header of the .npy file is damaged: {error}") from None


def array_to_table(array: Any) -> Table:
    """Return an array as one column, or a structured array as one column per field."""
    if array.ndim != 1:
        raise ValueError(f"the array must have one dimension, got shape {array.shape}")
    if array.dtype.names:
        return {name: array[name].tolist() for name in array.dtype.names}
    if array.dtype.kind not in "fiu":
        raise ValueError(f"the array must hold real numbers, got {array.dtype}")
    return {"norm": array.tolist()}


def choose_column(table: Table, column: str | None) -> str:
    """Return the column that holds the norms.

    Without a name it is the only column except step, epoch and time, or else the only
    column whose name contains "norm". The columns __MIN and __MAX, which W&B writes for
    each column, are ignored. A column "run - name" of W&B can be given as "name".

    Raises:
      ValueError: no column or several columns match; the message lists the columns.

    >>> choose_column({"Wall time": [], "Step": [], "Value": []}, None)
    'Value'
    >>> wandb = {"Step": [], "a - norm": [], "a - norm__MIN": [], "a - norm__MAX": []}
    >>> choose_column(wandb, None), choose_column(wandb, "norm")
    ('a - norm', 'a - norm')
    """
    if not table:
        raise ValueError("it is empty: it must hold at least one norm")
    listed = ", ".join(repr(name) for name in table)
    if column is not None:
        if column in table:
            return column
        matching = [name for name in table if name.rpartition(" - ")[2] == column]
        if len(matching) == 1:
            return matching[0]
        raise ValueError(f"there is no column {column!r}; the columns are {listed}")
    names = [name for name in table if not is_index(name) and not is_range(name, table)]
    if len(names) == 1:
        return names[0]
    norms = [name for name in names if "norm" in name.lower()]
    if len(norms) == 1:
        return norms[0]
    raise ValueError(f"which column holds the norms? Name one with --column: {listed}")


def is_index(name: str) -> bool:
    """Return whether a column holds the step, the epoch or the time.

    >>> [is_index(n) for n in ("Wall time", "_step", "run - _step", "step_norm")]
    [True, True, True, False]
    """
    name = name.rpartition(" - ")[2]
    name = re.sub(r"__(MIN|MAX)$|\(.*\)", "", name)
    words = set(re.findall("[a-z]+", name.lower())) - QUALIFIERS
    return bool(words) and words <= INDEX_WORDS


def is_range(name: str, table: Table) -> bool:
    """Return whether W&B wrote this column as the range of another column."""
    base = re.sub(r"__(MIN|MAX)$", "", name)
    return base != name and base in table
