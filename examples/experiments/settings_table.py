"""The table of the benchmark: a row for each contender."""

from collections.abc import Mapping

from contenders import CONTENDERS
from experiment import Table
from settings_score import Results, Score, count_as_good, list_lost
from tasks import FACTORS

GOOD = FACTORS[:2]
"""At a tenth of the good rate and at the good rate nothing should be given away."""

NEAR = 0.02
"""The excess up to which a cell counts as near the oracle."""


def make_table(
    tuning: Mapping[str, Score], held_out: Mapping[str, Score], constant: str
) -> Table:
    """Return the scores on the held-out tasks, then on the tasks for tuning.

    `constant` is the best single one; its row says so.
    """
    rows = []
    for name in CONTENDERS:
        if name in held_out:
            mark = " (best single)" if name == constant else ""
            of_tuning = score_texts(tuning.get(name))
            texts = [*score_texts(held_out.get(name)), of_tuning[0], of_tuning[2]]
            rows.append([name + mark, *texts])
    heads = ["lost runs", "median excess %, rate ≤ good", "median excess %, all rates"]
    heads += ["mean excess %", f"within {NEAR:.0%}"]
    return Table(
        ["contender", *heads, "tuning: lost runs", "tuning: median excess %"], rows
    )


def make_details(results: Results, contender: str) -> dict[str, Table]:
    """Return where a contender loses runs, and how often each is as good as the best.

    `results` are those of the held-out tasks.
    """
    lost = [
        [f"{task}, {optimizer}, rate × {factor:g}", str(count), "; ".join(names)]
        for (task, optimizer, factor), (count, names) in list_lost(
            results, contender
        ).items()
    ]
    names = dict.fromkeys(name for name, _ in results)
    good = [
        [name, "{}/{}".format(*count_as_good(results, name, factor=1.0))]
        for name in names
        if all((name, cell) in results for _, cell in results)
    ]
    return {
        f"Cells in which {contender} loses runs": Table(
            ["cell", "lost runs", "trained by"], lost
        ),
        "Cells at the good rate within the range of the best contender's seeds": Table(
            ["contender", "cells"], good
        ),
    }


def score_texts(score: Score | None) -> list[str]:
    """Return a score in the order of the columns, and dashes without one."""
    if score is None:
        return ["–"] * 5
    medians = [
        "{:.1f} ({:.1f} to {:.1f})".format(*(100 * x for x in score.median(factors)))
        for factors in (GOOD, FACTORS)
    ]
    near = f"{score.share_within(NEAR):.0%}"
    return [f"{score.lost}/{score.runs}", *medians, f"{100 * score.mean:.0f}", near]
