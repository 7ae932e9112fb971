"""The picture of one run with and without clipping, after AutoClip's Figure 1."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.ticker import NullFormatter

from picture import BLACK, BLUE, RED, SKY, finish, new_figure, save_picture


def draw(traces: Mapping[str, Any], path: Any) -> None:
    """Draw a column per run; a trace holds loss, norm, threshold, step, smoothness."""
    figure = new_figure(10, 9)
    panels = figure.subplots(4, len(traces), sharey="row")
    for column, (name, trace) in zip(panels.T, traces.items(), strict=True):
        draw_run(column, *trace)
        column[0].set_title(name, loc="left")
    for axes, label in zip(
        panels[:, 0], ("step size ‖Δθ‖", "loss", "norm", "smoothness"), strict=True
    ):
        axes.set_ylabel(label)
    save_picture(figure, path)


def draw_run(
    column: Any, loss: Any, norm: Any, threshold: Any, step: Any, smoothness: Any
) -> None:
    """Draw one run from top to bottom."""
    steps, losses, norms, scatter = column
    steps.plot(step, color=BLUE, lw=0.8)
    finish(steps, yscale="log")
    losses.plot(loss, color=BLUE, lw=0.8)
    finish(losses)
    norms.plot(norm, color=SKY, lw=0.8, label="norm")
    if np.isfinite(threshold).any():
        norms.plot(threshold, color=BLACK, lw=1.2, label="threshold")
    finish(norms, yscale="log", xlabel="step")
    norms.legend(frameon=False, loc="upper left")
    scatter.plot(norm, smoothness, "o", color=RED, ms=2)
    finish(scatter, xscale="log", yscale="log", xlabel="norm")
    scatter.xaxis.set_minor_formatter(NullFormatter())  # they would overlap
    found = np.corrcoef(np.log(norm), np.log(smoothness))[0, 1]
    corner = {"xycoords": "axes fraction", "va": "top"}
    scatter.annotate(
        f"correlation of the logarithms {found:.2f}", (0.03, 0.95), **corner
    )
