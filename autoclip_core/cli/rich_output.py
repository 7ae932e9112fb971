"""A progress bar and coloured tables with the package rich, if it is installed."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any


def has_rich() -> bool:
    """Return whether rich is installed; the extra `cli` installs it."""
    try:
        import rich.progress
        import rich.table  # noqa: F401
    except ImportError:
        return False
    return True


def track(items: Iterable[Any], label: str) -> Iterator[Any]:
    """Yield the items and show the progress on stderr until the end."""
    from rich.console import Console
    from rich.progress import track

    console = Console(file=sys.stderr)
    yield from track(items, description=label, console=console, transient=True)


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table; the first column holds names, the others numbers.

    A line feed in the header begins a second line.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for place, name in enumerate(header):
        style = "" if place else "cyan"
        justify: Any = "right" if place else "left"
        table.add_column(
            Text(name), style=style, justify=justify, vertical="bottom", no_wrap=True
        )
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console(file=sys.stdout, highlight=False)
    console.print(table)
