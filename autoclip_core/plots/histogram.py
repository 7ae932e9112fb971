"""The picture of the distribution of norms."""

from os import PathLike
from typing import Any

import numpy as np

from autoclip_core.record.step import Array

from .figure import BLACK, BLUE, GRADIENT, new_figure, save_figure


def draw_histogram(
    norms: Array,
    threshold: float,
    path: str | PathLike[str] | None = None,
    *,
    label: str = GRADIENT,
) -> Any:
    """Draw the distribution of norms on a log axis, with a line at a finite threshold.

    Norms that are not finite and positive are left out; the title counts them.
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
