"""A small language model on real text: learning rates, and faults in the gradient.

A transformer predicts the bytes of Python's own help texts. First the learning rate is
raised until training fails, under AdamW and under SGD with momentum; then, at a rate
where all is well, one step in fifty has its gradient multiplied by 300. The claims are
those of ZClip (Kumar, Owen, Chowdhury, Güra, "ZClip: adaptive spike mitigation for LLM
pre-training", 2025): larger learning rates become usable, and spikes do no harm.

`python examples/experiments/language_model.py` takes about 5 minutes on two cores.
"""

from typing import Any

import numpy as np
import torch

from autoclip_core import Fixed, Quantile, ZScore
from autoclip_torch import Clipper
from experiment import Table, read_options, run_all, save
from intervals import median_interval
from picture import LINES, draw_method, finish, legend_beside, new_figure, save_picture
from text_model import Transformer, load_text, loss_of, sample

BATCH, WARMUP = 8, 20
RATES = {
    "AdamW": (0.003, 0.01, 0.02, 0.03, 0.05, 0.1, 0.3),
    "SGD": (0.1, 0.3, 0.6, 1.0, 2.0),
}
FAULT_RATES = {"AdamW": 0.01, "SGD": 0.3}
FAULT, FAULT_SHARE = 300.0, 0.02
"""What a fault multiplies the gradient by, and how many steps have one."""

STABLE = 3.0
"""A rate is stable if all seeds end below this test loss, in nats per byte."""

TOP = 4.0
"""The upper end of the picture: worse than knowing nothing but the bytes' shares."""

METHODS: dict[str, Any] = {
    "no clipping": None,
    "fixed 1": Fixed(1.0),
    "quantile 0.9": Quantile(0.9),
    "quantile 0.5": Quantile(0.5),
    "ZScore 2.5": ZScore(2.5),
}
"""A policy; without one the norms are only observed."""


def train(
    optimizer: str, rate: float, method: str, faulty: bool, seed: int, steps: int
) -> dict[str, Any]:
    """Return the test loss in nats per byte, +inf for NaN, and the clip rate."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    faults = np.random.default_rng(seed).random(steps) < FAULT_SHARE * faulty
    text, test, symbols = load_text()
    model = Transformer(symbols)
    policy = METHODS[method]
    clipper = Clipper(
        model, policy or Fixed(1.0), scope="global", dry_run=policy is None
    )
    updater = make_optimizer(optimizer, model)
    for step in range(steps):
        updater.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / WARMUP)
        updater.zero_grad()
        weight = FAULT if faults[step] else 1.0
        (weight * loss_of(model, sample(text, BATCH, generator))).backward()
        clipper.step()
        updater.step()
    stretches = sample(test, 128, torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = float(loss_of(model, stretches))
    rate = clipper.metrics()["clip/clip_rate"] if policy is not None else 0.0
    return {"loss": loss if np.isfinite(loss) else np.inf, "clip_rate": rate}


def make_optimizer(name: str, model: Transformer) -> torch.optim.Optimizer:
    """Return AdamW, or SGD with momentum 0.9; the rate is set at every step."""
    if name == "AdamW":
        return torch.optim.AdamW(model.parameters(), betas=(0.9, 0.999))
    return torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)


def main(arguments: list[str] | None = None) -> None:
    """Run both parts, print the tables, save picture and results."""
    options = read_options(__doc__, arguments)
    seeds, steps = (1, 2) if options.quick else (3, 150)
    settings = [
        (name, rate, method, faulty)
        for name, rates in RATES.items()
        for method in METHODS
        for rate, faulty in [*((r, False) for r in rates), (FAULT_RATES[name], True)]
    ]
    cells = [(*setting, seed, steps) for setting in settings for seed in range(seeds)]
    found = run_all(train, cells, options.workers)
    runs: dict[Any, list[dict[str, Any]]] = {}
    for cell, run in zip(cells, found, strict=True):
        runs.setdefault(cell[:4], []).append(run)
    losses = {setting: [run["loss"] for run in runs[setting]] for setting in settings}
    tables = {f"{name} without faults": rate_table(losses, name) for name in RATES}
    tables[f"{FAULT_SHARE:.0%} of the steps × {FAULT:g}"] = fault_table(losses)
    results = [
        {
            **dict(
                zip(("optimizer", "rate", "method", "faulty"), setting, strict=True)
            ),
            "losses": [
                round(x, 4) if np.isfinite(x) else None for x in losses[setting]
            ],
            "clip_rates": [round(run["clip_rate"], 3) for run in runs[setting]],
        }
        for setting in settings
    ]
    draw(losses, options.output / "language_model.png")
    save("language_model", options.output, tables, results)


def rate_table(losses: Any, name: str) -> Table:
    """Return test losses by learning rate, and the largest stable one."""
    rows = []
    for method in METHODS:
        of_rates = {rate: losses[name, rate, method, False] for rate in RATES[name]}
        cells = [median_interval(found).text(".3g") for found in of_rates.values()]
        stable = [rate for rate, found in of_rates.items() if max(found) < STABLE]
        rows.append([method, *cells, f"{max(stable):g}" if stable else "none"])
    heads = [f"rate {rate:g}" for rate in RATES[name]]
    return Table(["test loss: median (all seeds)", *heads, "largest stable"], rows)


def fault_table(losses: Any) -> Table:
    """Return test losses with and without faults."""
    rows = [
        [
            method,
            *(
                median_interval(losses[name, rate, method, faulty]).text(".3g")
                for name, rate in FAULT_RATES.items()
                for faulty in (False, True)
            ),
        ]
        for method in METHODS
    ]
    heads = [
        f"{name} {rate:g}, {what}"
        for name, rate in FAULT_RATES.items()
        for what in ("no faults", "faults")
    ]
    return Table(["test loss: median (all seeds)", *heads], rows)


def draw(losses: Any, path: Any) -> None:
    """Draw the loss against the rate, and what faults cost, cut at `TOP`."""
    figure = new_figure(13, 4)
    *sweeps, faults = figure.subplots(1, 3, sharey=True)
    for axes, (name, rates) in zip(sweeps, RATES.items(), strict=True):
        for method in METHODS:
            found = [median_interval(losses[name, r, method, False]) for r in rates]
            draw_method(axes, method, rates, np.minimum(found, TOP))
        finish(axes, xscale="log", xlabel="learning rate", ylim=(2.4, TOP + 0.05))
        axes.set_title(name, loc="left")
    sweeps[0].set_ylabel(f"test loss, nats per byte (cut at {TOP:g})")
    for column, (name, rate) in enumerate(FAULT_RATES.items()):
        for index, method in enumerate(METHODS):
            color, _ = LINES[method]
            for faulty, marker in ((False, "o"), (True, "X")):
                found = np.minimum(losses[name, rate, method, faulty], TOP)
                place = np.full(len(found), column + 0.15 * (index - 2))
                faults.plot(place, found, marker, color=color, ms=6)
    names = [f"{name} {rate:g}" for name, rate in FAULT_RATES.items()]
    finish(faults)
    faults.set_xticks(range(len(names)), names)
    faults.set_title("● without, × with faults; each seed", loc="left")
    legend_beside(figure, sweeps[0])
    save_picture(figure, path)


if __name__ == "__main__":
    main()
