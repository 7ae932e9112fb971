"""Pictures of replays: one policy, or several policies for comparison."""

from collections.abc import Mapping
from os import PathLike
from typing import Any

import numpy as np

from autoclip_core.log.formatting import format_number, format_percent
from autoclip_core.plots.columns import (
    COLUMNS,
    choose_log_limits,
    choose_width,
    reduce_norms,
)
from autoclip_core.plots.figure import BLUE, GRADIENT, new_figure, save_figure
from autoclip_core.plots.heat_map import draw_heat_map
from autoclip_core.plots.run import draw_run
from autoclip_core.policy import as_code
from autoclip_core.record.step import Array
from autoclip_core.record.store import STEP

from .replay import Replay

# Okabe and Ito's colours, which colour-blind readers can distinguish. The line styles
# differ too.
LINE_STYLES = (
    ("#000000", "-"),
    ("#D55E00", "-"),
    ("#009E73", "-"),
    ("#CC79A7", "-"),
    ("#E69F00", "--"),
    ("#56B4E9", "--"),
    ("#D55E00", ":"),
    ("#009E73", ":"),
    ("#000000", "--"),
)

INTERVALS = 100
"""Maximum number of columns of the heat map."""


def replay_to_steps(report: Replay) -> Array:
    """Return a replay as an array of the steps of a log."""
    steps = np.zeros(len(report.norms), STEP)
    steps["step"] = np.arange(len(steps))
    steps["norm"], steps["threshold"] = report.norms, report.thresholds
    steps["scale"] = np.where(report.finite, report.scales, np.nan)
    steps["clipped"], steps["finite"] = report.clipped, report.finite
    steps["skipped"], steps["dropped"] = report.skipped, report.dropped
    return steps


def draw_replay(report: Replay, path: str | PathLike[str] | None = None) -> Any:
    """Draw norm, threshold and clipped steps of one replay, as `ClipLog.plot` does."""
    title = (
        f"{as_code(report.policy)}\n"
        f"clip rate {format_percent(report.clip_rate)}, "
        f"mean scale {format_number(report.mean_scale, 3)}, "
        f"spikes caught: {report.describe_spikes()}"
    )
    return draw_run(replay_to_steps(report), title, False, path)


def draw_comparison(
    reports: Mapping[str, Replay], path: str | PathLike[str] | None = None
) -> Any:
    """Draw the norms with each policy's threshold; below, each clip rate over time.

    The reports are replays of the same series, by a short name.
    """
    figure = new_figure((10, 5.5 + 0.28 * len(reports)))
    above, below = figure.subplots(
        2, sharex=True, height_ratios=[5, 0.6 + 0.28 * len(reports)]
    )
    draw_thresholds(above, reports)
    mesh = draw_rates(below, reports)
    figure.colorbar(mesh, ax=below, label="clipped (%)", pad=0.01)
    style = {"ncols": 5, "columnspacing": 1.4, "handlelength": 2.2, "frameon": False}
    figure.legend(loc="outside lower center", fontsize=8.5, **style)
    return save_figure(figure, path)


def draw_thresholds(axes: Any, reports: Mapping[str, Replay]) -> None:
    """Draw the range of the norms as an area, and the thresholds as lines."""
    steps = replay_to_steps(next(iter(reports.values())))
    end = len(steps) - 1
    width = choose_width(end, COLUMNS)
    low, high = choose_log_limits(steps)
    x, lowest, _, highest = reduce_norms(steps["step"], steps["norm"], low, width)
    name = "norm" if width == 1 else f"norm, range of {width} steps"
    if width == 1:
        axes.plot(x, lowest, color=BLUE, alpha=0.4, lw=0.7, label=name)
    else:
        area = {"step": "mid", "color": BLUE, "alpha": 0.3, "lw": 0}
        axes.fill_between(x, lowest, highest, label=name, **area)
    for i, (name, report) in enumerate(reports.items()):
        color, line = LINE_STYLES[i % len(LINE_STYLES)]
        x, _, middle, _ = reduce_norms(steps["step"], report.thresholds, low, width)
        axes.plot(x, middle, color=color, ls=line, lw=1.2, label=name)
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.set_ylabel(GRADIENT)
    axes.set_title(f"Thresholds of {len(reports)} policies on {len(steps)} norms")
    axes.grid(alpha=0.3, linewidth=0.5)


def draw_rates(axes: Any, reports: Mapping[str, Replay]) -> Any:
    """Draw the clip rate of each policy over time as a heat map."""
    size = len(next(iter(reports.values())).norms)
    intervals = min(INTERVALS, size)
    rates = np.stack([report.rates(intervals) for report in reports.values()])
    labels = [f"{name}: {format_percent(r.clip_rate)}" for name, r in reports.items()]
    mesh = draw_heat_map(axes, np.linspace(0, size, intervals + 1), rates, labels)
    mesh.set_clim(0, 100)
    axes.set_xlabel("step")
    return mesh
