"""How tables and numbers are written."""

from collections.abc import Sequence

Rows = list[list[str]]
"""A table: rows of text; the first is the head."""


def seconds(number: float) -> str:
    """Return a time in the unit in which it is short."""
    return scaled(1e6 * number, ("µs", "ms", "s"))


def size(number: float) -> str:
    """Return a number of bytes in the unit in which it is short."""
    return scaled(number, ("B", "kB", "MB", "GB"))


def scaled(number: float, units: Sequence[str]) -> str:
    """Return a number with the unit in which it is below 1000."""
    place = 0
    while number >= 1000 and place < len(units) - 1:
        number, place = number / 1000, place + 1
    return f"{number:.3g}\N{NO-BREAK SPACE}{units[place]}"


def spaced(number: int) -> str:
    """Return a number with its thousands apart."""
    return f"{number:,}".replace(",", " ")


def markdown(rows: Rows) -> str:
    """Return a table for a page."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plain(rows: Rows) -> str:
    """Return a table for a terminal, its columns aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (zip(row, widths, strict=True) for row in rows)
    return "\n".join("  ".join(f"{t:{w}}" for t, w in line).rstrip() for line in lines)
