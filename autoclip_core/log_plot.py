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


def draw(
    steps: Array,
    title: str,
    several_rows: bool,
    path: str | PathLike[str] | None = None,
) -> Any:
    """Draw recorded steps into a figure of its own; save it where there is a path.

    Args:
      steps: the recorded steps, with the fields of `log.STEP`.
      title: what stands above the picture.
      several_rows: whether a step has several rows.
      path: where to save the picture, or None.

    Returns:
      The `matplotlib.figure.Figure`.

    Raises:
      ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'plot() needs matplotlib: pip install "autoclip-toolkit[plot]"'
        ) from error
    figure = Figure(figsize=(10, 5.5), dpi=120, layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=[5, 1])
    above.set_title(title)
    above.set_ylabel("L2 norm of the gradient\n(loss per unit of parameter)")
    above.set_yscale("log")
    above.set_ylim(log_range(steps))
    above.grid(alpha=0.3, linewidth=0.5)
    draw_lines(above, steps, several_rows)
    draw_marks(above, steps, several_rows)
    draw_rate(below, steps)
    style = {"ncols": 6, "columnspacing": 1.4, "handlelength": 1.4, "frameon": False}
    figure.legend(loc="outside lower center", fontsize=9, **style)
    if path is not None:
        figure.savefig(path)
    return figure


def draw_lines(axes: Any, steps: Array, several_rows: bool) -> None:
    """Draw norm and threshold as lines, and the range of norms in each column."""
    floor = axes.get_ylim()[0]
    norms = np.where(np.isfinite(steps["norm"]), steps["norm"], np.nan)
    thresholds = np.where(np.isfinite(steps["threshold"]), steps["threshold"], np.nan)
    # A line does not show a point between two gaps; its tiny marker does.
    style: dict[str, Any] = {"marker": "o", "ms": 1.6, "mew": 0}
    x, low, middle, high = columns(np.maximum(norms, floor))
    name = "norm (all rows)" if several_rows else "norm"
    if len(x) < len(steps):
        area = {"step": "mid", "color": BLUE, "alpha": 0.3, "lw": 0.5}
        width = -(-len(steps) // len(x))
        axes.fill_between(x, low, high, label=f"{name}, range of {width} steps", **area)
        name = "median"
    axes.plot(x, middle, color=BLUE, lw=0.8, label=name, **style)
    x, _, middle, _ = columns(np.maximum(thresholds, floor))
    name = "threshold (median row)" if several_rows else "threshold"
    axes.plot(x, middle, color=BLACK, lw=1.3, label=name, zorder=3, **style)


def draw_marks(axes: Any, steps: Array, several_rows: bool) -> None:
    """Mark the clipped steps, the non-finite ones, and norms too small for the axis."""
    finite = np.isfinite(steps["norm"])
    clipped = "half the rows clipped" if several_rows else "clipped"
    norms = np.where((steps["clipped"] >= 0.5) & finite, steps["norm"], np.nan)
    x, _, _, highest = columns(norms)
    mark(axes, x, highest, "o", ORANGE, clipped, ms=3)
    edge = {"transform": axes.get_xaxis_transform()}
    x, _, _, there = columns(np.where(steps["finite"], np.nan, 0.97))
    mark(axes, x, there, "x", PURPLE, "non-finite", ms=7, mew=1.8, **edge)
    tiny = finite & (steps["norm"] < axes.get_ylim()[0])
    x, _, _, there = columns(np.where(tiny, 0.02, np.nan))
    mark(axes, x, there, "v", BLUE, "0 or below the axis", ms=5, **edge)


def mark(
    axes: Any, x: Array, y: Array, shape: str, color: str, label: str, **style: Any
) -> None:
    """Draw a mark where y is a number; if it never is, there is no label either."""
    there = ~np.isnan(y)
    if there.any():
        style |= {"marker": shape, "color": color, "label": label}
        axes.plot(x[there], y[there], linestyle="none", **style)


def draw_rate(axes: Any, steps: Array) -> None:
    """Draw the clipping rate of successive stretches of the run as bars, in percent."""
    finite = np.isfinite(steps["norm"])
    x, clipped = fold(np.where(finite, steps["clipped"], np.nan), BARS)
    known = np.maximum(np.sum(~np.isnan(clipped), axis=1), 1)
    rate = 100 * np.nansum(clipped, axis=1) / known
    width = clipped.shape[1]
    axes.bar(x, rate, width=width, color=ORANGE)
    axes.set_ylim(0, 1.1 * rate.max(initial=0) or 1.0)
    margin = max(1, len(steps) / 100)
    axes.set_xlim(-margin, len(steps) + margin)
    axes.set_ylabel("clipped\n(%)")
    axes.set_xlabel(f"recorded step (one bar: {width} step{'s' * (width > 1)})")
    axes.grid(alpha=0.3, linewidth=0.5)


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


def columns(values: Array) -> tuple[Array, Array, Array, Array]:
    """Return the x of each column, and its smallest, median and largest value.

    NaN is left out; a column of nothing else is NaN.

    >>> x, low, middle, high = columns(np.array([1.0, np.nan, 3.0]))
    >>> x.tolist(), middle.tolist()
    ([0.0, 1.0, 2.0], [1.0, nan, 3.0])
    """
    x, folded = fold(values, COLUMNS)
    ordered = np.sort(folded, axis=1)  # NaN goes last
    last = np.maximum(np.sum(~np.isnan(folded), axis=1) - 1, 0)
    row = np.arange(len(x))
    return x, ordered[:, 0], ordered[row, last // 2], ordered[row, last]


def fold(values: Array, most: int) -> tuple[Array, Array]:
    """Cut a series into at most so many equal stretches; NaN fills the last one.

    >>> fold(np.arange(5.0), 3)[1].tolist()
    [[0.0, 1.0], [2.0, 3.0], [4.0, nan]]
    """
    width = max(1, -(-len(values) // most))
    count = -(-len(values) // width)
    padded = np.full(count * width, np.nan)
    padded[: len(values)] = values
    return np.arange(count) * width + (width - 1) / 2, padded.reshape(count, width)
