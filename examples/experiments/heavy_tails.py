"""Regression under heavy-tailed noise: does a quantile need tuning to the scale?

A stream of (x, y) with y = ⟨x, θ⟩ + noise of infinite variance (Student's t with 1.5
degrees of freedom), a share of the labels replaced, and everything multiplied by a
scale. Plain SGD, one example a step; the error is that of the mean of the second half
of the iterates. The claim is that of QC-SGD (Merad and Gaïffas, "Robust stochastic
optimization via gradient quantile clipping", 2023).

`python examples/experiments/heavy_tails.py` takes less than a minute on two cores.
"""

from typing import Any, NamedTuple

import numpy as np

from autoclip_core import Fixed, MeanStd, Quantile, StreamingQuantile, decide
from experiment import Table, read_options, run_all, save
from intervals import median_interval
from picture import draw_method, finish, legend_beside, new_figure, save_picture

INPUTS = 20
RATE = 0.02
SCALES = (1e-3, 1.0, 1e3)
CORRUPTED = (0.0, 0.05)
"""The share of labels replaced by `GARBAGE` times the scale."""

GARBAGE = 1000.0

METHODS: dict[str, Any] = {
    "no clipping": Fixed(1e30),
    "fixed 3": Fixed(3.0),
    "fixed 30": Fixed(30.0),
    "fixed 300": Fixed(300.0),
    "mean + 2 std": MeanStd(2.0),
    "quantile 0.99": Quantile(0.99),
    "quantile 0.9": Quantile(0.9),
    "quantile 0.5": Quantile(0.5),
    "quantile 0.1": Quantile(0.1),
    "streaming 0.5": StreamingQuantile(0.5),
}


class Stream(NamedTuple):
    """What the runs see, one row each: a step's inputs and labels, and the truth."""

    inputs: Any
    labels: Any
    truth: Any


def make_stream(seed: int, steps: int, corrupted: float) -> Stream:
    """Return one run's data at scale 1."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=INPUTS)
    inputs = rng.normal(size=(steps, INPUTS))
    labels = inputs @ truth + rng.standard_t(1.5, size=steps)
    garbage = rng.random(steps) < corrupted
    return Stream(inputs, np.where(garbage, GARBAGE, labels), truth)


def descend(method: str, corrupted: float, seeds: int, steps: int) -> Any:
    """Return errors ‖θ̄ − θ*‖ / scale of shape (scales, seeds).

    All scales and seeds are rows of one policy: each has its own threshold.
    """
    policy = METHODS[method]
    streams = [make_stream(seed, steps, corrupted) for seed in range(seeds)]
    inputs = np.stack([s.inputs for s in streams], axis=1)
    scale = np.array(SCALES)[:, None]
    labels = scale * np.stack([s.labels for s in streams], axis=1)[:, None]
    truth = scale[..., None] * np.stack([s.truth for s in streams])
    theta, total = np.zeros_like(truth), np.zeros_like(truth)
    state = policy.init(rows=truth.shape[0] * seeds)
    for step in range(steps):
        x = inputs[step]
        wrong = np.einsum("si,ksi->ks", x, theta) - labels[step]
        gradient = wrong[..., None] * x
        norms = np.linalg.norm(gradient, axis=-1)
        state, decision = decide(policy, state, norms.ravel().astype(np.float32))
        theta -= RATE * decision.scale.reshape(norms.shape)[..., None] * gradient
        if step >= steps // 2:
            total += theta
    mean = total / (steps - steps // 2)
    return np.linalg.norm(mean - truth, axis=-1) / scale


def main(arguments: list[str] | None = None) -> None:
    """Run all methods, print the table, save picture and results."""
    options = read_options(__doc__, arguments)
    seeds, steps = (3, 600) if options.quick else (20, 20_000)
    cells = [(m, corrupted, seeds, steps) for corrupted in CORRUPTED for m in METHODS]
    found = run_all(descend, cells, options.workers)
    errors = {cell[:2]: result for cell, result in zip(cells, found, strict=True)}
    columns = ["error / scale: median (95 % interval)", *(f"× {s:g}" for s in SCALES)]
    tables = {
        f"{c:.0%} of the labels are garbage": Table(
            columns,
            [[m, *(median_interval(e).text() for e in errors[m, c])] for m in METHODS],
        )
        for c in CORRUPTED
    }
    results = [
        {"method": m, "corrupted": c, "scale": s, "errors": row.round(6).tolist()}
        for (m, c), result in errors.items()
        for s, row in zip(SCALES, result, strict=True)
    ]
    draw(errors, options.output / "heavy_tails.png")
    save("heavy_tails", options.output, tables, results)


def draw(errors: dict[tuple[str, float], Any], path: Any) -> None:
    """Draw the error against the scale, one panel for each share of corruption."""
    figure = new_figure(10, 4)
    panels = figure.subplots(1, len(CORRUPTED), sharey=True)
    for axes, corrupted in zip(panels, CORRUPTED, strict=True):
        for method in METHODS:
            found = [median_interval(row) for row in errors[method, corrupted]]
            draw_method(axes, method, SCALES, found)
        finish(axes, xscale="log", yscale="log", xlabel="scale of labels and truth")
        axes.set_title(f"{corrupted:.0%} of the labels are garbage", loc="left")
    panels[0].set_ylabel("error / scale (median, 95 %)")
    legend_beside(figure, panels[0])
    save_picture(figure, path)


if __name__ == "__main__":
    main()
