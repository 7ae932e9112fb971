"""The pictures' style: colours that colour-blind readers can tell apart, thin grids."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

# Okabe and Ito's colours; the dashes differ too, for readers without colour.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, RED, PINK, GREY = "#0072B2", "#D55E00", "#CC79A7", "#777777"
OLIVE, WINE = "#999933", "#882255"  # Tol's, for the picture with ten lines

LINES = {
    "no clipping": (BLACK, ":"),
    "fixed 1": (ORANGE, "--"),
    "fixed 3": (GREY, "--"),
    "fixed 30": (ORANGE, "--"),
    "fixed 300": (PINK, "--"),
    "mean + 2 std": (RED, "-."),
    "quantile 0.99": (OLIVE, "-."),
    "quantile 0.9": (GREEN, "-"),
    "quantile 0.5": (BLUE, "-"),
    "quantile 0.1": (SKY, "-"),
    "streaming 0.5": (WINE, ":"),
    "rising from 0.5": (RED, "-"),
    "ZScore 2.5": (RED, "-."),
    "EmaRatio 1.05": (PINK, "-."),
}
"""Colour and dashes of a method, the same in every picture that draws it."""


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of this size in inches."""
    return Figure(figsize=(width, height), dpi=100, layout="constrained")


def finish(axes: Any, **labels: Any) -> None:
    """Set labels, scales and limits, and draw the grid."""
    axes.set(**labels)
    axes.grid(alpha=0.3, lw=0.5)


def draw_method(axes: Any, method: str, places: Any, intervals: Any) -> None:
    """Draw a method's middles and the bands from low to high.

    What is dotted lies above what is dashed, and that above what is solid: of lines
    that coincide each shows.
    """
    color, dashes = LINES[method]
    middle, low, high = np.transpose(intervals)
    order = 2 + ("-", "-.", "--", ":").index(dashes) / 10
    size = 7 - 8 * (order - 2)
    style = {"color": color, "ls": dashes, "lw": 1.8, "marker": "o", "ms": size}
    axes.plot(places, middle, zorder=order, label=method, **style)
    axes.fill_between(places, low, high, color=color, alpha=0.15, lw=0)


def legend_beside(figure: Figure, axes: Any) -> None:
    """Put the legend of one panel to the right of all."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)


def save_picture(figure: Figure, path: Path) -> None:
    """Write the picture in 64 colours, a third of the usual size."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    image.quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)
