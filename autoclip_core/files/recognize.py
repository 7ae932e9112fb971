"""Recognizes the format of a file from its content, and returns its rows."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import BinaryIO, NamedTuple

from .cells import has_decimal_comma
from .collect import Row
from .formats.array_rows import NPY_MAGIC, is_npz, read_array_rows
from .formats.csv_rows import guess_delimiter, read_csv_rows, split_rows, strip_frame
from .formats.event_rows import is_event_file, read_event_rows
from .formats.json_rows import flatten, load_json, read_document, read_json_lines
from .formats.log_rows import list_log_names, read_log_rows
from .formats.mlflow_rows import MLFLOW_LINE, find_mlflow_name, read_mlflow_rows
from .names import rank_name, strip_run
from .open_file import HEAD, open_lines, read_head, refuse_binary

SAMPLE = 20
"""Number of lines that are examined to recognize a table."""


class Source(NamedTuple):
    """The rows of a file."""

    kind: str
    """What the file is, such as "CSV"."""
    read: Callable[[], Iterator[Row]]
    """Yields the rows from the first; it can be called more than once."""
    decimal: str = "."
    """The decimal separator."""
    has_cells: bool = True
    """Whether a row without the column counts as an empty cell."""


def find_source(file: BinaryIO, path: str, column: str | None) -> Source:
    """Return the rows of an open file; its path names the metric of some formats."""
    head = read_head(file)
    if head.startswith(NPY_MAGIC):
        return Source("NumPy array", lambda: read_array_rows(rewind(file)))
    if head.startswith(b"PK") and is_npz(file):
        return Source("NumPy archive", lambda: read_array_rows(rewind(file)))
    if is_event_file(head):
        return make_event_source(lambda: [rewind(file)])
    refuse_binary(head)
    lines = take_sample(open_lines(file))
    if not lines:
        raise ValueError("it is empty: it must hold at least one norm")
    if lines[0].lstrip()[0] in "{[":
        source = find_json(file, lines)
        if source:
            return source
    if MLFLOW_LINE.fullmatch(lines[0]):
        name = find_mlflow_name(path)
        return Source("MLflow metric", lambda: read_mlflow_rows(open_lines(file), name))
    rows = take_sample(strip_frame(open_lines(file)))
    delimiter = guess_delimiter(rows) if rows else None
    if delimiter and not is_log(rows, delimiter, column):
        return make_csv_source(file, rows, delimiter, has_frame=rows != lines)
    return make_log_source(file, column)


def take_sample(lines: Iterator[str]) -> list[str]:
    """Return the first lines that are not blank."""
    return list(islice((line for line in lines if line.strip()), SAMPLE))


def is_log(lines: list[str], delimiter: str, column: str | None) -> bool:
    """Return whether lines that look like a table are what a script printed.

    The commas may be those of thousands, or stand between a name and the next. Then no
    column is named as the norm, and a norm stands behind its name in a line.
    """
    header = next(split_rows(lines, delimiter))
    names = [cell for cell in header if not any(True for _ in read_log_rows([cell]))]
    if any(rank_name(name) is not None or strip_run(name) == column for name in names):
        return False
    return any(True for _ in read_log_rows(lines, column))


def rewind(file: BinaryIO) -> BinaryIO:
    """Return a file at its start."""
    file.seek(0)
    return file


def make_event_source(open_files: Callable[[], Iterable[BinaryIO]]) -> Source:
    """Return the scalars of the event files of one run."""
    return Source(
        "TensorBoard events", lambda: read_event_rows(open_files), has_cells=False
    )


def find_json(file: BinaryIO, lines: list[str]) -> Source | None:
    """Return the rows of JSON lines or of a document; None if the text is neither."""
    try:
        first = load_json(lines[0])
    except ValueError as error:
        if not is_document(file):
            if re.match(r'\s*(\{\s*"|\[\s*[{"[])', lines[0]):
                raise ValueError(
                    f"it looks like JSON, but line 1 is not JSON: {error}"
                ) from None
            return None
        return make_document_source("".join(open_lines(file)))
    if isinstance(first, list) and len(lines) > 1 and lines[1].lstrip()[:1] != "[":
        return None
    if len(lines) > 1 or not isinstance(first, dict | list):
        return make_json_lines_source(file)
    return make_document_source(lines[0])


def is_document(file: BinaryIO) -> bool:
    """Return whether the text is one JSON document over several lines."""
    head = ""
    for line in open_lines(file):
        head += line
        if len(head) > HEAD:
            break
    try:
        load_json(head)
    except json.JSONDecodeError as error:
        return len(head) > HEAD and error.pos > len(head) - HEAD // 16
    except ValueError:
        return False
    return True


def make_document_source(text: str) -> Source:
    """Return the rows of a JSON document."""
    try:
        document = load_json(text)
    except ValueError as error:
        raise ValueError(f"it looks like JSON, but it is broken: {error}") from None
    kind = read_document(document)[0]
    return Source(kind, lambda: read_document(document)[1])


def make_json_lines_source(file: BinaryIO) -> Source:
    """Return the rows of JSON lines, without the line of a `ClipLog` about its run."""

    def read() -> Iterator[Row]:
        lines = read_json_lines(open_lines(file))
        return (flatten(row) for row in lines if "clip_log" not in row)

    return Source("JSON lines", read)


def make_csv_source(
    file: BinaryIO, lines: list[str], delimiter: str, *, has_frame: bool
) -> Source:
    """Return the rows of a table in text; `lines` are the first, without a frame."""
    names, *rows = split_rows(lines, delimiter)
    kind = {" ": "table", "|": "table", "\t": "TSV"}.get(delimiter, "CSV")
    if names == ["Wall time", "Step", "Value"]:
        kind = "TensorBoard CSV"
    if any(" - " in name and name.endswith("__MAX") for name in names):
        kind = "W&B CSV"
    has_comma = any(has_decimal_comma(cell) for row in rows for cell in row)
    decimal = "," if has_comma or delimiter != "," else "."

    def read() -> Iterator[Row]:
        text = open_lines(file)
        return read_csv_rows(strip_frame(text) if has_frame else text, delimiter)

    return Source(kind, read, decimal)


def make_log_source(file: BinaryIO, column: str | None) -> Source:
    """Return the norms in what a training script printed."""
    return Source(
        "text log", lambda: read_log_rows(open_lines(file), column), has_cells=False
    )


def list_names_in_log(file: BinaryIO) -> list[str]:
    """Return names that stand before numbers in the first lines of a log."""
    return list_log_names(islice(open_lines(file), 1000))
