"""Reads MLflow's file of one metric, whose name is its path."""

import re
from collections.abc import Iterator
from pathlib import Path

MLFLOW_LINE = re.compile(r"\d{12,14} \S+ -?\d+( \S+ \S+)?\s*")
"""Time in milliseconds, value and step; perhaps the name and digest of a data set."""


def find_mlflow_name(path: str) -> str:
    """Return the name of a metric: its path below the folder "metrics".

    >>> find_mlflow_name("mlruns/0/a1b2/metrics/train/grad_norm")
    'train/grad_norm'
    """
    _, folder, name = f"/{Path(path).as_posix()}".rpartition("/metrics/")
    return name if folder else Path(path).name


def read_mlflow_rows(lines: Iterator[str], name: str) -> Iterator[dict[str, str]]:
    """Yield the rows of MLflow's file of one metric; a line may be cut off."""
    names = "timestamp", name, "step"
    for cells in filter(None, map(str.split, lines)):
        yield dict(zip(names, cells, strict=False)) if len(cells) >= 3 else {}
