"""Reads the rows of a table in text, whose cells a delimiter or white space separates.

A table that Markdown, psql or PrettyTable wrote has bars between its cells.
"""

import csv
import re
from collections.abc import Iterable, Iterator
from itertools import zip_longest

from autoclip_core.files.cells import is_empty, is_number

DELIMITERS = ",;\t|"

RULE = re.compile(r"[-+=|: ]+")
"""A line that only separates the rows of a table with bars."""

FRAME = re.compile(r"(?=.*[-=\u2500-\u257f]{3})[-+=|: \u2500-\u257f]+")
"""A line that only draws the frame of a table, perhaps with box characters."""

BARS = str.maketrans("\u2502\u2503\u2551", "|||")
"""Box characters between cells."""

MAX_WORDS = 8
"""Number of words in the name of a column, at most."""

Cells = dict[str, str]
"""The cells of one row by column."""


def read_csv_rows(lines: Iterable[str], delimiter: str = ",") -> Iterator[Cells]:
    """Yield the rows of a table with a header; short rows end with empty cells.

    A single column without a header is named "norm"; several are named "1", "2", ....
    A resumed run may write a header again, with other columns. A last line that a
    stopped run cut off has only empty cells.

    Args:
      lines: the lines of the file.
      delimiter: one character; a space stands for any white space.

    Raises:
      ValueError: a row is longer than the header, or two columns have the same name.

    >>> list(read_csv_rows(["step,norm", "0,1.5", "1,"]))
    [{'step': '0', 'norm': '1.5'}, {'step': '1', 'norm': ''}]
    """
    last = ""

    def keep(line: str) -> str:
        nonlocal last
        last = line
        return line

    rows = split_rows(map(keep, lines), delimiter)
    first = next(rows, None)
    if first is None:
        return
    header, has_rows = make_header(first), is_headless(first)
    names = set(header)
    if has_rows:
        yield dict(zip(header, first, strict=True))
    for number, row in enumerate(rows, start=2):
        if is_header(row, names):
            header = make_header(row)
            names = set(header)
            continue
        has_rows = True
        if delimiter == " " and number == 2 and len(row) == len(header) + 1:
            header = ["", *header]  # pandas prints its index so
        if len(row) > len(header) and any(map(str.strip, row[len(header) :])):
            raise ValueError(
                f"line {number} must have {len(header)} cells as the header, got "
                f"{len(row)}; if a resumed run has more columns, write their names "
                "into a line before it"
            )
        if len(row) < len(header) and not last.endswith("\n"):
            row = []
        yield dict(zip_longest(header, row[: len(header)], fillvalue=""))
    if not has_rows:
        yield dict.fromkeys(header, "")  # the names are known without a row


def strip_frame(lines: Iterable[str]) -> Iterator[str]:
    """Yield the lines of a table without its frame and what stands before the header.

    These are comments, and the line `sep=;` for Excel. A comment is the header if
    numbers follow.

    >>> list(strip_frame(["sep=,", "# run 7", "step,norm", "0,1.5"]))
    ['step,norm', '0,1.5']
    >>> list(strip_frame(["# step norm", "0 1.5"]))
    ['# step norm', '0 1.5']
    """
    comment, is_start = "", True
    for line in lines:
        text = line.translate(BARS)
        stripped = text.strip()
        if FRAME.fullmatch(stripped):
            continue
        if is_start and stripped.startswith("#"):
            comment = text
            continue
        if is_start and re.fullmatch("sep=.", stripped):
            continue
        if is_start and comment and is_headless(re.split(r"[,;|\s]+", stripped)):
            yield comment
        is_start = is_start and not stripped
        yield text
    if is_start and comment:
        yield comment


def split_rows(lines: Iterable[str], delimiter: str) -> Iterator[list[str]]:
    """Yield the cells of each line that is not blank.

    `np.savetxt` writes "#" before the header.
    """
    if delimiter == " ":
        words = (line.lstrip().removeprefix("#").split() for line in lines)
        return (cells for cells in words if cells)
    if delimiter == "|":
        stripped = (line.strip() for line in lines)
        rows = (line for line in stripped if line and not RULE.fullmatch(line))
        return ([cell.strip() for cell in split_bars(row)] for row in rows)
    return read_csv_cells(lines, delimiter)


def split_bars(line: str) -> list[str]:
    """Return the cells between bars; a bar at either end is left out.

    >>> split_bars("| step | norm |"), split_bars("0|1.5|")
    ([' step ', ' norm '], ['0', '1.5', ''])
    """
    if line.startswith("|") and line.endswith("|"):
        line = line[1:-1]
    return line.split("|")


def read_csv_cells(lines: Iterable[str], delimiter: str) -> Iterator[list[str]]:
    """Yield the cells of each line of a CSV; an error names the line."""
    reader = csv.reader(lines, delimiter=delimiter)
    try:
        yield from filter(None, reader)
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num} is no CSV: {error}") from None


def make_header(first: list[str]) -> list[str]:
    """Return the names of the columns."""
    if is_headless(first):
        return [str(i) for i in range(1, len(first) + 1)] if first[1:] else ["norm"]
    names = [name.strip() for name in first]
    names[0] = names[0].removeprefix("#").strip()
    if len(set(names)) < len(names):
        duplicate = next(name for name in names if names.count(name) > 1)
        raise ValueError(
            f"the columns must have different names, got {duplicate!r} twice"
        )
    return names


def is_headless(first: list[str]) -> bool:
    """Return whether the first row holds numbers in place of names."""
    return all(is_number(cell) for cell in first)


def is_header(row: list[str], names: set[str]) -> bool:
    """Return whether a row has names of columns again, perhaps with others."""
    return not names.isdisjoint(filter(None, row)) and not any(map(is_number, row))


def guess_delimiter(lines: list[str]) -> str | None:
    """Return the delimiter of a table, or None if its first lines are no table.

    >>> guess_delimiter(["step;norm", "0;1,5"]), guess_delimiter(["norm", "1.5"])
    (';', ',')
    >>> guess_delimiter(["iter 0: loss 2.5, norm 1.5", "iter 1: loss 2.4, norm 1.4"])
    """
    for delimiter in sorted(DELIMITERS, key=lines[0].count, reverse=True):
        if is_table(lines, delimiter):
            return delimiter
    if is_table(lines, " "):
        return " "
    return "," if is_single_column(lines) else None


def is_table(lines: list[str], delimiter: str) -> bool:
    """Return whether the lines are the header and the rows of a table."""
    try:
        first, *rows = split_rows(lines, delimiter)
    except ValueError:
        return False
    size, names = len(first), set(first)
    rows = [row for row in rows if not is_header(row, names)]
    if size < 2:
        return False
    if not rows:
        return is_headless(first) or (delimiter != " " and all(map(is_name, first)))
    if delimiter == " ":
        return any(len(row) in (size, size + 1) for row in rows) and all(
            len(row) <= size + 1 and all(is_cell(cell) for cell in row) for row in rows
        )
    if sum(len(row) == size for row in rows) < len(rows) / 2:
        return False
    has_numbers = any(
        is_cell(cell) and not is_empty(cell) and not is_cell(name)
        for row in rows
        for name, cell in zip(first, row, strict=False)
    )
    return has_numbers or is_headless(first)


def is_single_column(lines: list[str]) -> bool:
    """Return whether the lines hold one number each, the first perhaps a name."""
    first, *rows = lines
    first = first.strip().strip('"')
    return is_cell(first) or (is_name(first) and (not rows or any(map(is_cell, rows))))


def is_cell(cell: str) -> bool:
    """Return whether a cell is a number in any notation, or empty."""
    cell = cell.strip().strip('"')
    return is_empty(cell) or is_number(cell) or is_number(cell, ",")


def is_name(cell: str) -> bool:
    """Return whether a text can be the name of a column: no number follows a word."""
    words = cell.replace("=", " ").replace(":", " ").split()
    return len(words) <= MAX_WORDS and not any(is_number(word) for word in words[1:])
