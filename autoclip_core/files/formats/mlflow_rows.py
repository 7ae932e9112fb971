"""Reads MLflow's file of one metric, whose name is its path."""

import re
from collections.abc import Iterator
from pathlib import Path

MLFLOW_LINE = re.compile(r"\d{12,14} \S+ -?\d+( \S+ \S+)?\s*")
"""Time in milliseconds, value and step; perhaps the name and digest of a data set."""


def mlflow_name(path: str) -> str:
    """Return the name of a metric: its path below the folder "metrics".

    >>> mlflow_name("mlruns/0/a1b2/metrics/train/grad_norm")
    'train/grad_norm'
    """
    parts = Path(path).parts
    if "metrics" in parts[:-1]:
        last = len(parts) - 1 - parts[::-1].index("metrics")
        return "/".join(parts[last + 1 :])
    return parts[-1]


def read_mlflow_rows(lines: Iterator[str], name: str) -> Iterator[dict[str, str]]:
    """Yield the rows of MLflow's file of one metric; a line may be cut off."""
    for line in lines:
        if line.strip():
            names = "timestamp", name, "step"
            cells = line.split()[:3]
            is_whole = len(cells) == 3
            yield dict(zip(names, cells, strict=True)) if is_whole else {}
