"""Print the tables of docs/performance.md from what the other scripts have saved.

Run it as `python benchmarks/page.py FILE...`, each written by `--json`.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Line = Mapping[str, Any]


def main() -> None:
    """Print a table for each model's ratios, or parts of a step, that a file holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    for path in parser.parse_args().files:
        saved = json.loads(path.read_text())
        for found in tables(saved):
            print(found, end="\n\n")


def tables(saved: Mapping[str, Any]) -> Iterator[str]:
    """Yield the tables in Markdown of what one script has saved."""
    if "microseconds" in saved:
        yield of_parts(saved["microseconds"])
    if "peak_bytes_of_torch_and_of_python" in saved:
        yield of_peaks(saved["peak_bytes_of_torch_and_of_python"])
    lines = saved.get("results", [])
    kinds = dict.fromkeys(line.get("regime") or line.get("how") for line in lines)
    for kind in kinds:
        own = [x for x in lines if kind in (x.get("regime"), x.get("how"), None)]
        yield f"{kind or ''}\n\n{of_ratios(own)}"


def of_ratios(lines: Sequence[Line]) -> str:
    """Return medians (quartiles), a column per model, the least that clips in bold."""
    models = list(dict.fromkeys(line["model"] for line in lines))
    rows = {line["contender"]: [line["contender"]] for line in lines}
    for model in models:
        own = {line["contender"]: line for line in lines if line["model"] == model}
        clip = [middle(line) for line in own.values() if line.get("clips")]
        for name, row in rows.items():
            text = cell(own[name]) if name in own else ""
            best = name in own and middle(own[name]) == min(clip, default=None)
            row.append(f"**{text}**" if best and own[name].get("clips") else text)
    return markdown([["", *models], *rows.values()])


def middle(line: Line) -> float:
    """Return the median of what a line compares: to a reference, or to a bar."""
    return float((line.get("ratio") or line["to_the_bar"])["median"])


def cell(line: Line) -> str:
    """Return a ratio with its quartiles; of the reference itself, its milliseconds."""
    ratio = line.get("ratio") or line["to_the_bar"]
    low, median, high = (ratio[key] for key in ("low", "median", "high"))
    if low == high == 1:
        took = line["milliseconds"]
        return f"{took['median'] if isinstance(took, dict) else took:.2f} ms"
    return f"{median:.2f} ({low:.2f}–{high:.2f})"


def of_parts(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Return the parts of a step in microseconds, a line per model and clipper."""
    columns = max((parts for of in found.values() for parts in of.values()), key=len)
    rows = [["", "", *columns]]
    for model, steps in found.items():
        for name, parts in steps.items():
            values = [f"{parts[key]:.0f}" if key in parts else "" for key in columns]
            rows.append([model, name, *values])
    return markdown(rows)


def of_peaks(found: Mapping[str, Mapping[str, Sequence[int]]]) -> str:
    """Return KiB of torch + of Python, a column per model."""
    rows = [["", *found]]
    for name in next(iter(found.values())):
        peaks = (column.get(name, ()) for column in found.values())
        cells = (" + ".join(f"{peak / 2**10:.0f}" for peak in own) for own in peaks)
        rows.append([name, *cells])
    return markdown(rows)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return a table; the first row is its head."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
