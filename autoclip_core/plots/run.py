"""The picture of a run: norm, threshold and clipped steps over time."""

from os import PathLike
from typing import Any

import numpy as np

from autoclip_core.record.step import Array

from .columns import (
    COLUMNS,
    choose_log_limits,
    choose_width,
    reduce_norms,
    reduce_to_columns,
)
from .figure import (
    BLACK,
    BLUE,
    GRADIENT,
    GREEN,
    ORANGE,
    PURPLE,
    new_figure,
    save_figure,
)

BARS = 50
"""Maximum number of bars that show the clip rate."""


def draw_run(
    steps: Array,
    title: str,
    has_several_rows: bool,
    path: str | PathLike[str] | None = None,
    *,
    highest: Array | None = None,
    label: str = GRADIENT,
) -> Any:
    """Draw recorded steps into a new figure; save it unless `path` is None.

    If `steps` is thinned, `highest` has the highest step of each interval. With several
    rows, the norm after clipping replaces the threshold: that of the median row does
    not apply to the norm of all rows.
    """
    figure = new_figure((10, 5.5))
    above, below = figure.subplots(2, sharex=True, height_ratios=[5, 1])
    above.set_title(title)
    above.set_ylabel(label)
    above.set_yscale("log")
    peaks = steps if highest is None else np.concatenate([highest, steps])
    if has_several_rows:
        steps, peaks = (replace_threshold(part) for part in (steps, peaks))
    above.set_ylim(choose_log_limits(peaks))
    above.grid(alpha=0.3, linewidth=0.5)
    end = float(steps["step"].max(initial=0))
    draw_lines(above, steps, peaks, has_several_rows, end)
    draw_marks(above, peaks, has_several_rows, end)
    draw_rate(below, steps, end, "rows clipped" if has_several_rows else "clipped")
    style = {"ncols": 6, "columnspacing": 1.4, "handlelength": 1.4, "frameon": False}
    figure.legend(loc="outside lower center", fontsize=9, **style)
    return save_figure(figure, path)


def replace_threshold(steps: Array) -> Array:
    """Return steps whose threshold is the norm of all rows after clipping."""
    steps = steps.copy()
    steps["threshold"] = steps["norm"] * steps["scale"]
    return steps


def draw_lines(
    axes: Any, steps: Array, peaks: Array, has_several_rows: bool, end: float
) -> None:
    """Draw norm and threshold as lines, and the range of norms as an area."""
    floor = axes.get_ylim()[0]
    number = steps["step"]
    # The tiny marker shows a point between two gaps, where there is no line.
    style: dict[str, Any] = {"marker": "o", "ms": 1.6, "mew": 0}
    width = choose_width(end, COLUMNS)
    x, low, middle, _ = reduce_norms(number, steps["norm"], floor, width)
    name = "norm (all rows)" if has_several_rows else "norm"
    if len(x) < len(steps):
        area = {"step": "mid", "color": BLUE, "alpha": 0.3, "lw": 0.5}
        high = reduce_norms(peaks["step"], peaks["norm"], floor, width)[-1]
        axes.fill_between(x, low, high, label=f"{name}, range of {width} steps", **area)
        name = "median"
    axes.plot(x, middle, color=BLUE, lw=0.8, label=name, **style)
    x, _, middle, _ = reduce_norms(number, steps["threshold"], floor, width)
    name = "after clipping (all rows)" if has_several_rows else "threshold"
    axes.plot(x, middle, color=BLACK, lw=1.3, label=name, zorder=3, **style)


def draw_marks(axes: Any, steps: Array, has_several_rows: bool, end: float) -> None:
    """Mark the clipped steps, the non-finite ones, and norms too small for the axis."""
    norms, finite = steps["norm"], np.isfinite(steps["norm"])
    label = "half the rows clipped" if has_several_rows else "clipped"
    heights = np.where(finite & (steps["clipped"] >= 0.5), norms, np.nan)
    draw_mark(axes, steps, heights, end, marker="o", color=ORANGE, label=label, ms=3)
    label = "a row dropped" if has_several_rows else "dropped"
    heights = np.where(finite & steps["dropped"], norms, np.nan)
    style = {"marker": "D", "color": GREEN, "label": label, "ms": 5, "zorder": 4}
    draw_mark(axes, steps, heights, end, **style)
    edge = {"transform": axes.get_xaxis_transform()}
    heights = np.where(steps["finite"], np.nan, 0.97)
    style = {"marker": "x", "color": PURPLE, "label": "non-finite", "ms": 7, "mew": 1.8}
    draw_mark(axes, steps, heights, end, **style, **edge)
    is_tiny = finite & (norms < axes.get_ylim()[0])
    heights = np.where(is_tiny, 0.02, np.nan)
    style = {"marker": "v", "color": BLUE, "label": "0 or below the axis", "ms": 5}
    draw_mark(axes, steps, heights, end, **style, **edge)


def draw_mark(
    axes: Any, steps: Array, heights: Array, end: float, **style: Any
) -> None:
    """Draw a mark at each height that is not NaN; without a mark there is no label."""
    width = choose_width(end, COLUMNS)
    x, _, _, highest = reduce_to_columns(steps["step"], heights, width)
    is_marked = ~np.isnan(highest)
    if is_marked.any():
        axes.plot(x[is_marked], highest[is_marked], linestyle="none", **style)


def draw_rate(axes: Any, steps: Array, end: float, label: str) -> None:
    """Draw the clip rate of successive intervals of the run as bars, in percent."""
    measured = steps[np.isfinite(steps["norm"])]
    width = choose_width(end, BARS)
    bars = measured["step"] // width
    counts = np.bincount(bars)
    clipped = np.bincount(bars, weights=measured["clipped"])
    rate = 100 * clipped / np.maximum(counts, 1)
    x = np.arange(len(rate)) * width + (width - 1) / 2
    axes.bar(x, rate, width=width, color=ORANGE)
    axes.set_ylim(0, 1.1 * rate.max(initial=0) or 1.0)
    margin = max(1, end / 100)
    axes.set_xlim(-margin, end + 1 + margin)
    axes.set_ylabel(f"{label}\n(%)")
    axes.set_xlabel(f"step (one bar: {width} step{'s' * (width > 1)})")
    axes.grid(alpha=0.3, linewidth=0.5)
