"""Reads the gradient norms of a run from the file or the folder that it left."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .collect import Collector, Column, NoColumn, find_nan_of_empty_cells, list_names
from .folders import find_in_folder, list_runs
from .formats.json_rows import TextLine
from .long_tables import widen
from .names import make_printable, rank_name
from .open_file import open_bytes
from .recognize import (
    Source,
    find_source,
    list_names_in_log,
    make_event_source,
    make_log_source,
)


@dataclass(frozen=True, eq=False)
class LoggedNorms:
    """Gradient norms from a file, as `read_norms` returns them; `print` it.

    >>> norms = LoggedNorms(np.ones(3), "grad_norm", "CSV", np.arange(3), empty=1)
    >>> print(norms)
    CSV, column grad_norm: 3 steps, 1 empty cell
    """

    norms: Any
    """The norms in the order of the file, shape (n,), float64; NaN and infinity are
    non-finite steps. Empty cells are left out."""
    column: str
    """The name of their column."""
    kind: str
    """What the file is, such as "CSV" or "TensorBoard events"."""
    steps: Any
    """The step of each norm, shape (n,), int64: as in the file, or else 0, 1, 2, ..."""
    empty: int = 0
    """The number of empty cells in the column."""
    columns: tuple[str, ...] = ()
    """The names of all columns."""
    thresholds: Any = None
    """The threshold of each norm, shape (n,), +inf for none; None if the file is no log
    of this package."""
    losses: Any = None
    """The loss of each step, shape (n,), NaN if unknown; None if the file has none."""

    def __str__(self) -> str:
        """Return kind, column, number of steps and number of empty cells."""
        size = len(self.norms)
        nonfinite = size - int(np.isfinite(self.norms).sum())
        parts = [format_count(size, "step"), format_count(self.empty, "empty cell")]
        parts += [f"{nonfinite} NaN or infinite"] if nonfinite else []
        return f"{self.kind}, column {make_printable(self.column)}: {', '.join(parts)}"


def format_count(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural if it is not 1."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def read_norms(path: str | os.PathLike[str], column: str | None = None) -> LoggedNorms:
    """Return the gradient norms in a file or a folder that a training run wrote.

    `norms[i]` is the i-th cell of the column that is not empty. The format is
    recognized from the content:

    - CSV and other tables in text, also those of Lightning, Keras, W&B and TensorBoard;
      separated by comma, semicolon, tab or spaces; with a decimal point or comma.
    - Long tables, whose rows hold the name of a metric and its value.
    - JSON lines with nested objects, whose columns have dotted names; JSON lists; an
      object of lists, such as Keras's `history`; Hugging Face's `trainer_state.json`.
    - What a training script printed: a name of a gradient norm, then a number.
    - TensorBoard's event files (extra `files`); MLflow's metric files; `.npy`, `.npz`.

    Each may be compressed as `.gz`. Text is UTF-8 or UTF-16.

    Args:
      path: a file; a folder of a Hugging Face, Lightning, TensorBoard or MLflow run;
        or "-" for stdin.
      column: the column of the norms; for several runs in a W&B file, the part behind
        " - " or the whole name. None takes the column that names the norm of the whole
        gradient, or else the only column that names a gradient norm.

    Returns:
      A `LoggedNorms` with `norms`, `column`, `kind`, `steps` and `empty`.

    Raises:
      ImportError: the file holds TensorBoard's events and tensorboard is not installed.
      OSError: the file cannot be read.
      ValueError: the format is not read, no column or several columns match, or the
        column holds text or nothing.

    >>> lines = ["step 10 | loss 2.5 | grad norm: 1.5", "step 20 | grad norm: 1.25"]
    >>> _ = Path("run.log").write_text("\\n".join(lines))
    >>> run = read_norms("run.log")
    >>> print(run)
    text log, column grad norm: 2 steps, 0 empty cells
    >>> run.norms.tolist(), run.steps.tolist()
    ([1.5, 1.25], [10, 20])
    """
    name = os.fspath(path)
    files = find_files(name, column)
    try:
        return read_files(files, column)
    except ValueError as error:
        read = {Path(file).parent for file in files}
        runs = [run for run in list_runs(Path(name)) if run not in read]
        if not runs:
            raise
        listed = list_names(str(run.relative_to(name)) for run in runs)
        raise ValueError(f"{error}; folders below hold events: {listed}") from None


def find_files(path: str, column: str | None = None) -> list[str]:
    """Return the file to read, or the event files of one run, in a folder or as given.

    Raises:
      ValueError: the folder holds nothing that can be read, or several runs.
    """
    if path == "-" or not os.path.isdir(path):
        return [path]
    return [str(file) for file in find_in_folder(Path(path), column)]


def read_files(files: list[str], column: str | None) -> LoggedNorms:
    """Return the norms in one file, or in the event files of one run."""
    if len(files) > 1:
        return collect(make_event_source(lambda: open_each(files)), column)
    with open_bytes(files[0]) as file:
        source = find_source(file, files[0], column)
        if column is None:
            refuse_other_tag(source.kind, files[0])
        return read_source(source, file, column)


def read_source(source: Source, file: BinaryIO, column: str | None) -> LoggedNorms:
    """Return the norms in a file; JSON lines between lines of text are a log.

    So is JSON whose strings hold what was printed, as of a container or a notebook.
    """
    try:
        return collect(source, column)
    except TextLine:
        return read_source(make_log_source(file, column), file, column)
    except NoColumn as error:
        if source.kind == "text log":
            raise ValueError(explain_log(file, column)) from None
        refusal = NoColumn(f"it looks like {source.kind}, but {error}")
        if not source.kind.startswith("JSON"):
            raise refusal from None
        try:  # what was printed may be in a string
            return collect(make_log_source(file, column), column)
        except ValueError:
            raise refusal from None
    except ValueError as error:
        raise ValueError(f"it looks like {source.kind}, but {error}") from None


def open_each(paths: list[str]) -> Iterator[BinaryIO]:
    """Yield each file, opened; it is closed when the next one is asked for."""
    for path in paths:
        with open_bytes(path) as file:
            yield file


def collect(source: Source, column: str | None) -> LoggedNorms:
    """Return the norms in the rows of a file."""
    source = widen(source, column)
    collector = Collector(column, source.decimal)
    for row in source.read():
        collector.add(row)
    chosen = collector.choose()
    norms = np.frombuffer(chosen.values)  # not copied: there may be millions
    steps = as_steps(chosen)
    empty = collector.rows - len(norms) if source.has_cells else chosen.empty
    if source.has_cells and np.isnan(norms).any():
        places = find_nan_of_empty_cells(source.read(), chosen.name, source.decimal)
        norms, steps = np.delete(norms, places), np.delete(steps, places)
        empty += len(places)
    names = tuple(collector.names)
    thresholds = align(collector.find_thresholds(chosen), steps, np.inf)
    losses = align(collector.find_losses(chosen), steps, np.nan)
    others = names, thresholds, losses
    return LoggedNorms(norms, chosen.name, source.kind, steps, empty, *others)


def align(column: Column | None, steps: Any, missing: float) -> Any:
    """Return the number of each step in another column; None without a column."""
    if column is None:
        return None
    known = as_steps(column).tolist() if column.values else []
    by_step = dict(zip(known, column.values, strict=True))
    return np.array([by_step.get(step, missing) for step in steps.tolist()])


def as_steps(column: Column) -> Any:
    """Return the steps of a column as whole numbers; 0, 1, ... if one is missing."""
    steps = np.frombuffer(column.steps)
    if np.isnan(steps[0]):
        return np.arange(len(steps))
    is_whole = np.isfinite(steps) & (np.abs(steps) < 2**53)
    if not is_whole.all() or (steps != np.floor(steps)).any():
        return np.arange(len(steps))
    return steps.astype(np.int64)


def explain_log(file: BinaryIO, column: str | None) -> str:
    """Return the error for a log without the norm, with the names that it holds."""
    names = list_names(list_names_in_log(file))
    wanted = "a gradient norm" if column is None else repr(column)
    if not names:
        return (
            f"it looks like text, but no number stands behind the name of {wanted}; "
            "pass a table whose cells are separated by commas, or lines such as "
            "'grad_norm: 1.5'"
        )
    return (
        f"it looks like a text log, but no number stands behind the name of {wanted}; "
        f"pass column=, or --column, with one of its names: {names}"
    )


def refuse_other_tag(kind: str, path: str) -> None:
    """Refuse TensorBoard's CSV or JSON of another metric, which its name states."""
    tag = Path(path).name.partition("tag-")[2].rpartition(".")[0]
    if kind in ("TensorBoard CSV", "TensorBoard JSON") and tag:
        if rank_name(tag) is None:
            raise ValueError(
                f"it looks like {kind} of {tag!r}, which names no gradient norm; to "
                "read it nevertheless, pass column='Value' or --column Value"
            )
