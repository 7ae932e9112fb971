"""The heat map of a run: the clip rate of each row over time."""

from os import PathLike
from typing import Any

import numpy as np

from autoclip_core.files.names import make_printable
from autoclip_core.record.row_counts import RowCounts
from autoclip_core.record.step import Array

from .figure import new_figure, save_figure

MAX_ROWS = 40
"""Rows that fit with their names; if there are more, the most clipped are shown."""


def draw_rows(
    counts: RowCounts, every: int, path: str | PathLike[str] | None = None
) -> Any:
    """Draw the clip rate of each row in each interval of the run as a heat map.

    `every` is the number of steps of the run for each recorded step.
    """
    rows = choose_rows(counts)
    figure = new_figure((10, 1.6 + 0.24 * max(len(rows), 4)))
    axes = figure.subplots()
    end = counts.steps * every
    width = counts.width * every
    rates = counts.rates_over_time()
    intervals = rates.shape[1]
    names = [make_printable(counts.names[row]) for row in rows]
    labels = [shorten(name).replace("$", r"\$") for name in names]
    edges = np.minimum(np.arange(intervals + 1) * width, end)
    mesh = draw_heat_map(axes, edges, rates[rows], labels)
    mesh.set_clim(0, max(1.0, float(100 * np.nanmax(rates, initial=0.0))))
    axes.set_xlabel(f"step (one cell: {width} step{'s' * (width > 1)})")
    note = f", the {len(rows)} most clipped" if len(rows) < len(counts.names) else ""
    axes.set_title(f"Clip rate of each of {len(counts.names)} rows{note}")
    figure.colorbar(mesh, ax=axes, label="clipped (% of steps)", pad=0.01)
    return save_figure(figure, path)


def draw_heat_map(axes: Any, edges: Array, rates: Array, labels: list[str]) -> Any:
    """Draw rates of shape (labels, intervals) in percent; NaN is left empty."""
    percent = 100 * np.ma.masked_invalid(rates)
    lines = np.arange(len(labels) + 1) - 0.5
    # The colours are uniform in lightness, which suits colour-blind readers.
    mesh = axes.pcolormesh(edges, lines, percent, cmap="cividis", rasterized=True)
    axes.set_facecolor("#cccccc")  # visible where a row was not observed
    axes.set_yticks(np.arange(len(labels)), labels, fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    return mesh


def choose_rows(counts: RowCounts) -> Array:
    """Return the rows to show in their order; the most clipped if there are many."""
    rates = np.nan_to_num(counts.rates(), nan=-1.0)
    return np.sort(np.argsort(-rates, kind="stable")[:MAX_ROWS])


def shorten(name: str, length: int = 38) -> str:
    """Shorten a name to at most `length` characters; cut it in the middle.

    >>> shorten("encoder.weight"), shorten("a" * 30 + "b" * 30, 11)
    ('encoder.weight', 'aaaaa…bbbbb')
    """
    half = (length - 1) // 2
    return name if len(name) <= length else f"{name[:half]}…{name[-half:]}"
