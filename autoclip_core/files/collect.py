"""Collects the gradient norms from the rows of a file, in one pass and little memory.

Only columns that can still be chosen are stored, as arrays of float64.
"""

import math
from array import array
from collections.abc import Iterable, Mapping
from typing import Any

from .cells import is_empty, parse_number
from .names import (
    find_step_name,
    is_index,
    is_loss,
    rank_name,
    split_words,
    strip_run,
)

Row = Mapping[str, Any]
"""The cells of one row by column; a missing column is an empty cell."""

MAX_NAMES = 10_000
"""Number of names that are kept, at most; columns behind them can still be chosen."""


TOTAL_WORDS = {"total", "global", "unclipped"}
"""Words of the norm of the whole gradient, before clipping."""


class NoColumn(ValueError):
    """No column has the name of a gradient norm, or the name that was given."""


class Column:
    """The numbers of one column, and the step of each."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.values = array("d")
        self.steps = array("d")
        self.empty = 0
        self.bad_cell: str | None = None

    def add(self, cell: Any, step: Any, row: int, decimal: str) -> None:
        """Add a cell; an empty cell is left out, and a text is kept for an error."""
        try:
            value = float(cell)  # most cells: the rest takes three times as long
        except (TypeError, ValueError, OverflowError):
            if is_empty(cell):
                self.empty += 1
                return
            try:
                value = parse_number(cell, decimal)
            except ValueError:
                self.bad_cell = self.bad_cell or f"{cell!r:.60} in row {row}"
                return
        self.values.append(value)
        self.steps.append(parse_step(step))


def parse_step(cell: Any) -> float:
    """Return a step as a number, NaN if the cell holds none; "3/40" is step 3."""
    try:
        return float(cell)  # most cells: the rest takes twice as long
    except (TypeError, ValueError, OverflowError):
        number = cell.partition("/")[0] if isinstance(cell, str) else cell
    try:
        return parse_number(number)
    except ValueError:
        return math.nan


class Collector:
    """Stores the columns that may hold the gradient norms, and the names of all.

    Args:
      column: the name to look for, or None for the best name of a gradient norm.
      decimal: the decimal separator, "." or ",".
    """

    def __init__(self, column: str | None, decimal: str = ".") -> None:
        self.column = column
        self.decimal = decimal
        self.names: dict[str, None] = {}
        self.rows = 0
        self.rank = math.inf
        self.columns: dict[str, Column] = {}
        self.others: dict[str, Column] = {}
        self._last_names: tuple[str, ...] = ()
        self._last_columns: list[Column] = []
        self._step_name: str | None = None

    def add(self, row: Row) -> None:
        """Add a row."""
        self.rows += 1
        names = tuple(row)
        if names != self._last_names:
            self._last_names = names
            self._last_columns = self._find_columns(names)
            self._step_name = find_step_name(names)
        if self._last_columns:
            step = row[self._step_name] if self._step_name else None
            for column in self._last_columns:
                column.add(row[column.name], step, self.rows, self.decimal)

    def _find_columns(self, names: tuple[str, ...]) -> list[Column]:
        """Return the columns of a row to store; new names are considered first."""
        for name in names:
            if name not in self.names and name not in self.columns:
                if len(self.names) < MAX_NAMES:
                    self.names[name] = None
                self._consider(name)
        kinds = self.columns, self.others
        return [kind[name] for name in names for kind in kinds if name in kind]

    def _consider(self, name: str) -> None:
        """Store a column from now on if its name is as good as those so far.

        Thresholds are stored, too: a log of this package has them. So are losses.
        """
        if name.endswith("threshold") or is_loss(name):
            self.others[name] = Column(name)
        if self.column is not None:
            is_exact = name == self.column
            rank = 0 if is_exact else 1 if strip_run(name) == self.column else None
        else:
            rank = None if is_index(name) else rank_name(name)
        if rank is None or rank > self.rank:
            return
        if rank < self.rank:
            self.rank = rank
            self.columns.clear()
        self.columns[name] = Column(name)

    def choose(self) -> Column:
        """Return the column that holds the norms.

        Raises:
          ValueError: no column or several columns match, or it holds text.
        """
        columns = list(self.columns.values())
        if self.column is None:
            columns = [c for c in columns if not is_range(c.name, self.names)]
        if len(columns) > 1:
            columns = [c for c in columns if c.values or c.bad_cell] or columns
        if self.column is None:
            totals = [c for c in columns if TOTAL_WORDS & set(split_words(c.name))]
            columns = totals or columns
        if not self.names:
            raise NoColumn("it is empty: it must hold at least one norm")
        if not columns:
            raise NoColumn(self._no_column())
        if len(columns) > 1:
            raise ValueError(self._several_columns(columns))
        [column] = columns
        if column.bad_cell:
            raise ValueError(
                f"column {column.name!r} must hold numbers, got {column.bad_cell}"
            )
        if not column.values:
            raise ValueError(
                f"column {column.name!r} is empty: it must hold at least one norm"
            )
        return column

    def find_thresholds(self, norms: Column) -> Column | None:
        """Return the thresholds of a column of norms, such as "clip/threshold"."""
        name = norms.name.removesuffix("norm") + "threshold"
        return self.others.get(name) if norms.name.endswith("norm") else None

    def find_losses(self, norms: Column) -> Column | None:
        """Return the loss of the same run with the most numbers, or None."""
        run = norms.name.removesuffix(strip_run(norms.name))
        losses = [
            column
            for name, column in self.others.items()
            if is_loss(name) and name.startswith(run) and name != norms.name
        ]
        best = max(losses, key=lambda column: len(column.values), default=None)
        return best if best and best.values else None

    def _no_column(self) -> str:
        listed = list_names(self.names)
        if self.column is not None:
            return f"there is no column {self.column!r}; the columns are {listed}"
        return (
            "no column is named as a gradient norm; pass column=, or --column: "
            f"{listed}"
        )

    def _several_columns(self, columns: list[Column]) -> str:
        listed = list_names(column.name for column in columns)
        if self.column is not None:
            return (
                f"{len(columns)} columns match {self.column!r}, one for each run; pass "
                f"the whole name as column=, or --column: {listed}"
            )
        if all(column.name.isdecimal() for column in columns):
            return (
                f"its {len(columns)} columns have no names; pass column=, or --column: "
                f"{listed}; or write a header such as 'step,grad_norm' into the first "
                "line of a text"
            )
        return (
            f"{len(columns)} columns are named as gradient norms; pass column=, or "
            f"--column: {listed}"
        )


def is_range(name: str, names: Iterable[str]) -> bool:
    """Return whether W&B wrote this column as the range of another column."""
    base = name.removesuffix("__MIN").removesuffix("__MAX")
    return base != name and base in names


def list_names(names: Iterable[str], most: int = 20) -> str:
    """Return names for an error message; index columns are left out if possible."""
    names = list(names)
    names = [n for n in names if not is_index(n) and not is_range(n, names)] or names
    listed = ", ".join(f"{name!r:.80}" for name in names[:most])
    rest = len(names) - most
    return f"{listed} and {rest} more" if rest > 0 else listed


def find_nan_of_empty_cells(rows: Iterable[Row], name: str, decimal: str) -> list[int]:
    """Return the places of the cells of a column that are NaN because they were empty.

    pandas writes an empty cell as NaN. Such a row holds another measurement, such as a
    validation loss: a column that never has a number in a row with a norm.
    """
    with_norm: set[str] = set()
    candidates: list[tuple[int, frozenset[str]]] = []
    known: dict[tuple[str, ...], frozenset[str]] = {}
    place = -1
    for row in rows:
        if is_empty(row.get(name)):
            continue
        place += 1
        numbers = tuple(n for n, cell in row.items() if has_number(cell, decimal))
        if name in numbers:
            with_norm.update(numbers)
        else:
            key = known.setdefault(numbers, frozenset(numbers))
            candidates.append((place, key))
    if not with_norm:
        return []
    return [place for place, numbers in candidates if numbers - with_norm]


def has_number(cell: Any, decimal: str) -> bool:
    """Return whether a cell is a number other than NaN."""
    if isinstance(cell, float):
        return cell == cell
    if is_empty(cell):
        return False
    try:
        number = parse_number(cell, decimal)
    except ValueError:
        return False
    return number == number
