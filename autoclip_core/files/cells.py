"""Reads one cell: a number in the notations of logs and tables, or an empty cell."""

import re
from typing import Any

EMPTY = {"", "none", "null", "n/a", "na", "-", "--", "<na>"}
"""Cells without a number, in lower case."""

UNITS = {"K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}
"""Factors that some logs write behind a number, such as 1.2K."""

DECIMAL_COMMA = re.compile(r"[+-]?(\d+|\d{1,3}(\.\d{3})+),\d+([eE][+-]?\d+)?")

THOUSANDS = re.compile(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?")


def is_empty(cell: Any) -> bool:
    """Return whether a cell holds no number, such as "", None or "N/A"."""
    if isinstance(cell, str):
        return cell.strip().lower() in EMPTY
    return cell is None


def parse_number(cell: Any, decimal: str = ".") -> float:
    """Return the number in a cell.

    Args:
      cell: a number, or text.
      decimal: the decimal separator of the file, "." or ",".

    Raises:
      ValueError: the cell is not a number.

    >>> parse_number("1.5"), parse_number("1.234,5", ","), parse_number("1,234")
    (1.5, 1234.5, 1234.0)
    >>> parse_number("1.2K"), parse_number("-inf")
    (1200.0, -inf)
    """
    try:
        return float(cell)
    except OverflowError:
        return float("inf") if cell > 0 else float("-inf")
    except TypeError:
        raise ValueError(cell) from None
    except ValueError:
        text = str(cell).strip()
        if decimal == "," and DECIMAL_COMMA.fullmatch(text):
            return float(text.replace(".", "").replace(",", "."))
        if decimal == "." and THOUSANDS.fullmatch(text):
            return float(text.replace(",", ""))
        if text[-1:] in UNITS:
            return float(text[:-1]) * UNITS[text[-1]]
        raise


def is_number(cell: Any, decimal: str = ".") -> bool:
    """Return whether a cell is a number; NaN and infinity are numbers too."""
    try:
        parse_number(cell, decimal)
    except ValueError:
        return False
    return True


def has_decimal_comma(cell: str) -> bool:
    """Return whether a comma in a number can only be the decimal separator.

    >>> has_decimal_comma("1,5"), has_decimal_comma("1,234"), has_decimal_comma("1.5")
    (True, False, False)
    """
    return bool(DECIMAL_COMMA.fullmatch(cell)) and not THOUSANDS.fullmatch(cell)
