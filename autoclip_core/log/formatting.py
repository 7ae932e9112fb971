"""Rates and numbers as text, for summaries, advice and titles."""

import math
import re
import textwrap

from autoclip_core.files.names import make_printable

WIDTH = 80
"""Maximum width of a line."""


def format_percent(rate: float) -> str:
    """Return a rate in [0, 1] as a percentage with 3 digits; "unknown" for NaN."""
    return "unknown" if math.isnan(rate) else f"{100 * rate:.3g} %"


def format_rate(rate: float, has_several_rows: bool) -> str:
    """Return a clip rate; with several rows it is a share of the rows."""
    return format_percent(rate) + " of the rows" * has_several_rows


def format_number(value: float, digits: int = 4) -> str:
    """Return a number with 4 digits; "unknown" for NaN."""
    return "unknown" if math.isnan(value) else f"{value:.{digits}g}"


def wrap_text(text: str) -> str:
    """Return text in lines of at most 80 columns, without escape sequences.

    A line continues below its value, which stands behind a name and two spaces.

    >>> print(wrap_text("policy        " + "Quantile " * 9))
    policy        Quantile Quantile Quantile Quantile Quantile Quantile Quantile
                  Quantile Quantile
    """
    return "\n".join(wrap_line(make_printable(line)) for line in text.split("\n"))


def wrap_line(line: str) -> str:
    """Return a line, wrapped if it is longer than 80 columns."""
    name = re.match(r"\S+( \S+)*  +", line)
    indent = " " * len(name[0]) if name else ""
    if len(line) <= WIDTH:
        return line
    return textwrap.fill(line, WIDTH, subsequent_indent=indent, break_on_hyphens=False)
