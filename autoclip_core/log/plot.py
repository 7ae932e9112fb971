"""The picture of a run: norm, threshold and clipped steps over time."""

import os
from os import PathLike
from typing import Any

import numpy as np

from autoclip_core.record.step import Array

from .replace_file import open_replacement

COLUMNS = 1000
"""Maximum number of columns, about one per pixel; a column may cover many steps."""

BARS = 50
"""Maximum number of bars that show the clip rate."""

# Colour-blind readers can distinguish these colours (Okabe and Ito; the purple is
# Tol's). Shapes differ too, so that the picture can be read without colour.
BLUE, ORANGE, PURPLE, BLACK = "#0072B2", "#D55E00", "#AA3377", "#000000"
GREEN = "#009E73"

GRADIENT = "L2 norm of the gradient\n(loss per unit of parameter)"
"""The label of the axis of norms."""


def new_figure(size: tuple[float, float]) -> Any:
    """Return an empty figure that is not registered with pyplot.

    Raises:
      ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'a picture needs matplotlib: pip install "autoclip-toolkit[plot]"'
        ) from error
    return Figure(figsize=size, dpi=120, layout="constrained")


def save_figure(figure: Any, path: str | PathLike[str] | None) -> Any:
    """Save a figure unless `path` is None, and return it; the suffix is the format."""
    if path is not None:
        name, suffix = os.path.splitext(os.fspath(path))
        suffix = suffix or ".png"
        with open_replacement(name + suffix, "wb") as file:
            figure.savefig(file, format=suffix[1:])
    return figure


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

    Args:
      steps: the recorded steps, with the fields of `autoclip_core.record.store.STEP`.
      title: the title of the picture.
      has_several_rows: whether a step has several rows. The threshold of the median
        row does not apply to the norm of all rows; in its place is the norm after
        clipping.
      path: where to save the picture, or None.
      highest: the highest steps of the intervals, if `steps` is thinned.
      label: the label of the axis of norms.

    Returns:
      The `matplotlib.figure.Figure`.

    Raises:
      ImportError: matplotlib is not installed.
    """
    figure = new_figure((10, 5.5))
    above, below = figure.subplots(2, sharex=True, height_ratios=[5, 1])
    above.set_title(title)
    above.set_ylabel(label)
    above.set_yscale("log")
    peaks = steps if highest is None else np.concatenate([highest, steps])
    if has_several_rows:
        steps, peaks = (replace_threshold(part) for part in (steps, peaks))
    above.set_ylim(log_axis_limits(peaks))
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
    width = column_width(end, COLUMNS)
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
    number, width = steps["step"], column_width(end, COLUMNS)
    finite = np.isfinite(steps["norm"])
    label = "half the rows clipped" if has_several_rows else "clipped"
    norms = np.where((steps["clipped"] >= 0.5) & finite, steps["norm"], np.nan)
    x, _, _, highest = reduce_to_columns(number, norms, width)
    draw_mark(axes, x, highest, "o", ORANGE, label, ms=3)
    norms = np.where(steps["dropped"] & finite, steps["norm"], np.nan)
    x, _, _, highest = reduce_to_columns(number, norms, width)
    label = "a row dropped" if has_several_rows else "dropped"
    draw_mark(axes, x, highest, "D", GREEN, label, ms=5, zorder=4)
    edge = {"transform": axes.get_xaxis_transform()}
    heights = np.where(steps["finite"], np.nan, 0.97)
    x, _, _, heights = reduce_to_columns(number, heights, width)
    draw_mark(axes, x, heights, "x", PURPLE, "non-finite", ms=7, mew=1.8, **edge)
    is_tiny = finite & (steps["norm"] < axes.get_ylim()[0])
    heights = np.where(is_tiny, 0.02, np.nan)
    x, _, _, heights = reduce_to_columns(number, heights, width)
    draw_mark(axes, x, heights, "v", BLUE, "0 or below the axis", ms=5, **edge)


def draw_mark(
    axes: Any, x: Array, y: Array, shape: str, color: str, label: str, **style: Any
) -> None:
    """Draw a mark wherever y is not NaN; without any mark there is no label either."""
    is_marked = ~np.isnan(y)
    if is_marked.any():
        style |= {"marker": shape, "color": color, "label": label}
        axes.plot(x[is_marked], y[is_marked], linestyle="none", **style)


def draw_rate(axes: Any, steps: Array, end: float, label: str) -> None:
    """Draw the clip rate of successive intervals of the run as bars, in percent."""
    measured = steps[np.isfinite(steps["norm"])]
    width = column_width(end, BARS)
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


def draw_histogram(
    norms: Array,
    threshold: float,
    path: str | PathLike[str] | None = None,
    *,
    label: str = GRADIENT,
) -> Any:
    """Draw the distribution of norms on a log axis, with a line at the threshold.

    Args:
      norms: any norms; the title counts those that are left out because they are not
        finite and positive.
      threshold: where to draw the line; there is none if it is not finite.
      path: where to save the picture, or None.
      label: the label of the axis of norms.

    Returns:
      The `matplotlib.figure.Figure`.

    Raises:
      ImportError: matplotlib is not installed.
    """
    figure = new_figure((7, 4))
    axes = figure.subplots()
    shown = norms[np.isfinite(norms) & (norms > 0)]
    shown = np.clip(shown, 1e-100, 1e100)  # matplotlib squares its input
    left_out = len(norms) - len(shown)
    axes.set_xscale("log")
    if len(shown):
        low, high = np.log10(shown.min()) - 0.02, np.log10(shown.max()) + 0.02
        bins = np.logspace(low, high, 1 + min(100, max(10, int(len(shown) ** 0.5))))
        axes.hist(shown, bins, color=BLUE, alpha=0.75)
        axes.set_yscale("symlog", linthresh=10)  # so that single spikes are visible
        axes.set_ylim(bottom=0)
    if np.isfinite(threshold) and threshold > 0:
        above = float(np.mean(shown > threshold)) if len(shown) else 0.0
        label = f"threshold {threshold:.4g}: {100 * above:.3g} % above"
        axes.axvline(threshold, color=BLACK, ls="--", lw=1.5, label=label)
    note = f" ({left_out} of 0, NaN or infinity left out)" * (left_out > 0)
    axes.set_title(f"Norms of {len(norms)} steps{note}")
    axes.set_xlabel(label.replace("\n", " "))
    axes.set_ylabel("steps")
    axes.grid(alpha=0.3, linewidth=0.5)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    return save_figure(figure, path)


def log_axis_limits(steps: Array) -> tuple[float, float]:
    """Return the limits of the log axis; they include every spike, but not 0.

    The lower limit is at least a millionth of the median. Otherwise one tiny norm would
    compress the rest of the picture.
    """
    values = np.concatenate([steps["norm"], steps["threshold"]])
    values = values[np.isfinite(values) & (values > 0)]
    if not values.size:
        return 0.1, 10.0
    # The axis overflows beyond these limits; no float32 norm lies there.
    logs = np.clip(np.log10(values), -250, 250)
    low, high = max(logs.min(), np.median(logs) - 6), logs.max()
    margin = 0.1 + 0.06 * (high - low)
    return float(10 ** (low - margin)), float(10 ** (high + margin))


def column_width(end: float, count: int) -> int:
    """Return the steps per column, so that at most `count` columns are needed."""
    return max(1, -(-int(end + 1) // count))


def reduce_norms(
    number: Array, norms: Array, floor: float, width: int
) -> tuple[Array, ...]:
    """Return `reduce_to_columns` of the finite norms, each at least `floor`."""
    finite = np.where(np.isfinite(norms), norms, np.nan)
    return reduce_to_columns(number, np.maximum(finite, floor), width)


def reduce_to_columns(number: Array, values: Array, width: int) -> tuple[Array, ...]:
    """Return the x of each column, and its smallest, median and largest value.

    Args:
      number: the number of each step.
      values: a value per step; NaN is ignored, and a column with only NaN is NaN.
      width: the steps per column; a column without any step is left out.

    >>> x, low, middle, high = reduce_to_columns(
    ...     np.array([0, 1, 2, 9]), np.array([1.0, 3.0, np.nan, 5.0]), 2)
    >>> x.tolist(), low.tolist(), high.tolist()
    ([0.5, 2.5, 8.5], [1.0, nan, 5.0], [3.0, nan, 5.0])
    """
    used, column = np.unique(number // width, return_inverse=True)
    is_known = ~np.isnan(values)
    order = np.lexsort((values[is_known], column[is_known]))
    column, values = column[is_known][order], values[is_known][order]
    first = np.searchsorted(column, np.arange(len(used)))
    last = np.searchsorted(column, np.arange(len(used)), side="right") - 1
    has_values = last >= first
    reduced = np.full((3, len(used)), np.nan)
    for row, index in enumerate([first, (first + last) // 2, last]):
        reduced[row, has_values] = values[index[has_values]]
    return used * width + (width - 1) / 2, *reduced
