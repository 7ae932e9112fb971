"""Skewed noise: where does clipping at a quantile lead, and does a rising one lead on?

A number θ* = 0 is to be found by SGD from gradients θ − θ* + ξ. The noise ξ has the
mean 0, but is skewed: a Pareto variable with the exponent 1.8 (no variance) minus its
mean. Clipping cuts its long side alone, so the clipped gradients are 0 somewhere else.
The claim is that of Shulgin and Richtárik ("On the convergence of DP-SGD with adaptive
clipping", 2024): at a fixed quantile a bias is left, however long one waits; with a
quantile that rises while the step size falls it goes away.

`python examples/experiments/asymmetric_noise.py` takes about a minute on two cores.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from autoclip_core import Fixed, Policy, Quantile, decide
from experiment import Table, read_options, run_all, save
from intervals import median_interval
from picture import draw_method, finish, legend_beside, new_figure, save_picture

EXPONENT = 1.8
START = 5.0
RATE = 0.05
"""The first step size; step t has RATE / sqrt(1 + t / 100)."""

STAGE = 500
"""Steps at the first of the rising quantiles; each next one has twice as many."""


def constant(policy: Policy) -> Callable[[int], Policy]:
    """Return the same policy for every step."""
    return lambda step: policy


def rising(step: int) -> Policy:
    """Return 1 - 0.5, 1 - 0.5 / 2, 1 - 0.5 / 4, ... of the same window of norms."""
    stage = int(math.log2(1 + step / STAGE))
    return Quantile(1 - 0.5 ** (stage + 1))


METHODS: dict[str, Callable[[int], Policy]] = {
    "no clipping": constant(Fixed(1e30)),
    "fixed 1": constant(Fixed(1.0)),
    "quantile 0.5": constant(Quantile(0.5)),
    "quantile 0.9": constant(Quantile(0.9)),
    "quantile 0.99": constant(Quantile(0.99)),
    "rising from 0.5": rising,
}


def descend(method: str, seeds: int, marks: tuple[int, ...]) -> Any:
    """Return |θ̄ − θ*|, shape (marks, seeds); θ̄ is the mean since half of the steps."""
    policy_of = METHODS[method]
    rng = np.random.default_rng(0)
    theta = np.full(seeds, START)
    state = policy_of(0).init(rows=seeds)
    sums = [np.zeros(seeds)]
    for step in range(marks[-1]):
        noise = rng.pareto(EXPONENT, seeds) - 1 / (EXPONENT - 1)
        gradient = theta + noise
        norms = np.abs(gradient).astype(np.float32)
        # A window does not know the quantile that is asked of it.
        state, decision = decide(policy_of(step), state, norms)
        theta = theta - RATE / math.sqrt(1 + step / 100) * decision.scale * gradient
        sums.append(sums[-1] + theta)
    return np.abs([(sums[m] - sums[m // 2]) / (m - m // 2) for m in marks])


def main(arguments: list[str] | None = None) -> None:
    """Run all methods, print the table, save picture and results."""
    options = read_options(__doc__, arguments)
    seeds, first = (3, 60) if options.quick else (20, 1000)
    marks = (first, 4 * first, 16 * first, 64 * first)
    found = run_all(descend, [(m, seeds, marks) for m in METHODS], options.workers)
    errors = dict(zip(METHODS, found, strict=True))
    columns = ["distance: median (95 % interval)", *(f"{m} steps" for m in marks)]
    rows = [[m, *(median_interval(e).text() for e in errors[m])] for m in METHODS]
    results = [
        {"method": method, "steps": steps, "distances": row.round(6).tolist()}
        for method, result in errors.items()
        for steps, row in zip(marks, result, strict=True)
    ]
    draw(errors, marks, options.output / "asymmetric_noise.png")
    tables = {"Distance from the optimum": Table(columns, rows)}
    save("asymmetric_noise", options.output, tables, results)


def draw(errors: dict[str, Any], marks: tuple[int, ...], path: Any) -> None:
    """Draw the distance against the number of steps."""
    figure = new_figure(7, 4)
    axes = figure.subplots()
    for method, result in errors.items():
        draw_method(axes, method, marks, [median_interval(row) for row in result])
    finish(axes, xscale="log", yscale="log", xlabel="steps")
    axes.set_ylabel("distance from the optimum (median, 95 %)")
    legend_beside(figure, axes)
    save_picture(figure, path)


if __name__ == "__main__":
    main()
