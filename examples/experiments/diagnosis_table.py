"""Count the verdicts of `diagnose` on the labelled series, for the evidence page.

`python examples/experiments/diagnosis_table.py` reads
tests/support/labelled_series.npz and writes docs/evidence/diagnosis.json; then run
`write_tables.py`. It needs no training.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from autoclip_core import suggest_threshold
from experiment import EVIDENCE, Table, write_json

FILE = Path(__file__).parents[2] / "tests" / "support" / "labelled_series.npz"

VERDICTS = (
    *("healthy", "spikes", "shifted", "diverged", "non-finite"),
    *("never healthy", "vanished", "clipped", "too short"),
)
LABELS = (
    *("healthy", "spikes", "diverged", "non-finite", "never healthy"),
    *("clipped, healthy", "clipped, diverged", "clipped, never healthy"),
)


def load_series(path: Path = FILE) -> list[dict[str, Any]]:
    """Return each series with its label."""
    with np.load(path) as file:
        parts = np.split(file["norms"], np.cumsum(file["sizes"])[:-1])
        about = json.loads(str(file["about"]))
    return [{**a, "norms": part} for a, part in zip(about, parts, strict=True)]


def judge(series: dict[str, Any]) -> dict[str, Any]:
    """Return the verdict of a series, and where its constant is in the healthy part."""
    norms = series["norms"]
    suggestion = suggest_threshold(norms)
    is_healthy = np.isfinite(norms)
    is_healthy[series["end"] :] = False
    is_healthy[series["faults"]] = False
    healthy, constant = norms[is_healthy], suggestion.max_norm
    has_both = constant is not None and len(healthy) >= 50
    share = 100 * float(np.mean(healthy <= constant)) if has_both else None
    return {
        "name": series["name"],
        "kept": series["kept"],
        "label": series["label"],
        "verdict": suggestion.verdict,
        "percentile": share if share is None else round(share, 1),
    }


def count_verdicts(results: Sequence[dict[str, Any]]) -> Table:
    """Return the confusion table."""
    counts = Counter((r["label"], r["verdict"]) for r in results)
    labels = [label for label in LABELS if any(counts[label, v] for v in VERDICTS)]
    verdicts = [v for v in VERDICTS if any(counts[label, v] for label in LABELS)]
    rows = [[n, *(str(counts[n, v] or "") for v in verdicts)] for n in labels]
    return Table(["label", *verdicts], rows)


def count_percentiles(results: Sequence[dict[str, Any]]) -> Table:
    """Return how many constants are within the range, by label."""
    rows = []
    for label in LABELS:
        shares = [r["percentile"] for r in results if r["label"] == label]
        given = [share for share in shares if share is not None]
        if given:
            within = sum(80 <= share <= 99 for share in given)
            cells = [len(shares), len(given), within, min(given), max(given)]
            rows.append([label, *map(str, cells)])
    columns = ["label", "series", "constants", "within", "lowest", "highest"]
    return Table(columns, rows)


def main(output: Path = EVIDENCE) -> None:
    """Write the tables and one line per series."""
    results = [judge(series) for series in load_series()]
    kept = [r for r in results if r["kept"]]
    tuning = [r for r in results if not r["kept"]]
    tables = {
        "Kept half: label and verdict": str(count_verdicts(kept)),
        "Kept half: percentile of the constant": str(count_percentiles(kept)),
        "Tuning half: label and verdict": str(count_verdicts(tuning)),
        "Tuning half: percentile of the constant": str(count_percentiles(tuning)),
    }
    for title, table in tables.items():
        print(f"\n{title}\n\n{table}")
    write_json(output / "diagnosis.json", tables, results)


if __name__ == "__main__":
    main()
