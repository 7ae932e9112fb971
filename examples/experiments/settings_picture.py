"""The picture of the benchmark: loss against learning rate, and excess of the cells."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from picture import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    RED,
    SKY,
    finish,
    legend_beside,
    new_figure,
    save_picture,
)
from settings_score import Cell, Results, Score, mean_loss

STYLES = {
    "TrustClip": (BLUE, "-"),
    "no clipping": (BLACK, ":"),
    "update bound alone": (SKY, "-"),
    "LARC 0.02": (RED, "--"),
    "AutoClip p = 10": (GREEN, "-."),
}
"""Colour and dashes of the contenders that are drawn, besides the best constant."""

TICKS = (1, 1.2, 1.5, 2, 3, 5)
"""Of the relative losses."""

LIMITS = np.geomspace(0.002, 2.0, 60)
"""Excesses at which the share of cells is drawn."""


def draw(
    results: Results, scores: Mapping[str, Score], constant: str, path: Any
) -> None:
    """Draw a panel for each optimizer, and one for the share of cells near the oracle.

    Args:
      results: of the cells to draw.
      scores: of the contenders over these cells.
      constant: the best single constant.
      path: where to write.
    """
    styles = STYLES | {constant: (ORANGE, "--")}
    drawn = [name for name in styles if name in scores]
    cells = sorted({cell for _, cell in results})
    optimizers = list(dict.fromkeys(cell.optimizer for _, cell in results))
    figure = new_figure(4 * len(optimizers) + 5, 4)
    *panels, shares = figure.subplots(1, len(optimizers) + 1)
    for axes, optimizer in zip(panels, optimizers, strict=True):
        of_optimizer = [cell for cell in cells if cell.optimizer == optimizer]
        for name in drawn:
            color, dashes = styles[name]
            factors, losses = relative_losses(results, name, of_optimizer)
            axes.plot(factors, losses, color=color, ls=dashes, marker="o", label=name)
        finish(axes, xscale="log", yscale="log", xlabel="rate / good rate")
        axes.set_ylim(0.97, 1.1 * TICKS[-1])
        axes.set_yticks(TICKS, map(str, TICKS))
        axes.minorticks_off()
        axes.set_title(optimizer, loc="left")
    panels[0].set_ylabel("test loss / least of the task (median of tasks)")
    for name in drawn:
        color, dashes = styles[name]
        near = [scores[name].share_within(limit) for limit in LIMITS]
        shares.plot(100 * LIMITS, near, color=color, ls=dashes)
    finish(shares, xscale="log", xlabel="excess over the best constant of a cell, %")
    shares.set(ylabel="share of cells within it", ylim=(0, 1.02))
    legend_beside(figure, panels[0])
    save_picture(figure, path)


def relative_losses(
    results: Results, contender: str, cells: Sequence[Cell]
) -> tuple[list[float], list[float]]:
    """Return the factors, and at each the median over tasks of a relative loss.

    The loss is divided by the least that any contender reaches in the task.
    """
    least: dict[str, float] = {}
    for (_, cell), of_cell in results.items():
        loss = mean_loss(of_cell)
        least[cell.task] = min(loss, least.get(cell.task, loss))
    by_factor: dict[float, list[float]] = {}
    for cell in cells:
        loss = mean_loss(results[contender, cell]) / least[cell.task]
        by_factor.setdefault(cell.factor, []).append(loss)
    factors = sorted(by_factor)
    return factors, [float(np.median(by_factor[factor])) for factor in factors]
