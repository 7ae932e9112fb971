"""The temporal-order task: how often does a plain recurrent network learn it?

A sequence holds two marks, A or B each, one early and one about the middle, among
distractors; the network reads it and then says which of AA, AB, BA, BB it was. The
task, the network (50 tanh units) and the claim are those of Pascanu, Mikolov, Bengio,
"On the difficulty of training recurrent neural networks" (2013); the sequences are
shorter and the runs are too.

`python examples/experiments/temporal_order.py` takes about 5 minutes on two cores.
"""

from typing import Any

import numpy as np
import torch

from autoclip_core import EmaRatio, Fixed, Quantile, ZScore
from autoclip_torch import Clipper
from experiment import Table, read_options, run_all, save
from intervals import success_interval
from picture import LINES, finish, legend_beside, new_figure, save_picture
from replicas import Replicas
from temporal_task import batches, start_of

BATCH = 20
TEST, TEST_EVERY = 1000, 100
"""Fresh sequences per test, and updates between tests."""

SUCCESS = 0.99
"""The paper's: less than 1 % of errors."""

METHODS: dict[str, Any] = {
    "no clipping": None,
    "fixed 1": Fixed(1.0),
    "quantile 0.9": Quantile(0.9, history_length=500),
    "quantile 0.5": Quantile(0.5, history_length=500),
    "quantile 0.1": Quantile(0.1, history_length=500),
    "ZScore 2.5": ZScore(2.5),
    "EmaRatio 1.05": EmaRatio(1.05),
}
"""A policy; without one the norms are only observed."""

RATES = (0.03, 0.1)


def train(
    method: str, length: int, rates: tuple[float, ...], seeds: int, updates: int
) -> dict[str, Any]:
    """Return when each network succeeded, shape (rates, seeds), and the clip rates.

    0 stands for never. All rates and seeds run side by side.
    """
    torch.set_num_threads(1)
    of_rate = [rate for rate in rates for _ in range(seeds)]
    replicas = Replicas(
        [start_of(s) for s in range(seeds)] * len(rates), of_rate, torch.tanh
    )
    policy = METHODS[method]
    clipper = Clipper(
        replicas.groups(), policy or Fixed(1.0), scope="group", dry_run=policy is None
    )
    streams, tests = (
        [np.random.default_rng([seed, kind]) for seed in range(seeds)]
        for kind in (2, 3)
    )
    test = batches(tests, length, TEST, len(rates))
    reached = np.zeros(len(of_rate), int)
    clipped, largest = np.zeros(len(of_rate)), np.zeros(len(of_rate))
    for update in range(1, updates + 1):
        x, y = batches(streams, length, BATCH, len(rates))
        decision = replicas.step(x, y, clipper)
        clipped += decision.clipped.numpy()
        largest = np.fmax(largest, decision.norm.numpy())
        if update % TEST_EVERY == 0:
            right = replicas.accuracy(*test).numpy() >= SUCCESS
            reached[right & (reached == 0)] = update
            if reached.all():
                break
    shape = (len(rates), seeds)
    return {
        "reached": reached.reshape(shape),
        "clip_rate": clipped.reshape(shape) / update,
        "largest": largest.reshape(shape),
    }


def main(arguments: list[str] | None = None) -> None:
    """Run the grid, print the tables, save picture and results."""
    options = read_options(__doc__, arguments)
    lengths, seeds, updates = (
        ((20,), 2, 100) if options.quick else ((20, 30, 40), 6, 2000)
    )
    cells = [(m, length, RATES, seeds, updates) for length in lengths for m in METHODS]
    found = run_all(train, cells, options.workers)
    runs = {cell[:2]: run for cell, run in zip(cells, found, strict=True)}
    tables = {f"Rate {rate:g}": make_table(runs, lengths, rate) for rate in RATES}
    results = [
        {
            "method": method,
            "length": length,
            "rate": rate,
            "updates_to_success": run["reached"][row].tolist(),
            "clip_rates": run["clip_rate"][row].round(3).tolist(),
            "largest_norms": run["largest"][row].round(2).tolist(),
        }
        for (method, length), run in runs.items()
        for row, rate in enumerate(RATES)
    ]
    draw(runs, lengths, options.output / "temporal_order.png")
    save("temporal_order", options.output, tables, results)


def make_table(runs: Any, lengths: Any, rate: float) -> Table:
    """Return successes, updates to success and clip rates at one learning rate."""
    columns = ["seeds that learned it, median updates, steps clipped"]
    columns += [f"T = {length}" for length in lengths]
    row = RATES.index(rate)
    rows = [
        [method, *(cell(method, runs[method, length], row) for length in lengths)]
        for method in METHODS
    ]
    return Table(columns, rows)


def cell(method: str, run: dict[str, Any], row: int) -> str:
    """Return the text of one cell."""
    reached = run["reached"][row]
    successes = reached[reached > 0]
    updates = f"{np.median(successes):.0f}" if successes.size else "–"
    clips = METHODS[method] is not None
    rate = f"{run['clip_rate'][row].mean():.0%}" if clips else "–"
    return f"{len(successes)}/{len(reached)}, {updates}, {rate}"


def draw(runs: Any, lengths: Any, path: Any) -> None:
    """Draw the share of successes with Wilson's intervals, a panel per rate."""
    figure = new_figure(11, 4)
    panels = figure.subplots(1, len(RATES), sharey=True)
    for row, (axes, rate) in enumerate(zip(panels, RATES, strict=True)):
        for index, method in enumerate(METHODS):
            color, dashes = LINES[method]
            reached = [runs[method, length]["reached"][row] for length in lengths]
            found = [success_interval(int(np.sum(r > 0)), len(r)) for r in reached]
            middle, low, high = np.transpose(found)
            shift = np.array(lengths) + 0.5 * (index - 3)  # else the bars hide another
            ends = [middle - low, high - middle]
            style = {"color": color, "ls": dashes, "marker": "o", "elinewidth": 0.7}
            axes.errorbar(shift, middle, ends, label=method, **style)
        finish(
            axes, xlabel="length of the sequences", xticks=lengths, ylim=(-0.05, 1.05)
        )
        axes.set_title(f"Learning rate {rate:g}", loc="left")
    panels[0].set_ylabel("share of seeds that learned it")
    legend_beside(figure, panels[0])
    save_picture(figure, path)


if __name__ == "__main__":
    main()
