"""Print the tables of the docs from what the other scripts have saved, or write them.

Run it as `python benchmarks/page.py FILE...`, each written by `--json`: it prints all
tables. With `--write` they go to the marks of their names in the pages of docs, with
the picture. The tables of the machine and of the shares are written if the files hold
every framework.
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
FRAMEWORKS = {"torch", "jax", "keras"}
OF_ALL = ("machine", "share", "fixed cost")
"""The tables that have rows or columns of every framework."""
MARKS = re.compile(r"(<!-- table: (.+?) -->\n).*?(\n<!-- end of table -->)", re.DOTALL)


def main() -> None:
    """Print or write the tables of all files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--write", action="store_true", help="put them into docs")
    options = parser.parse_args()
    saved_files = [json.loads(path.read_text()) for path in options.files]
    tables = all_tables(saved_files)
    if options.write:
        if trials := [saved["script"] for saved in saved_files if saved["trial"]]:
            raise SystemExit(f"these were only tried (--quick): {', '.join(trials)}")
        write(tables)
        for saved in saved_files:
            if saved["script"] == "run":
                draw(DOCS / "performance.png", saved["results"])
    else:
        for name, rows in tables.items():
            print(f"{name}\n\n{markdown(rows)}\n")


def all_tables(saved_files: Sequence[Mapping[str, Any]]) -> dict[str, Rows]:
    """Return the tables by name, the machine's first; rows of one name are joined.

    Raises:
      SystemExit: the numbers are from different processors.
    """
    machines = [saved["machine"] for saved in saved_files]
    if len(kinds := {machine["processor"] for machine in machines}) > 1:
        raise SystemExit(f"the files are of different processors: {sorted(kinds)}")
    facts = {key: str(value) for machine in machines for key, value in machine.items()}
    tables: dict[str, Rows] = {"machine": [list(facts), list(facts.values())]}
    for saved in sorted(saved_files, key=lambda saved: saved["script"] != "share"):
        for name, (head, *rows) in make_tables(saved).items():
            tables[name] = [*tables.get(name, [head]), *rows]
    return tables


def write(tables: Mapping[str, Rows]) -> None:
    """Put the tables between their marks in all pages, and print which changed.

    The tables of all frameworks stay if the files do not hold every framework.
    """
    if not FRAMEWORKS <= set(tables["machine"][0]):
        tables = {name: rows for name, rows in tables.items() if name not in OF_ALL}
    for page in sorted(DOCS.rglob("*.md")):
        before = page.read_text(encoding="utf-8")
        after = put_between_marks(before, tables)
        if after != before:
            page.write_text(after, encoding="utf-8")
            print(f"{page.relative_to(DOCS)} has them now")


def put_between_marks(page: str, tables: Mapping[str, Rows]) -> str:
    """Return a page with the tables at their marks; other marks stay."""

    def table(mark: re.Match[str]) -> str:
        rows = tables.get(mark[2])
        return f"{mark[1]}\n{markdown(rows)}\n{mark[3]}" if rows else mark[0]

    return MARKS.sub(table, page)


if __name__ == "__main__":
    main()
