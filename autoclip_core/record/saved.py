"""What a file stores of a log apart from its steps, as plain Python, and the way back.

The keys are part of the format of `ClipLog.to_jsonl`. "told" holds the totals that were
read from metrics, "past" the thinned steps.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from autoclip_core.checks import check_count, check_number

from .largest import LargestSteps
from .recorder import StepRecorder
from .repeats import Repeats
from .row_counts import RowCounts
from .step import Array
from .store import STEP


def describe(log: StepRecorder) -> dict[str, Any]:
    """Return what is stored of a log apart from its steps."""
    store = log._store
    about: dict[str, Any] = {"told": log._run_totals()}
    if log._repeats.total:
        about["repeats"] = log._repeats._asdict()
    if log._rows.names:
        about["rows"] = log._rows.to_dict()
    if log.largest:
        about["largest"] = log._largest.to_list()
    if store.moved:
        highest = [list(map(to_json, step)) for step in store.highest().tolist()]
        past = {"stride": store.stride, "moved": store.moved}
        about["past"] = past | {"highest": highest}
        about["totals"] = store.totals.to_dict()
    if log.updates is not None:
        about["updates"] = describe(log.updates)
    return about


def restore(log: StepRecorder, steps: Array, about: Mapping[str, Any]) -> None:
    """Restore the steps of an empty log, and what `describe` returned.

    Raises:
      AttributeError, LookupError, OverflowError, TypeError, ValueError: a value is
        missing or wrong.
    """
    if "past" in about:
        log._store.refill(steps, **parse_past(about["past"]))
    else:
        log._store.extend(steps)
    if "rows" in about:
        log._rows = RowCounts.from_dict(about["rows"])
    if "totals" in about:
        log._store.totals.restore(about["totals"])
    log._repeats = parse_repeats(about.get("repeats", {}))
    told = about.get("told", {})
    if "other_clippers" in about:  # a column of a table, which has no totals
        told = {"other_clippers": about["other_clippers"]} | told
    log._logged_totals = parse_totals(told)
    count = check_count("row_count", about.get("row_count", 1), 0)
    log._row_count = max(1, count, len(log._rows.names))
    log._is_of_updates = "is_of_updates" in about
    if "largest" in about:
        log._largest = LargestSteps.from_list(about["largest"])
    else:
        log._largest = LargestSteps.from_steps(steps, log._has_several_rows)
    log._recorded = log._store.totals.counts["steps"]
    last = int(steps["step"].max(initial=-1)) + 1
    log._next_step = max(last, int(log._logged_totals.get("steps", 0)))
    if "updates" in about:
        log.updates = log._make_update_log()
        restore(log.updates, about["updates"]["steps"], about["updates"])


def parse_past(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `Store.refill`; an earlier version saved fewer fields."""
    size = len(STEP.names or ())
    steps = [(*map(float, step), 0.0)[:size] for step in saved["highest"]]
    return {**saved, "highest": np.array(steps, STEP)}


def parse_repeats(saved: Mapping[str, Any]) -> Repeats:
    """Return the counts of the records that repeated a step."""
    return Repeats(**{name: check_count(name, saved[name], 0) for name in saved})


def parse_totals(saved: Mapping[str, Any]) -> dict[str, float]:
    """Return the totals that were read from metrics."""
    totals: dict[str, float] = {}
    for name, value in saved.items():
        if name == "clip_rate":
            totals[name] = check_number(name, value, "in [0, 1]", lambda x: 0 <= x <= 1)
        else:
            totals[name] = check_count(name, value, 0)
    return totals


def to_json(value: Any) -> Any:
    """Return a value as it is, or NaN and infinity as text."""
    is_nonfinite = isinstance(value, float) and not math.isfinite(value)
    return str(value) if is_nonfinite else value
