"""The log as a file: CSV for a table program, JSON lines with the run's settings."""

import csv
import json
import math
from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt

from autoclip_core.files.formats import numbers_of, read_csv_table, read_jsonl_table
from autoclip_core.record.row_counts import RowCounts
from autoclip_core.record.store import STEP, Store

Array = npt.NDArray[Any]
Path = str | PathLike[str]

NAMES = STEP.names or ()


def write_csv(path: Path, steps: Array) -> None:
    """Write steps as CSV; every number reads back as it was."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(NAMES)
        for step in steps.tolist():
            writer.writerow([int(v) if isinstance(v, bool) else v for v in step])


def write_jsonl(
    path: Path,
    store: Store,
    rows: RowCounts,
    settings: Mapping[str, str],
    told: Mapping[str, int],
) -> None:
    """Write a line about the run, then one per kept step.

    JSON has no infinity and no NaN: they are written as the strings "inf" and "nan".
    """
    steps = store.kept()
    about: dict[str, Any] = {"settings": settings, "told": told}
    if rows.names:
        about["rows"] = rows.to_plain()
    if store.moved:
        highest = [list(map(as_plain, step)) for step in store.highest().tolist()]
        about["past"] = {
            "stride": store.stride, "moved": store.moved, "highest": highest
        }  # fmt: skip
        about["totals"] = store.totals.to_plain()
    with open(path, "w", encoding="utf-8") as file:
        print(json.dumps({"clip_log": about}), file=file)
        for step in steps.tolist():
            plain = {n: as_plain(v) for n, v in zip(NAMES, step, strict=True)}
            print(json.dumps(plain), file=file)


def as_plain(value: Any) -> Any:
    """Return a number as JSON can hold it."""
    lost = isinstance(value, float) and not math.isfinite(value)
    return str(value) if lost else value


def read_csv(path: Path) -> Array:
    """Return the steps of a file that `write_csv` wrote."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        return steps_of(read_csv_table(file), str(path))


def read_jsonl(path: Path) -> tuple[dict[str, Any], Array]:
    """Return what the first line says of the run, and the steps."""
    with open(path, encoding="utf-8-sig") as file:
        table, others = read_jsonl_table(file)
    return about_run(others), steps_of(table, str(path))


def past_of(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `Store.refill` takes, from what `write_jsonl` wrote."""
    rows = [tuple(map(float, step)) for step in plain["highest"]]
    return {**plain, "highest": np.array(rows, STEP)}


def about_run(lines: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what a line of ours says of the run, if there is one."""
    return next((line["clip_log"] for line in lines if "clip_log" in line), {})


def steps_of(table: Mapping[str, list[Any]], source: str) -> Array:
    """Return the columns of a table as steps.

    Raises:
      ValueError: there is no norm or no threshold, or a cell is no number.
    """
    table = {name.removeprefix("clip/"): cells for name, cells in table.items()}
    missing = [name for name in ("norm", "threshold") if name not in table]
    if missing and table:
        raise ValueError(
            f"{source} must have the columns norm and threshold, got "
            f"{', '.join(table)}; to_csv and to_jsonl write them"
        )
    columns = {
        name: np.array(numbers_of(table[name], name)) for name in NAMES if name in table
    }
    if len({len(column) for column in columns.values()}) > 1:
        counts = ", ".join(f"{name} {len(c)}" for name, c in columns.items())
        raise ValueError(f"{source} must have no empty cells, got numbers in {counts}")
    norm = columns.get("norm", np.empty(0))
    threshold = columns.get("threshold", np.empty(0))
    above = norm > threshold
    steps = np.zeros(len(norm), STEP)
    steps["step"] = np.arange(len(norm))
    steps["finite"] = np.isfinite(norm)
    steps["clipped"] = above & np.isfinite(norm)
    steps["scale"] = np.where(above, threshold / np.where(above, norm, 1.0), 1.0)
    steps["scale"][~np.isfinite(norm)] = math.nan
    for name, column in columns.items():
        steps[name] = column
    return steps
