"""One step of a log, read from the metrics of a clipper, and the totals of the run."""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from .largest import divide_known
from .step import Array, Step, as_float, step_from_numbers

Metrics = Mapping[str, Any]

TOTALS = {
    "steps": "clip/steps",
    "nonfinite": "clip/nonfinite_total",
    "skipped": "clip/skipped_total",
    "dropped": "clip/dropped_total",
    "clip_rate": "clip/clip_rate",
    "other_clippers": "clip/other_clippers",
}
"""What metrics contain of the whole run, by its names in a saved log."""

NUMBERED = re.compile(r"clip/(\d+)/(.*)", re.DOTALL)
"""A metric of one of several clippers."""

UNOBSERVED = Step(math.nan, math.inf, math.nan, 0.0, True, False)
"""A step without a norm."""


def select_clipper(metrics: Metrics, clipper: int | None) -> Metrics:
    """Return the metrics of one of several clippers, which are numbered from 0.

    Metrics without a number stay as they are.

    Raises:
      TypeError: `clipper` is None, and only numbered clippers have metrics.

    >>> select_clipper({"clip/0/norm": 5.0, "clip/1/norm": 2.0, "loss": 1.0}, 1)
    {'clip/norm': 2.0, 'loss': 1.0}
    """
    if clipper is None:
        if "clip/norm" not in metrics and any(map(NUMBERED.fullmatch, metrics)):
            raise TypeError(
                "a dict of metrics must be of one clipper, got those of numbered "
                "clippers; choose one of them: ClipLog(clipper=0)"
            )
        return metrics
    parts = {name: NUMBERED.fullmatch(name) for name in metrics}
    return {
        f"clip/{match[2]}" if match else name: metrics[name]
        for name, match in parts.items()
        if match is None or int(match[1]) == clipper
    }


def split_metrics(metrics: Metrics, clipper: int | None) -> tuple[Metrics, Metrics]:
    """Return the metrics of gradients and those of updates, under the same names.

    Args:
      metrics: the metrics of a step.
      clipper: which clipper to select, as in `select_clipper`.

    Returns:
      Two dicts; the first is empty if the norm of updates is the only one.

    >>> split_metrics({"clip/update_norm": 5.0}, None)
    ({}, {'clip/norm': 5.0})
    """
    metrics = select_clipper(metrics, clipper)
    updates = {
        name.replace("clip/update_", "clip/", 1): value
        for name, value in metrics.items()
        if name.startswith("clip/update_")
    }
    has_gradients = "clip/norm" in metrics or "clip/norm" not in updates
    return metrics if has_gradients else {}, updates


def read_totals(metrics: Metrics) -> dict[str, float]:
    """Return the totals of the run in metrics."""
    return {
        name: float(metrics[key]) if name == "clip_rate" else int(metrics[key])
        for name, key in TOTALS.items()
        if key in metrics
    }


def step_from_metrics(metrics: Metrics) -> Step:
    """Return the last step of a `metrics()` dict; its totals are read elsewhere."""
    missing = [name for name in ("clip/norm", "clip/threshold") if name not in metrics]
    if missing:
        raise TypeError(
            f"a dict of metrics must have clip/norm and clip/threshold, got a "
            f"{type(metrics).__name__} without {', '.join(missing)}; "
            "pass plain numbers as norm=..., threshold=..."
        )
    step = step_from_numbers(
        metrics["clip/norm"],
        metrics["clip/threshold"],
        None,
        metrics.get("clip/clipped"),
    )
    scale = metrics.get("clip/scale")
    if scale is None or not step.finite:
        return step
    scale = as_float("clip/scale", scale)
    return step._replace(scale=scale, dropped=scale == 0 < step.clipped)


class RowMetrics(NamedTuple):
    """The rows in the metrics of a step."""

    names: list[str]
    """Their names."""
    clipped: Array
    """Whether each was clipped, shape (rows,)."""
    observed: Array
    """Whether each had a gradient."""
    ratios: dict[str, float]
    """norm / threshold by name; 0 if one is unknown."""


def rows_from_metrics(metrics: Metrics) -> RowMetrics | None:
    """Return the rows of a `metrics(per_row=True)` dict, or None if it has no rows.

    >>> metrics = {"clip/norm/a": 3.0, "clip/threshold/a": 2.0, "clip/scale/a": 0.5}
    >>> rows_from_metrics(metrics).ratios
    {'a': 1.5}
    """
    start = "clip/norm/"
    names = [name[len(start) :] for name in metrics if name.startswith(start)]
    if not names:
        return None
    norms, thresholds, scales = (
        np.array([metrics.get(f"clip/{kind}/{name}", default) for name in names], float)
        for kind, default in (("norm", np.nan), ("threshold", np.inf), ("scale", 1.0))
    )
    # A skipped update has the scale 0 in every row; `ValueClip` may leave a row above
    # its threshold unchanged.
    clipped = (norms > thresholds) & (scales != 1) & np.isfinite(norms)
    ratios = dict(zip(names, divide_known(norms, thresholds).tolist(), strict=True))
    return RowMetrics(names, clipped, ~np.isnan(norms) | (scales != 1), ratios)
