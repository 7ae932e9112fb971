"""The picture of a run: norm, threshold and clipped steps over time."""

from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

COLUMNS = 1000
"""About one per pixel; with more steps than that, a column stands for several."""

BARS = 50
"""Stretches of the run whose clipping rate is shown."""

# Colour-blind readers can tell these apart (Okabe and Ito; the purple is Tol's). Shapes
# differ too, so that the picture can be read without colour.
BLUE, ORANGE, PURPLE, BLACK = "#0072B2", "#D55E00", "#AA3377", "#000000"


def new_figure(size: tuple[float, float]) -> Any:
    """Return an empty figure that pyplot does not know of.

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


def save(figure: Any, path: str | PathLike[str] | None) -> None:
    """Save the figure where there is a path; its suffix is the format."""
    if path is not None:
        figure.savefig(path)


def draw(
    steps: Array,
    title: str,
    several_rows: bool,
    path: str | PathLike[str] | None = None,
    *,
    highest: Array | None = None,
) -> Any:
    """Draw recorded steps into a figure of its own; save it where there is a path.

    Args:
      steps: the recorded steps, with the fields of `log_store.STEP`.
      title: what stands above the picture.
      several_rows: whether a step has several rows.
      path: where to save the picture, or None.
      highest: steps to show beside them, where `steps` is a sample.

    Returns:
      The `matplotlib.figure.Figure`.

    Raises:
      ImportError: matplotlib is not installed.
    """
    figure = new_figure((10, 5.5))
    above, below = figure.subplots(2, sharex=True, height_ratios=[5, 1])
    above.set_title(title)
    above.set_ylabel("L2 norm of the gradient\n(loss per unit of parameter)")
    above.set_yscale("log")
    peaks = steps if highest is None else np.concatenate([highest, steps])
    above.set_ylim(log_range(peaks))
    above.grid(alpha=0.3, linewidth=0.5)
    end = float(steps["step"].max(initial=0))
    draw_lines(above, steps, peaks, several_rows, end)
    draw_marks(above, peaks, several_rows, end)
    draw_rate(below, steps, end)
    style = {"ncols": 6, "columnspacing": 1.4, "handlelength": 1.4, "frameon": False}
    figure.legend(loc="outside lower center", fontsize=9, **style)
    save(figure, path)
    return figure


def draw_lines(
    axes: Any, steps: Array, peaks: Array, several_rows: bool, end: float
) -> None:
    """Draw norm and threshold as lines, and the range of norms in each column."""
    floor = axes.get_ylim()[0]
    norms = np.where(np.isfinite(steps["norm"]), steps["norm"], np.nan)
    thresholds = np.where(np.isfinite(steps["threshold"]), steps["threshold"], np.nan)
    # A line does not show a point between two gaps; its tiny marker does.
    style: dict[str, Any] = {"marker": "o", "ms": 1.6, "mew": 0}
    width = column_width(end, COLUMNS)
    x, low, middle, _ = columns(steps["step"], np.maximum(norms, floor), width)
    name = "norm (all rows)" if several_rows else "norm"
    if len(x) < len(steps):
        area = {"step": "mid", "color": BLUE, "alpha": 0.3, "lw": 0.5}
        tops = np.where(np.isfinite(peaks["norm"]), peaks["norm"], np.nan)
        high = columns(peaks["step"], np.maximum(tops, floor), width)[-1]
        axes.fill_between(x, low, high, label=f"{name}, range of {width} steps", **area)
        name = "median"
    axes.plot(x, middle, color=BLUE, lw=0.8, label=name, **style)
    x, _, middle, _ = columns(steps["step"], np.maximum(thresholds, floor), width)
    name = "threshold (median row)" if several_rows else "threshold"
    axes.plot(x, middle, color=BLACK, lw=1.3, label=name, zorder=3, **style)


def draw_marks(axes: Any, steps: Array, several_rows: bool, end: float) -> None:
    """Mark the clipped steps, the non-finite ones, and norms too small for the axis."""
    number, width = steps["step"], column_width(end, COLUMNS)
    finite = np.isfinite(steps["norm"])
    clipped = "half the rows clipped" if several_rows else "clipped"
    norms = np.where((steps["clipped"] >= 0.5) & finite, steps["norm"], np.nan)
    x, _, _, highest = columns(number, norms, width)
    mark(axes, x, highest, "o", ORANGE, clipped, ms=3)
    edge = {"transform": axes.get_xaxis_transform()}
    x, _, _, there = columns(number, np.where(steps["finite"], np.nan, 0.97), width)
    mark(axes, x, there, "x", PURPLE, "non-finite", ms=7, mew=1.8, **edge)
    tiny = finite & (steps["norm"] < axes.get_ylim()[0])
    x, _, _, there = columns(number, np.where(tiny, 0.02, np.nan), width)
    mark(axes, x, there, "v", BLUE, "0 or below the axis", ms=5, **edge)


def mark(
    axes: Any, x: Array, y: Array, shape: str, color: str, label: str, **style: Any
) -> None:
    """Draw a mark where y is a number; if it never is, there is no label either."""
    there = ~np.isnan(y)
    if there.any():
        style |= {"marker": shape, "color": color, "label": label}
        axes.plot(x[there], y[there], linestyle="none", **style)


def draw_rate(axes: Any, steps: Array, end: float) -> None:
    """Draw the clipping rate of successive stretches of the run as bars, in percent."""
    measured = steps[np.isfinite(steps["norm"])]
    width = column_width(end, BARS)
    place = measured["step"] // width
    known = np.bincount(place)
    clipped = np.bincount(place, weights=measured["clipped"])
    rate = 100 * clipped / np.maximum(known, 1)
    x = np.arange(len(rate)) * width + (width - 1) / 2
    axes.bar(x, rate, width=width, color=ORANGE)
    axes.set_ylim(0, 1.1 * rate.max(initial=0) or 1.0)
    margin = max(1, end / 100)
    axes.set_xlim(-margin, end + 1 + margin)
    axes.set_ylabel("clipped\n(%)")
    axes.set_xlabel(f"step (one bar: {width} step{'s' * (width > 1)})")
    axes.grid(alpha=0.3, linewidth=0.5)


def draw_histogram(
    norms: Array, threshold: float, path: str | PathLike[str] | None = None
) -> Any:
    """Draw how norms are distributed, on a log axis, with a threshold.

    Args:
      norms: any; what is not finite and positive is left out, and counted.
      threshold: where to draw the line; nowhere if it is not finite.
      path: where to save the picture, or None.

    Returns:
      The `matplotlib.figure.Figure`.

    Raises:
      ImportError: matplotlib is not installed.
    """
    figure = new_figure((7, 4))
    axes = figure.subplots()
    known = norms[np.isfinite(norms) & (norms > 0)]
    known = np.clip(known, 1e-100, 1e100)  # matplotlib squares what it is given
    left_out = len(norms) - len(known)
    axes.set_xscale("log")
    if len(known):
        low, high = np.log10(known.min()) - 0.02, np.log10(known.max()) + 0.02
        bins = np.logspace(low, high, 1 + min(100, max(10, int(len(known) ** 0.5))))
        axes.hist(known, bins, color=BLUE, alpha=0.75)
        axes.set_yscale("symlog", linthresh=10)  # so that the few spikes are seen
        axes.set_ylim(bottom=0)
    if np.isfinite(threshold) and threshold > 0:
        above = float(np.mean(known > threshold)) if len(known) else 0.0
        name = f"threshold {threshold:.4g}: {100 * above:.3g} % above"
        axes.axvline(threshold, color=BLACK, ls="--", lw=1.5, label=name)
    lost = f" ({left_out} of 0, NaN or infinity left out)" * (left_out > 0)
    axes.set_title(f"Norms of {len(norms)} steps{lost}")
    axes.set_xlabel("L2 norm of the gradient (loss per unit of parameter)")
    axes.set_ylabel("steps")
    axes.grid(alpha=0.3, linewidth=0.5)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    save(figure, path)
    return figure


def log_range(steps: Array) -> tuple[float, float]:
    """Return the ends of the log axis: every spike is on it, 0 and its like are not.

    It reaches down to a millionth of the median at most, or one idle step would press
    all others together.
    """
    values = np.concatenate([steps["norm"], steps["threshold"]])
    values = values[np.isfinite(values) & (values > 0)]
    if not values.size:
        return 0.1, 10.0
    # Farther out the axis itself would overflow; no float32 norm is there.
    logs = np.clip(np.log10(values), -250, 250)
    low, high = max(logs.min(), np.median(logs) - 6), logs.max()
    margin = 0.1 + 0.06 * (high - low)
    return float(10 ** (low - margin)), float(10 ** (high + margin))


def column_width(end: float, most: int) -> int:
    """Return how many steps a column stands for, so that at most so many are needed."""
    return max(1, -(-int(end + 1) // most))


def columns(number: Array, values: Array, width: int) -> tuple[Array, ...]:
    """Return the x of each column, and its smallest, median and largest value.

    Args:
      number: the number of each step.
      values: a value for each; NaN is left out, a column of nothing else is NaN.
      width: the steps in a column; a column without any step is left out.

    >>> x, low, middle, high = columns(
    ...     np.array([0, 1, 2, 9]), np.array([1.0, 3.0, np.nan, 5.0]), 2)
    >>> x.tolist(), low.tolist(), high.tolist()
    ([0.5, 2.5, 8.5], [1.0, nan, 5.0], [3.0, nan, 5.0])
    """
    used, place = np.unique(number // width, return_inverse=True)
    known = ~np.isnan(values)
    order = np.lexsort((values[known], place[known]))
    place, values = place[known][order], values[known][order]
    first = np.searchsorted(place, np.arange(len(used)))
    last = np.searchsorted(place, np.arange(len(used)), side="right") - 1
    some = last >= first
    found = np.full((3, len(used)), np.nan)
    for row, at in enumerate([first, (first + last) // 2, last]):
        found[row, some] = values[at[some]]
    return used * width + (width - 1) / 2, *found
