"""Finds the file to read in the folder of a run."""

import os
import re
from pathlib import Path
from typing import Any

from .formats.mlflow_rows import MLFLOW_LINE
from .names import rank_name

TABLES = {".csv", ".jsonl", ".json", ".npy", ".npz", ".log", ".txt", ".tsv"}
"""Ends of names of files that are read if a folder holds nothing else."""


def find_in_folder(folder: Path, column: str | None) -> list[Path]:
    """Return the file to read in a folder, or the event files of one run.

    Looks for Hugging Face's trainer state, in the folder or in the checkpoint of the
    highest step; event files; Lightning's `metrics.csv`; an MLflow metric; the newest
    `version_*` of Lightning; event files further below; the only table.

    Raises:
      ValueError: nothing can be read, or several runs can.
    """
    for find in (find_state, find_events, find_table, find_version, find_runs):
        files = find(folder)
        if files:
            return files
    if metric := find_metric(folder, column):
        return metric
    files = [f for f in sorted(folder.iterdir()) if f.is_file() and is_table(f)]
    if len(files) == 1:
        return files
    names = ", ".join(repr(f.name) for f in sorted(folder.iterdir())[:10]) or "nothing"
    raise ValueError(
        "it is a folder without a log that can be chosen; name the file to read. It "
        f"holds {names}"
    )


def is_table(file: Path) -> bool:
    """Return whether the name of a file is that of a table, perhaps compressed."""
    return Path(file.name.removesuffix(".gz")).suffix.lower() in TABLES


def find_state(folder: Path) -> list[Path]:
    """Return Hugging Face's trainer state: of the run, or of its newest checkpoint."""
    state = folder / "trainer_state.json"
    if state.is_file():
        return [state]
    states = folder.glob("checkpoint-[0-9]*/trainer_state.json")
    return sorted(states, key=lambda file: split_numbers(file.parent))[-1:]


def find_events(folder: Path) -> list[Path]:
    """Return the event files that are directly in a folder, in the order of time."""
    return sorted(
        (f for f in folder.glob("*tfevents*") if f.is_file()), key=split_numbers
    )


def split_numbers(path: Path) -> list[Any]:
    """Return the key that sorts names by their numbers: "a.9" before "a.10"."""
    parts = re.split(r"(\d+)", path.name)
    return [int(part) if part.isdecimal() else part for part in parts]


def find_table(folder: Path) -> list[Path]:
    """Return Lightning's table of metrics."""
    table = folder / "metrics.csv"
    return [table] if table.is_file() else []


def find_version(folder: Path) -> list[Path]:
    """Return the files of the newest run that Lightning wrote."""
    name = "version_[0-9]*"
    versions = [*folder.glob(name), *folder.glob(f"lightning_logs/{name}")]
    for version in sorted(versions, key=split_numbers, reverse=True):
        if files := find_table(version) or find_events(version):
            return files
    return []


def find_runs(folder: Path) -> list[Path]:
    """Return the event files of the only run below a folder.

    Folders below that of a run, as for its hyperparameters, belong to the run.
    """
    places = list_runs(folder)
    runs = [run for run in places if not set(run.parents) & set(places)]
    if len(runs) > 1:
        raise ValueError(
            f"it holds {len(runs)} runs with event files; name one of the folders: "
            + ", ".join(repr(str(run)) for run in runs[:10])
        )
    return find_events(runs[0]) if runs else []


def list_runs(folder: Path) -> list[Path]:
    """Return the folders below one, and itself, that hold event files."""
    places = os.walk(folder)
    has_events = (p for p, _, names in places if any("tfevents" in n for n in names))
    return sorted(map(Path, has_events))


def find_metric(folder: Path, column: str | None) -> list[Path]:
    """Return MLflow's file of the gradient norm in the folder of a run."""
    metrics = folder / "metrics" if (folder / "metrics").is_dir() else folder
    files = {
        file.relative_to(metrics).as_posix(): file
        for file in sorted(metrics.rglob("*"))
        if file.is_file() and is_metric(file)
    }
    if not files:
        return []
    if column is not None:
        names = [name for name in files if name == column]
    else:
        ranks = {n: r for n in files if (r := rank_name(n)) is not None}
        names = [n for n, rank in ranks.items() if rank == min(ranks.values())]
    if len(names) == 1:
        return [files[names[0]]]
    listed = ", ".join(map(repr, files))
    raise ValueError(
        f"{len(names)} of the MLflow metrics match; pass column=, or --column: {listed}"
    )


def is_metric(file: Path) -> bool:
    """Return whether the first line of a file is that of an MLflow metric."""
    try:
        with open(file, encoding="utf-8", errors="replace") as text:
            return bool(MLFLOW_LINE.fullmatch(text.readline(200)))
    except OSError:
        return False
