"""Put the tables of docs/evidence/*.json into the evidence pages, between their marks.

`python examples/experiments/write_tables.py`, after an experiment ran. The mark
`table of NAME: TITLE` takes one table of NAME.json.
"""

import json
import re

from experiment import EVIDENCE

PAGES = sorted(EVIDENCE.glob("*.md"))
MARKS = re.compile(r"(<!-- table of (\w+): ([^\n]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def with_tables(page: str) -> str:
    """Return the page with the tables as they are in the JSON files."""

    def fill(match: re.Match[str]) -> str:
        mark, name, title, end = match.groups()
        text = (EVIDENCE / f"{name}.json").read_text(encoding="utf-8")
        return f"{mark}\n{json.loads(text)['tables'][title]}\n\n{end}"

    return MARKS.sub(fill, page)


if __name__ == "__main__":
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        path.write_text(with_tables(text), encoding="utf-8")
