"""Put the tables of docs/evidence/*.json into docs/evidence.md, between their marks.

`python examples/experiments/write_tables.py`, after an experiment ran.
"""

import json
import re

from experiment import EVIDENCE

PAGE = EVIDENCE.with_suffix(".md")
MARKS = re.compile(r"(<!-- tables of (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def with_tables(page: str) -> str:
    """Return the page with the tables as they are in the JSON files."""

    def fill(match: re.Match[str]) -> str:
        saved = json.loads((EVIDENCE / f"{match[2]}.json").read_text(encoding="utf-8"))
        tables = [f"*{title}*\n\n{text}" for title, text in saved["tables"].items()]
        return f"{match[1]}\n" + "\n\n".join(tables) + f"\n\n{match[3]}"

    return MARKS.sub(fill, page)


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
