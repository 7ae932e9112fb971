"""The heat map of a run: which row was clipped when."""

from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt

from autoclip_core.record.row_counts import RowCounts

from .plot import new_figure, save

Array = npt.NDArray[Any]

MOST_ROWS = 40
"""Rows that fit with their names; of more, those that were clipped most often."""


def draw_rows(
    counts: RowCounts, every: int, path: str | PathLike[str] | None = None
) -> Any:
    """Draw the clip rate of each row in each stretch of the run as a heat map.

    Args:
      counts: how often each row was observed and clipped.
      every: run steps in a recorded step.
      path: where to save the picture, or None.

    Returns:
      The `matplotlib.figure.Figure`.

    Raises:
      ImportError: matplotlib is not installed.
    """
    rows = chosen(counts)
    figure = new_figure((10, 1.6 + 0.24 * max(len(rows), 4)))
    axes = figure.subplots()
    end = counts.steps * every
    width = counts.width * every
    stretches = counts.map().shape[1]
    mesh = axes.pcolormesh(
        np.minimum(np.arange(stretches + 1) * width, end),
        np.arange(len(rows) + 1) - 0.5,
        100 * np.ma.masked_invalid(counts.map()[rows]),
        cmap="cividis",  # even in lightness, made for colour-blind readers
        vmin=0,
        vmax=max(1.0, float(100 * np.nanmax(counts.map(), initial=0.0))),
        rasterized=True,
    )
    axes.set_facecolor("#cccccc")  # shines through where a row was not observed
    axes.set_yticks(
        np.arange(len(rows)),
        [short(counts.names[row]).replace("$", r"\$") for row in rows],
    )
    axes.tick_params(axis="y", labelsize=8, length=0)
    axes.invert_yaxis()
    axes.set_xlabel(f"step (one cell: {width} step{'s' * (width > 1)})")
    among = f", the {len(rows)} most clipped" if len(rows) < len(counts.names) else ""
    axes.set_title(f"Clipping rate of each of {len(counts.names)} rows{among}")
    figure.colorbar(mesh, ax=axes, label="clipped (% of steps)", pad=0.01)
    save(figure, path)
    return figure


def chosen(counts: RowCounts) -> Array:
    """Return the rows to show, in their order: the most clipped if there are many."""
    rates = np.nan_to_num(counts.rates(), nan=-1.0)
    return np.sort(np.argsort(-rates, kind="stable")[:MOST_ROWS])


def short(name: str, most: int = 38) -> str:
    """Return a name that fits, with its ends.

    >>> short("encoder.weight"), short("a" * 30 + "b" * 30, 11)
    ('encoder.weight', 'aaaaa…bbbbb')
    """
    half = (most - 1) // 2
    return name if len(name) <= most else f"{name[:half]}…{name[-half:]}"
