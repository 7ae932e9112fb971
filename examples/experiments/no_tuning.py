"""Does one setting train everywhere, without a number to choose?

Tasks, learning rates from a tenth to a hundred times the good one, three optimizers. A
cell is one of each. In each cell every contender runs with one seed; then the best
eight and the named rivals run with five. A contender's excess is its test loss over
that of the best constant of the cell. The settings of TrustClip were chosen on the
tasks in `tasks.TUNING` only.

`python examples/experiments/no_tuning.py` takes at most 4 hours on two cores. It
appends each run to no_tuning.jsonl in the output folder, and goes on from there.
`--report` runs nothing, and shows what is there.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from contenders import CONSTANTS, CONTENDERS, NO_CLIPPING
from experiment import read_options, save
from run_store import read_results, run_missing
from settings_picture import draw
from settings_score import Cell, Results, Score, score_all
from settings_table import make_lost, make_summary, make_table
from tasks import FACTORS, HELD_OUT, OPTIMIZERS, TASKS, TUNING, Task
from training_run import Run, train

NAME = "no_tuning"
ORACLE = [NO_CLIPPING, *CONSTANTS]
RIVALS = [*ORACLE, "TrustClip", "LARC 0.02", "AutoClip p = 10", "LAMB"]
"""The contenders that run with all seeds, whatever the screen says."""

SHOWN = [*RIVALS, "TrustClip, floor 0.1", "TrustClip, ratio 0.02, floor 0.1"]
"""The contenders of the short table; the other tables have all."""

BEST = 8
"""How many of all do besides, by the mean excess over the tasks for tuning."""


Tasks = Mapping[str, Task]


@dataclass(frozen=True)
class Plan:
    """How much is run."""

    tasks: Sequence[str]
    factors: Sequence[float]
    contenders: Sequence[str]
    seeds: int
    steps: int | None
    """Of each run, instead of the task's number."""

    def runs(self, contenders: Iterable[str], seeds: Iterable[int]) -> list[Run]:
        """Return the runs, in the order in which they start."""
        return [
            Run(task, optimizer, factor, contender, seed, self.steps_of(task))
            for seed, contender in product(seeds, contenders)
            for task, optimizer, factor in product(self.tasks, OPTIMIZERS, self.factors)
            if optimizer in CONTENDERS[contender].optimizers
        ]

    def steps_of(self, task: str) -> int:
        """Return the number of steps of a run."""
        return self.steps or TASKS[task].steps


FULL = Plan(list(TASKS), FACTORS, list(CONTENDERS), seeds=5, steps=None)
TRIAL = Plan(
    ["heavy tails × 1", "MLP, faults"],
    (1.0, 100.0),
    [*ORACLE, "TrustClip", "LAMB"],
    seeds=2,
    steps=3,
)


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing, print the table, save picture and results."""
    flags = {"report": "run nothing: show the runs that are stored"}
    options = read_options(__doc__, arguments, flags)
    plan = TRIAL if options.quick else FULL
    path = options.output / f"{NAME}.jsonl"
    if options.report:
        stored = read_results(path, Run)
    else:
        screen = plan.runs(plan.contenders, [0])
        stored = run_missing(train, screen, path, options.workers)
        finalists = choose_finalists(complete(stored, plan, TUNING, seeds=1))
        final = plan.runs(finalists, range(1, plan.seeds))
        stored = run_missing(train, final, path, options.workers)
    report(stored, plan, options.output)


def complete(stored: dict[Any, Any], plan: Plan, half: Tasks, seeds: int) -> Results:
    """Return the results of the contenders that ran all of a half with `seeds`."""
    results: dict[tuple[str, Cell], list[Any]] = {}
    for contender in plan.contenders:
        runs = [r for r in plan.runs([contender], range(seeds)) if r.task in half]
        if all(run in stored for run in runs):
            for run in runs:
                cell = Cell(run.task, run.optimizer, run.factor)
                results.setdefault((contender, cell), []).append(stored[run])
    return results


def complete_all_seeds(
    stored: dict[Any, Any], plan: Plan, half: Tasks
) -> tuple[Results, int]:
    """Return the results with the most seeds that the oracle ran, and their number."""
    for seeds in range(plan.seeds, 0, -1):
        results = complete(stored, plan, half, seeds)
        if set(ORACLE) <= set(contenders_of(results)):
            return results, seeds
    raise SystemExit(f"the constants have not run: {len(stored)} runs are stored")


def contenders_of(results: Results) -> list[str]:
    """Return the contenders that have results, in their order."""
    return list(dict.fromkeys(contender for contender, _ in results))


def score(results: Results) -> dict[str, Score]:
    """Return the scores of the contenders."""
    return score_all(results, contenders_of(results), ORACLE)


def choose_finalists(tuning: Results) -> list[str]:
    """Return the rivals and the best of all, in the order of the contenders."""
    scores = score(tuning)
    best = sorted(scores, key=lambda name: scores[name].mean)[:BEST]
    chosen = {*RIVALS, *best} & set(scores)
    return [name for name in CONTENDERS if name in chosen]


def report(stored: dict[Any, Any], plan: Plan, output: Any) -> None:
    """Print the tables, save picture and results: of the seeds that the oracle ran."""
    halves = TUNING, HELD_OUT
    (tuning, fewer), (held_out, seeds) = (
        complete_all_seeds(stored, plan, half) for half in halves
    )
    scores = score(tuning), score(held_out)
    constant = find_best_constant(*scores)
    title = f"Excess over the best constant of each cell, seeds: {seeds}"
    title += f" (tuning: {fewer})" if fewer != seeds else ""
    tables = {
        "Held-out tasks": make_summary(held_out, pick(scores[1], SHOWN), constant),
        "Cells in which TrustClip loses runs": make_lost(held_out, "TrustClip"),
        title: make_table(*scores, constant),
    }
    if seeds > 1:
        screen = (score(complete(stored, plan, half, seeds=1)) for half in halves)
        tables["Screen: all contenders, one seed"] = make_table(*screen, constant)
    draw(held_out, scores[1], constant, output / f"{NAME}.png")
    save(NAME, output, tables, list_results({**tuning, **held_out}))


def pick(scores: Mapping[str, Score], names: Sequence[str]) -> dict[str, Score]:
    """Return the scores of those that have run, in the order of the names."""
    return {name: scores[name] for name in names if name in scores}


def find_best_constant(*halves: Mapping[str, Score]) -> str:
    """Return the constant with the least mean excess over the cells of both halves."""

    def mean_of(name: str) -> float:
        excesses = [e for half in halves for e in half[name].excesses.values()]
        return sum(excesses) / len(excesses)

    return min(CONSTANTS, key=mean_of)


def list_results(results: Results) -> list[dict[str, Any]]:
    """Return a line for each contender, task and optimizer: losses by rate and seed."""
    lines: dict[tuple[str, str, str], dict[str, Any]] = {}
    for (contender, (task, optimizer, _)), of_cell in results.items():
        empty = {"contender": contender, "task": task, "optimizer": optimizer}
        levels = [float(f"{r['level']:.6g}") for r in of_cell]
        empty |= {"held_out": task in HELD_OUT, "levels": levels}
        line = lines.setdefault((contender, task, optimizer), empty | {"losses": []})
        losses = [r["loss"] for r in of_cell]
        line["losses"].append([x if x is None else float(f"{x:.6g}") for x in losses])
    return list(lines.values())


if __name__ == "__main__":
    main()
