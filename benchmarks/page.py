"""Print the tables of the docs from what the other scripts have saved, or write them.

Run it as `python benchmarks/page.py FILE...`, each written by `--json`: it prints all
tables. With `--write` they go to the marks of their names in the pages of docs, and the
picture beside them, so that nobody types a number.
"""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layout import Rows, markdown
from picture import draw
from tables import make_tables

DOCS = Path(__file__).parents[1] / "docs"
MARKS = re.compile(r"(<!-- table: (.+?) -->\n).*?(\n<!-- end of table -->)", re.DOTALL)


def main() -> None:
    """Print or write the tables of all files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--write", action="store_true", help="put them into docs")
    options = parser.parse_args()
    found = [json.loads(path.read_text()) for path in options.files]
    tables = all_tables(found)
    if options.write:
        if trials := [saved["script"] for saved in found if saved["trial"]]:
            raise SystemExit(f"these were only tried (--quick): {', '.join(trials)}")
        write(tables)
        for saved in found:
            if saved["script"] == "run":
                draw(DOCS / "performance.png", saved["results"])
    else:
        for name, rows in tables.items():
            print(f"{name}\n\n{markdown(rows)}\n")


def all_tables(found: Sequence[Mapping[str, Any]]) -> dict[str, Rows]:
    """Return the tables by name, the machine's first.

    Raises:
      SystemExit: the numbers are from different processors.
    """
    machines = [saved["machine"] for saved in found]
    if len(kinds := {machine["processor"] for machine in machines}) > 1:
        raise SystemExit(f"the files are of different processors: {sorted(kinds)}")
    facts = {key: str(value) for own in machines for key, value in own.items()}
    tables: dict[str, Rows] = {"machine": [list(facts), list(facts.values())]}
    for saved in found:
        tables |= make_tables(saved)
    return tables


def write(tables: Mapping[str, Rows]) -> None:
    """Put the tables between their marks in all pages, and tell which have changed."""
    for page in sorted(DOCS.glob("*.md")):
        before = page.read_text(encoding="utf-8")
        after = put_between_marks(before, tables)
        if after != before:
            page.write_text(after, encoding="utf-8")
            print(f"{page.name} has them now")


def put_between_marks(page: str, tables: Mapping[str, Rows]) -> str:
    """Return a page with the tables at their marks; other marks keep what they have."""

    def table(mark: re.Match[str]) -> str:
        rows = tables.get(mark[2])
        return f"{mark[1]}\n{markdown(rows)}\n{mark[3]}" if rows else mark[0]

    return MARKS.sub(table, page)


if __name__ == "__main__":
    main()
