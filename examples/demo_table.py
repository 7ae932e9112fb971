"""The table of the demo: one row per method."""

import statistics
from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table

from demo_task import GOAL, LOST, Method, Run

LEGEND = f"""\
test accuracy: mean ± standard deviation of the seeds; mean of the last 4 tests
to {GOAL:.0%}: median steps to a test accuracy of {GOAL:.0%} (seeds that got there)
clipped: the share of gradients (for AGC: of output units) that was scaled down
non-finite: steps with a NaN or infinite gradient
lost: runs whose last 50 losses have a median of NaN or above {LOST:g} (a guess: 2.3)"""


def make_table(runs: Mapping[Method, Sequence[Run]]) -> Table:
    """Return the table of all runs; it is less than 80 columns wide."""
    table = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    table.add_column("method", no_wrap=True)
    for name in ("test accuracy", f"to {GOAL:.0%}", "clipped", "non-finite", "lost"):
        table.add_column(name, justify="right", no_wrap=True)
    for method, of_method in runs.items():
        table.add_row(method.label, *cells(method, of_method))
    return table


def cells(method: Method, runs: Sequence[Run]) -> list[str]:
    """Return the numbers of one method as text."""
    steps = sum(len(run.losses) for run in runs)
    nonfinite = sum(run.nonfinite_steps for run in runs)
    clip_rate = statistics.fmean(run.clip_rate for run in runs)
    return [
        spread([run.accuracy for run in runs]),
        goal(runs),
        f"{clip_rate:.1%}" if method.clips else "–",
        f"{nonfinite}/{steps}" if nonfinite else "0",
        f"{count_lost(runs)}/{len(runs)}",
    ]


def spread(values: Sequence[float]) -> str:
    """Return mean ± standard deviation; of one value, the value."""
    mean = f"{statistics.fmean(values):.3f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.3f}"


def goal(runs: Sequence[Run]) -> str:
    """Return the median steps of the runs that got there, and how many did."""
    reached = [run.steps_to_goal for run in runs if run.steps_to_goal is not None]
    median = statistics.median_low(reached) if reached else "–"
    return f"{median} ({len(reached)}/{len(runs)})"


def count_lost(runs: Sequence[Run]) -> int:
    """Return how many runs ended no better than a guess."""
    return sum(run.lost for run in runs)


def mean_accuracy(runs: Sequence[Run]) -> float:
    """Return the mean over the seeds."""
    return statistics.fmean(run.accuracy for run in runs)


def verdict(runs: Mapping[Method, Sequence[Run]]) -> str:
    """Say in words what the table says, whichever way it came out."""
    lines = []
    for method, of_method in runs.items():
        if not method.clips:
            lost = f"{count_lost(of_method)} of {len(of_method)} runs lost"
            text = f"accuracy {mean_accuracy(of_method):.3f}, {lost}"
            lines.append(f"Without clipping at rate {method.rate}: {text}.")
    clips = [method for method in runs if method.clips]
    for rate in sorted({method.rate for method in clips}):
        of_rate = [method for method in clips if method.rate == rate]
        best = max(of_rate, key=lambda method: mean_accuracy(runs[method]))
        text = f"{best.label}, accuracy {mean_accuracy(runs[best]):.3f}"
        lines.append(f"Best of those that clip, at rate {rate}: {text}.")
    return "\n".join(lines)
