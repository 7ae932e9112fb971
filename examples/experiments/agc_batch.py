"""AGC against batch size, in a residual network without normalisation layers.

scikit-learn's digits, SGD with Nesterov momentum 0.9, a learning rate proportional to
the batch size, a fixed number of updates. The claims are those of Brock, De, Smith,
Simonyan, "High-performance large-scale image recognition without normalization" (2021),
section 4: without clipping large batches fail, smaller thresholds are needed for larger
batches, and the last layer is better left unclipped.

`python examples/experiments/agc_batch.py` takes about 3 minutes on two cores.
"""

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from autoclip_torch import AGC
from experiment import Table, read_options, run_all, save
from intervals import median_interval
from picture import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    finish,
    legend_beside,
    new_figure,
    save_picture,
)
from residual_net import ResidualNet

BATCHES = (32, 128, 512)
RATE_OF_32 = 0.02
TEST_EVERY = 10


class Setting(NamedTuple):
    """A row of the table."""

    clipping: float
    """Of AGC; 0 stands for no clipping."""
    head: bool
    """Whether the last layer is clipped too."""
    color: str
    dashes: str

    @property
    def label(self) -> str:
        if not self.clipping:
            return "no clipping"
        return f"AGC {self.clipping:g}" + (" with the head" if self.head else "")


SETTINGS = (
    Setting(0.0, False, BLACK, ":"),
    Setting(0.16, False, ORANGE, "-"),
    Setting(0.04, False, BLUE, "-"),
    Setting(0.01, False, GREEN, "-"),
    Setting(0.04, True, BLUE, "--"),
    Setting(0.01, True, GREEN, "--"),
)


def rate_of(batch: int) -> float:
    """Return the learning rate, proportional to the batch size."""
    return RATE_OF_32 * batch / 32


@cache
def load_images() -> Any:
    """Return 1400 images to train on and 397 to test with, and their digits."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    x = torch.from_numpy(bunch.images[order] / 8 - 1).float().unsqueeze(1)
    y = torch.from_numpy(bunch.target[order]).long()
    return x[:1400], y[:1400], x[1400:], y[1400:]


def make_clipper(setting: Setting, model: nn.Module) -> AGC:
    """Return the setting's clipper; without clipping it only observes."""
    exclude = [] if setting.head else ["head"]
    if setting.clipping:
        return AGC(model, clipping=setting.clipping, exclude=exclude)
    return AGC(model, exclude=exclude, dry_run=True)


def train(setting: Setting, batch: int, seed: int, updates: int) -> dict[str, Any]:
    """Return test accuracies and training losses, and the rate of clipped units."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    train_x, train_y, test_x, test_y = load_images()
    model = ResidualNet()
    options = {"momentum": 0.9, "nesterov": True}
    sgd = torch.optim.SGD(model.parameters(), lr=rate_of(batch), **options)
    clipper = make_clipper(setting, model)
    accuracies, losses = [], []
    for update in range(1, updates + 1):
        chosen = torch.randint(len(train_x), (batch,))
        sgd.zero_grad()
        loss = nn.functional.cross_entropy(model(train_x[chosen]), train_y[chosen])
        loss.backward()
        clipper.step()
        sgd.step()
        losses.append(loss.item())
        if update % TEST_EVERY == 0:
            with torch.no_grad():
                right = model(test_x).argmax(dim=1) == test_y
            accuracies.append(right.float().mean().item())
    clip_rate = clipper.metrics()["clip/clip_rate"] if setting.clipping else 0.0
    return {"accuracies": accuracies, "losses": losses, "clip_rate": clip_rate}


def final(run: dict[str, Any]) -> float:
    """Return the mean of the last four test accuracies."""
    return float(np.mean(run["accuracies"][-4:]))


def main(arguments: list[str] | None = None) -> None:
    """Run the grid, print the tables, save picture and results."""
    options = read_options(__doc__, arguments)
    seeds, updates = (1, 10) if options.quick else (6, 150)
    batches = BATCHES[:2] if options.quick else BATCHES
    grid = [(setting, batch) for setting in SETTINGS for batch in batches]
    cells = [(*cell, seed, updates) for cell in grid for seed in range(seeds)]
    found = run_all(train, cells, options.workers)
    runs = {
        cell: found[start : start + seeds]
        for cell, start in zip(grid, range(0, len(found), seeds), strict=True)
    }
    draw(runs, batches, options.output / "agc_batch.png")
    results = [
        {
            "setting": setting.label,
            "batch": batch,
            "accuracies": [round(final(run), 4) for run in of_cell],
            "clip_rates": [round(run["clip_rate"], 4) for run in of_cell],
        }
        for (setting, batch), of_cell in runs.items()
    ]
    save("agc_batch", options.output, make_tables(runs, batches), results)


def make_tables(runs: Any, batches: Any) -> dict[str, Table]:
    """Return test accuracies and clip rates: a row per setting, a column per batch."""
    heads = [f"batch {batch}, rate {rate_of(batch):g}" for batch in batches]
    accuracy, clipped = [], []
    for setting in SETTINGS:
        of_setting = [runs[setting, batch] for batch in batches]
        middles = [median_interval([*map(final, r)]).text(".2f") for r in of_setting]
        accuracy.append([setting.label, *middles])
        rates = [np.mean([run["clip_rate"] for run in r]) for r in of_setting]
        if setting.clipping:
            clipped.append([setting.label, *(f"{rate:.0%}" for rate in rates)])
    name = "test accuracy: median (all seeds)"
    return {
        "Accuracy": Table([name, *heads], accuracy),
        "Clipped units": Table(["share of output units clipped", *heads], clipped),
    }


def draw(runs: Any, batches: Any, path: Any) -> None:
    """Draw accuracy against batch size, and the curves of the largest batch."""
    figure = new_figure(13, 4)
    against, losses, accuracies = figure.subplots(1, 3)
    for setting in SETTINGS:
        style = {
            "color": setting.color,
            "ls": setting.dashes,
            "label": setting.label,
        }
        values = [[final(run) for run in runs[setting, batch]] for batch in batches]
        middle, low, high = np.transpose([median_interval(v) for v in values])
        ends = [middle - low, high - middle]
        shift = 1 + 0.04 * (
            SETTINGS.index(setting) - 2
        )  # else the bars hide each other
        against.errorbar(shift * np.array(batches), middle, ends, marker="o", **style)
        of_largest = runs[setting, batches[-1]]
        loss = np.median([run["losses"] for run in of_largest], axis=0)
        losses.plot(np.minimum(loss, 10), lw=1.2, **style)
        accuracy = np.median([run["accuracies"] for run in of_largest], axis=0)
        accuracies.plot(TEST_EVERY * np.arange(1, 1 + len(accuracy)), accuracy, **style)
    finish(against, xscale="log", xlabel="batch size", ylabel="test accuracy")
    against.set_xticks(batches, map(str, batches))
    against.minorticks_off()
    against.set_title("Median and range of seeds", loc="left")
    finish(losses, yscale="log", xlabel="update", ylabel="training loss (cut at 10)")
    losses.set_title(f"Batch {batches[-1]}, median seed", loc="left")
    finish(accuracies, xlabel="update", ylabel="test accuracy", ylim=(0, 1))
    legend_beside(figure, against)
    save_picture(figure, path)


if __name__ == "__main__":
    main()
