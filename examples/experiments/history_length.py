"""History length against quantile: a grid of trained networks.

The demo's task: scikit-learn's digits as sequences of 16 × 4 pixels, a network of 50
ReLU units whose recurrent matrix starts as the identity, plain SGD at a rate where
gradients explode. Every cell of the grid is `Quantile(q, history_length=H)`. AutoClip's
paper keeps the whole history; what a shorter one does is asked in its repository
(pseeth/autoclip, issue 6). In a second grid the loss becomes ten times smaller half
way, and the learning rate ten times larger: only the thresholds are stale then.

`python examples/experiments/history_length.py` takes about 3 minutes on two cores.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autoclip_core import Quantile
from autoclip_torch import Clipper
from experiment import Table, read_options, run_all, save
from intervals import median_interval
from picture import new_figure, save_picture
from replicas import Replicas, Weights

sys.path.append(str(Path(__file__).parents[1]))  # the demo's folder
from demo_task import BATCH, HIDDEN, RATE, TEST_EVERY, WARMUP, initial_weights
from digits_data import CLASSES, batches, load

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
HISTORIES = (25, 100, 400, 1600)
"""In steps; the last is longer than the run: the whole history."""

SHIFTS = (1.0, 0.1)
"""What the loss is multiplied by half way; the learning rate is divided by it.

Without clipping the second half would be the same: only the thresholds are stale.
"""


def start_of(seed: int) -> Weights:
    """Return where the demo starts."""
    start = initial_weights(seed)
    zeros = np.zeros(HIDDEN), np.zeros(CLASSES)
    return Weights(
        start["inputs"], start["recurrent"], zeros[0], start["outputs"], zeros[1]
    )


def train(history: int, shift: float, seeds: int, steps: int) -> dict[str, Any]:
    """Return accuracies and clip rates, shape (quantiles, seeds), all side by side."""
    torch.set_num_threads(1)
    starts = [start_of(seed) for seed in range(seeds)] * len(QUANTILES)
    replicas = Replicas(starts, [RATE] * len(starts), torch.relu)
    policies = [
        Quantile(q, history_length=history) for q in QUANTILES for _ in range(seeds)
    ]
    groups = [
        group | {"policy": policy}
        for group, policy in zip(replicas.groups(), policies, strict=True)
    ]
    clipper = Clipper(groups, policies[0], scope="group")
    x, y, test_x, test_y = map(torch.from_numpy, load())
    streams = [batches(seed, steps, BATCH) for seed in range(seeds)]
    test = copies(test_x[None], len(starts)), test_y
    clipped, accuracies = torch.zeros(len(starts)), []
    for step, chosen in enumerate(zip(*streams, strict=True)):
        factor = shift if step >= steps // 2 else 1.0
        rate = RATE * min(1.0, (step + 1) / WARMUP) / factor
        replicas.rates = [rate] * len(starts)
        chosen = torch.from_numpy(np.stack(chosen))
        data = copies(x[chosen], len(QUANTILES)), y[chosen].repeat(len(QUANTILES), 1)
        decision = replicas.step(*data, clipper, loss_scale=factor)
        clipped += decision.clipped
        if (step + 1) % TEST_EVERY == 0:
            accuracies.append(replicas.accuracy(*test))
    shape = (len(QUANTILES), seeds)
    return {
        "accuracy": torch.stack(accuracies[-4:]).mean(0).view(shape).numpy(),
        "clip_rate": (clipped / steps).view(shape).numpy(),
    }


def copies(x: Any, count: int) -> Any:
    """Return x, shape (networks, batch, steps, inputs), `count` times, steps first."""
    return x.repeat(count, 1, 1, 1).permute(2, 0, 1, 3)


def main(arguments: list[str] | None = None) -> None:
    """Run the grid, print the tables, save picture and results."""
    options = read_options(__doc__, arguments)
    seeds, steps = (2, 50) if options.quick else (6, 1000)
    histories = HISTORIES[::3] if options.quick else HISTORIES
    cells = [(h, shift, seeds, steps) for shift in SHIFTS for h in histories]
    found = run_all(train, cells, options.workers)
    runs = {cell[:2]: run for cell, run in zip(cells, found, strict=True)}
    tables = {
        f"Accuracy, {name_of(shift)}": accuracy_table(runs, histories, shift)
        for shift in SHIFTS
    }
    results = [
        {
            "history_length": history,
            "loss_multiplied_by": shift,
            "quantile": quantile,
            "accuracies": accuracies.round(4).tolist(),
            "clip_rates": clip_rates.round(4).tolist(),
        }
        for (history, shift), run in runs.items()
        for quantile, accuracies, clip_rates in zip(
            QUANTILES, run["accuracy"], run["clip_rate"], strict=True
        )
    ]
    draw(runs, histories, options.output / "history_length.png")
    save("history_length", options.output, tables, results)


def name_of(shift: float) -> str:
    """Say what happens half way."""
    return "nothing changes" if shift == 1 else f"norms × {shift:g} half way"


def accuracy_table(runs: Any, histories: Any, shift: float) -> Table:
    """Return accuracies: a row per history, a column per quantile."""
    rows = [
        [
            str(history),
            *(median_interval(a).text(".2f") for a in runs[history, shift]["accuracy"]),
        ]
        for history in histories
    ]
    heads = [f"q = {quantile:g}" for quantile in QUANTILES]
    return Table(["history: median accuracy (all seeds)", *heads], rows)


def draw(runs: Any, histories: Any, path: Any) -> None:
    """Draw heat maps: a row of panels per measure, a column per shift."""
    figure = new_figure(9, 6)
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    for column, shift in enumerate(SHIFTS):
        of_shift = [runs[history, shift] for history in histories]
        accuracies = [np.median(run["accuracy"], axis=1) for run in of_shift]
        clip_rates = [np.mean(run["clip_rate"], axis=1) for run in of_shift]
        heat(panels[0, column], accuracies, ".2f", 0.5, 1.0)
        heat(panels[1, column], clip_rates, ".0%", 0.0, 1.0)
        panels[0, column].set_title(f"Median accuracy, {name_of(shift)}", loc="left")
        panels[1, column].set_title("Realised clip rate", loc="left")
        panels[1, column].set_xlabel("quantile (1 − expected clip rate)")
        panels[1, column].set_xticks(range(len(QUANTILES)), map(str, QUANTILES))
    for axes in panels[:, 0]:
        axes.set_yticks(range(len(histories)), map(str, histories))
        axes.set_ylabel("history length (steps)")
    save_picture(figure, path)


def heat(axes: Any, values: Any, spec: str, low: float, high: float) -> None:
    """Draw one heat map with its numbers written in."""
    values = np.array(values)
    axes.imshow(values, vmin=low, vmax=high, cmap="cividis", aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        color = "black" if value > (low + high) / 2 else "white"
        place = {"ha": "center", "va": "center", "color": color}
        axes.text(column, row, format(value, spec), **place)


if __name__ == "__main__":
    main()
