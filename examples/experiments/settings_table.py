"""The tables of the benchmark: a row for each contender."""

from collections.abc import Mapping

from contenders import CONTENDERS
from experiment import Table
from settings_score import Results, Score, count_as_good, list_lost
from tasks import FACTORS

GOOD = FACTORS[:2]
"""At a tenth of the good rate and at the good rate nothing should be given away."""

GROUPS = (GOOD, FACTORS[2:3], FACTORS[3:])
"""The rates of which the short table counts the lost runs."""

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
            of_tuning = score_texts(tuning.get(name))
            texts = [*score_texts(held_out.get(name)), of_tuning[0], of_tuning[2]]
            rows.append([label_of(name, constant), *texts])
    heads = ["lost runs", "median excess %, rate ≤ good", "median excess %, all rates"]
    heads += ["mean excess %", f"within {NEAR:.0%}"]
    return Table(
        ["contender", *heads, "tuning: lost runs", "tuning: median excess %"], rows
    )


def make_summary(results: Results, scores: Mapping[str, Score], constant: str) -> Table:
    """Return the short table: lost runs by rate, excess, cells as good as the best.

    `results` and their scores are those of the held-out tasks.
    """
    rows = []
    for name, score in scores.items():
        lost = [score.lost(factors) for factors in (FACTORS, *GROUPS)]
        medians = [f"{100 * score.median(f).middle:.1f}" for f in (GOOD, FACTORS)]
        good = "–"
        if all((name, cell) in results for _, cell in results):
            good = "{}/{}".format(*count_as_good(results, name, factor=1.0))
        rows.append([label_of(name, constant), *lost, *medians, good])
    heads = ["lost", "rate ≤ good", "× 10", "× 30, × 100"]
    heads += ["excess %, rate ≤ good", "excess %, all rates", "as good as the best"]
    return Table(["contender", *heads], rows)


def label_of(name: str, constant: str) -> str:
    """Return the name, marked if it is the best single constant."""
    return name + (" (best single)" if name == constant else "")


def make_lost(results: Results, contender: str) -> Table:
    """Return the cells in which a contender loses runs."""
    rows = [
        [f"{task}, {optimizer}, rate × {factor:g}", str(count), str(len(names))]
        for (task, optimizer, factor), (count, names) in sorted(
            list_lost(results, contender).items()
        )
    ]
    return Table(["cell", "lost runs", "contenders that train one of them"], rows)


def score_texts(score: Score | None) -> list[str]:
    """Return a score in the order of the columns, and dashes without one."""
    if score is None:
        return ["–"] * 5
    medians = [
        "{:.1f} ({:.1f} to {:.1f})".format(*(100 * x for x in score.median(factors)))
        for factors in (GOOD, FACTORS)
    ]
    near = f"{score.share_within(NEAR):.0%}"
    return [score.lost(FACTORS), *medians, f"{100 * score.mean:.0f}", near]
