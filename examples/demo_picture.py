"""The picture of the demo: the losses of all methods, and each method's norms."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from demo_task import RATE, Method, Run

Array = npt.NDArray[Any]

# Okabe and Ito's colours, which colour-blind readers can distinguish. The dashes
# differ, too, so that the curves differ without colour.
STYLES = {
    "none": ("#000000", "-"),
    "low_rate": ("#000000", ":"),
    "trust": ("#882255", "-"),
    "fixed": ("#E69F00", "-"),
    "quantile": ("#0072B2", "-"),
    "median": ("#56B4E9", "--"),
    "mean_std": ("#CC79A7", "-"),
    "agc": ("#009E73", "-."),
    "zclip": ("#D55E00", "-."),
    "trust_high": ("#882255", ":"),
    "agc_high": ("#009E73", ":"),
    "median_high": ("#56B4E9", ":"),
}
NORM, THRESHOLD, CLIPPED, NONFINITE = "#56B4E9", "#000000", "#D55E00", "#AA3377"

LOOK = {
    "font.size": 9.5,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
}
"""Nine inches at this size of letters are read on a page 800 pixels wide."""

NORM_RANGE = (1e-1, 1e4)
"""What the norm panels show; a larger norm is marked at their upper edge."""

WINDOW = 25
"""Steps in the running mean of the loss."""


def draw(runs: Mapping[Method, Sequence[Run]], path: Path) -> None:
    """Save the picture; its norms are those of the seed that exploded most."""
    with rc_context(LOOK):
        figure = Figure(figsize=(9, 9.6), dpi=150, layout="constrained")
        top, bottom = figure.subfigures(2, height_ratios=[1, 1.8], hspace=0.03)
        draw_losses(top, runs)
        unclipped = next(iter(runs.values()))
        worst = int(np.argmax([run.largest_norm for run in unclipped]))
        shown = [method for method in runs if method.rate <= RATE]
        draw_norms(bottom, [runs[method][worst] for method in shown])
        figure.savefig(path)


def draw_losses(figure: Any, runs: Mapping[Method, Sequence[Run]]) -> None:
    """Draw the loss of every method: the median of the seeds, then a running mean."""
    axes = figure.subplots()
    axes.axhline(np.log(10), color="0.6", lw=0.8)
    place = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom"}
    axes.annotate("guessing", (1, np.log(10)), color="0.4", **place)
    lowest = np.log(10)
    for method, of_method in runs.items():
        color, dashes = STYLES[method.name]
        losses = np.array([run.losses for run in of_method])
        losses = np.median(np.where(np.isnan(losses), np.inf, losses), axis=0)
        smooth = running_mean(losses)
        lowest = min(lowest, smooth.min())
        steps = np.arange(len(losses) - len(smooth), len(losses))
        axes.plot(steps, smooth, dashes, color=color, lw=1.5, label=method.label)
    axes.set(yscale="log", ylim=(0.8 * lowest, 5), xlabel="step")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.01)
    title = "Training loss, median seed; a curve ends where half of the seeds are NaN"
    axes.set_title(title, pad=10, fontweight="bold")
    axes.set_ylabel(f"cross entropy, mean of {WINDOW} steps")
    figure.legend(loc="outside right center")


def running_mean(losses: Array) -> Array:
    """Return the means of `WINDOW` successive losses."""
    width = min(WINDOW, len(losses))
    windows = np.lib.stride_tricks.sliding_window_view(losses, width)
    return windows.mean(axis=1)


def draw_norms(figure: Any, runs: Sequence[Run]) -> None:
    """Draw one panel per run: norm, threshold and clipped steps on a log axis."""
    panels = figure.subplots(-(-len(runs) // 3), 3, sharex=True, sharey=True)
    for axes, run in zip(panels.flat, runs, strict=True):
        draw_norm(axes, run)
    for axes in panels[-1]:
        axes.set_xlabel("step")
    handles = {
        label: handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    place = {"loc": "outside lower center", "ncols": len(handles)}
    figure.legend(handles.values(), handles.keys(), **place)
    seed = f"seed {runs[0].seed}, whose norms exploded most without clipping"
    figure.suptitle(
        f"Gradient norm before clipping, {seed}",
        **{"ha": "left", "x": 0.01, "fontsize": 9.5, "fontweight": "bold"},
    )


def draw_norm(axes: Any, run: Run) -> None:
    """Draw the norms of one run, its threshold, and the steps that were clipped."""
    low, high = NORM_RANGE
    steps = np.arange(len(run.norms))
    norms = np.where(run.finite, run.norms, np.nan)
    axes.plot(steps, norms, color=NORM, lw=0.6, zorder=1, label="norm")
    if run.method.clips and not run.method.per_unit:
        clipped = run.clipped > 0
        style = {"color": CLIPPED, "ms": 1.5, "label": "clipped step"}
        axes.plot(steps[clipped], norms[clipped], "o", **style)
        axes.plot(steps, run.thresholds, color=THRESHOLD, lw=1.3, label="threshold")
    mark_edge(axes, steps[norms > high], "^", NORM, f"norm above {high:g}")
    mark_edge(axes, steps[~run.finite], "x", NONFINITE, "NaN or infinite")
    axes.set(yscale="log", ylim=(low, high), title=run.method.label)
    axes.margins(x=0.02)
    corner = {"xycoords": "axes fraction", "ha": "right", "va": "top", "fontsize": 8.5}
    axes.annotate(note(run), (0.98, 0.91), **corner)


def mark_edge(axes: Any, steps: Array, shape: str, color: str, label: str) -> None:
    """Mark steps at the upper edge of a panel."""
    if steps.size:
        style = {"color": color, "label": label, "ms": 4}
        style["transform"] = axes.get_xaxis_transform()
        axes.plot(steps, np.full(steps.size, 0.97), shape, **style)


def note(run: Run) -> str:
    """Return what stands in the panel of a run."""
    lines = [f"largest {run.largest_norm:.3g}"]
    if run.method.clips:
        what = "units" if run.method.per_unit else "steps"
        lines.append(f"clipped: {run.clip_rate:.1%} of {what}")
    return "\n".join(lines)
