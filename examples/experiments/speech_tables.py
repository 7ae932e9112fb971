"""The tables of the speech experiment: a column per loss, a row per clipping method."""

from typing import Any

import numpy as np

from experiment import Table
from intervals import median_interval
from separation import LOSSES

Runs = dict[tuple[str, str], list[dict[str, Any]]]
"""What the seeds gave, by loss and method; the first method is no clipping."""


def methods_of(runs: Runs) -> list[str]:
    """Return the methods in the order in which they ran."""
    return list(dict.fromkeys(method for _, method in runs))


def score_table(runs: Runs) -> Table:
    """Return the scores, and how far each method is from the best of each loss."""
    medians = {
        method: [np.median([r["score"] for r in runs[loss, method]]) for loss in LOSSES]
        for method in methods_of(runs)
    }
    best = np.max(list(medians.values()), axis=0)
    rows = []
    for method in methods_of(runs):
        of_method = [[r["score"] for r in runs[loss, method]] for loss in LOSSES]
        cells = [median_interval(scores).text(".2f") for scores in of_method]
        worst = np.max(best - medians[method])
        rows.append([method, *cells, f"{worst:.2f}"])
    heads = ["median (range of the seeds)", *LOSSES, "furthest from a loss's best"]
    return Table(heads, rows)


def gain_table(runs: Runs) -> Table:
    """Return paired differences to no clipping: the seeds start and sample alike."""
    rows = []
    for method in methods_of(runs)[1:]:
        row = [method]
        for loss in LOSSES:
            pairs = zip(runs[loss, method], runs[loss, "no clipping"], strict=True)
            gains = [run["score"] - other["score"] for run, other in pairs]
            row.append(f"{np.median(gains):+.2f}")
        rows.append(row)
    return Table(["median of the seeds", *LOSSES], rows)


def norm_table(runs: Runs) -> Table:
    """Return the median norm of each loss, and the share of clipped steps."""

    def mean(name: str, loss: str, method: str) -> float:
        return float(np.mean([run[name] for run in runs[loss, method]]))

    norms = [f"{mean('median_norm', loss, 'no clipping'):.2g}" for loss in LOSSES]
    rows = [["median norm without clipping", *norms]]
    for method in methods_of(runs)[1:]:
        rates = [f"{mean('clip_rate', loss, method):.0%}" for loss in LOSSES]
        rows.append([f"clipped by {method}", *rates])
    return Table(["", *LOSSES], rows)


def correlation_table(runs: Runs, loss: str) -> Table:
    """Return the correlation of log norm and log smoothness over a run's steps."""
    rows = []
    for method in methods_of(runs):
        traces = [np.log(run["trace"]) for run in runs[loss, method]]
        found = [np.corrcoef(trace[1], trace[4])[0, 1] for trace in traces]
        rows.append([method, median_interval(found).text(".2f")])
    return Table(["median (range of the seeds)", "correlation"], rows)
