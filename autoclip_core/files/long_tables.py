"""Widens long tables: a row holds the name of a metric and its value."""

from collections.abc import Iterator
from itertools import islice

from .cells import is_empty, is_number
from .collect import Row
from .names import is_index, rank_name, split_words
from .recognize import SAMPLE, Source

METRIC_WORDS = {"metric", "tag", "key", "variable", "field"}
"""Words of a column whose cells name the number of their row."""

RUN_WORDS = {"run", "experiment", "trial"}
"""Words of a column whose cells name the run of their row."""


def widen(source: Source, column: str | None) -> Source:
    """Return the rows of a long table with a column for each metric.

    A row of a long table holds one number and the name of its metric, perhaps with that
    of its run. Other tables, and those that have the wanted column, stay.
    """
    first = find_long_row(source.read()) if source.has_cells else {}
    value = next((name for name in first if rank_name(name) == 4), None)
    if value is None or column in first:
        return source
    metric = find_metric_name(source.read(), first)
    if metric is None:
        return source
    runs = [n for n in first if RUN_WORDS & set(split_words(n)) and not is_index(n)]
    run = runs[0] if runs else None

    def read() -> Iterator[Row]:
        for row in source.read():
            cells = {n: c for n, c in row.items() if n not in (metric, value, run)}
            names = [row.get(n) for n in (run, metric) if n]
            name = " - ".join(str(cell) for cell in names if not is_empty(cell))
            yield {**cells, name: row.get(value)} if name else cells

    return source._replace(read=read, has_cells=False)


def find_long_row(rows: Iterator[Row]) -> Row:
    """Return the first row that may be of a long table, or an empty one."""
    for row in islice(rows, SAMPLE):
        ranks = [rank_name(name) for name in row if not name.isdecimal()]
        if ranks.count(4) == 1 and {None, 4}.issuperset(ranks):
            return row
    return {}


def find_metric_name(rows: Iterator[Row], first: Row) -> str | None:
    """Return the column whose cells name metrics, or None.

    One of its cells names a gradient norm, or its name says so.
    """
    texts = [
        name
        for name, cell in first.items()
        if isinstance(cell, str) and not is_empty(cell) and not is_number(cell)
    ]
    known: set[str] = set()
    for row in rows if texts else ():
        for name in texts:
            cell = row.get(name)
            if isinstance(cell, str) and cell not in known:
                known.add(cell)
                if rank_name(cell) in (0, 1, 2, 3):
                    return name
    return next((n for n in texts if METRIC_WORDS & set(split_words(n))), None)
