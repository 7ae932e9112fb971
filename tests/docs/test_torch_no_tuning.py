"""The benchmark of settings: its score, its resumption, its tasks, and its trial."""

import json
import math
from typing import NamedTuple

import pytest

pytestmark = pytest.mark.needs("plot")


class Square(NamedTuple):
    """A run of the store's tests."""

    number: int


def square(run):
    if run.number == 3 and not square.may_pass:
        raise KeyboardInterrupt
    square.calls.append(run.number)
    return {"number": run.number, "square": run.number**2}


@pytest.fixture
def results(load):
    """Results of two cells and two seeds; at the second cell only one seed trains."""
    cell = load("settings_score").Cell
    easy, hard = cell("task", "SGD", 1.0), cell("task", "SGD", 100.0)
    losses = {
        ("none", easy): [1.0, 1.4],
        ("constant", easy): [1.1, 1.5],
        ("bound", easy): [1.2, 1.5],
        ("none", hard): [None, None],
        ("constant", hard): [3.5, 2.0],
        ("bound", hard): [5.0, 3.9],
    }
    return {
        key: [{"loss": loss, "level": 4.0} for loss in of_seeds]
        for key, of_seeds in losses.items()
    }


def test_a_score_compares_with_the_best_of_the_oracle_in_each_cell(load, results):
    module = load("settings_score")
    scores = module.score_all(results, ["none", "bound"], ["none", "constant"])
    # Best mean losses: 1.2 of none, 2.75 of constant; losses above 4 count as 4.
    of_none, of_bound = (list(s.excesses.values()) for s in scores.values())
    assert of_none == pytest.approx([0.0, 4 / 2.75 - 1])
    assert of_bound == pytest.approx([1.35 / 1.2 - 1, 3.95 / 2.75 - 1])
    assert scores["bound"].median([1.0]).middle == pytest.approx(0.125)
    assert scores["bound"].mean == pytest.approx((0.125 + 1.2 / 2.75) / 2)
    assert scores["bound"].share_within(0.2) == 0.5
    # 3.9 is above 95 % of 4.
    assert scores["none"].lost([1.0, 100.0]) == scores["bound"].lost([1.0, 100.0])
    assert scores["bound"].lost([1.0, 100.0]) == "2/4"
    assert scores["bound"].lost([1.0]) == "0/2"


def test_a_run_that_no_contender_trains_is_not_lost(load, results):
    module = load("settings_score")
    for (_, cell), of_cell in results.items():
        if cell.factor == 100.0:
            of_cell[0]["loss"] = math.inf
    scores = module.score_all(results, ["bound"], ["constant"])
    assert scores["bound"].lost([1.0, 100.0]) == "1/3"


def test_the_lost_runs_of_a_cell_are_those_that_another_contender_trains(load, results):
    module = load("settings_score")
    hard = next(cell for _, cell in results if cell.factor == 100.0)
    # Seed 0 is trained by the constant alone (3.5), seed 1 too: 3.9 is lost.
    assert module.list_lost(results, "bound") == {hard: (2, ["constant"])}
    assert module.list_lost(results, "constant") == {}


def test_a_contender_is_as_good_as_the_best_within_the_range_of_its_seeds(
    load, results
):
    module = load("settings_score")
    # The best, none, has the seeds 1.0 and 1.4; the bound's mean is 1.35.
    assert module.count_as_good(results, "bound", 1.0) == (1, 1)
    for (name, cell), of_cell in results.items():
        if (name, cell.factor) == ("bound", 1.0):
            of_cell[0]["loss"] = 1.4
    assert module.count_as_good(results, "bound", 1.0) == (0, 1)
    assert module.count_as_good(results, "none", 100.0) == (0, 1)


def test_a_stopped_benchmark_goes_on_at_the_run_that_it_lacks(load, tmp_path):
    store, path = load("run_store"), tmp_path / "runs.jsonl"
    runs = [Square(number) for number in range(1, 5)]
    square.calls, square.may_pass = [], False
    with pytest.raises(KeyboardInterrupt):
        store.run_missing(square, runs, path, workers=1)
    assert square.calls == [1, 2]
    with path.open("a", encoding="utf-8") as file:
        file.write('{"number": 3, "squ')  # a killed process may leave half a line
    square.may_pass = True
    results = store.run_missing(square, runs, path, workers=1)
    assert square.calls == [1, 2, 3, 4]
    assert {run.number: r["square"] for run, r in results.items()} == {
        1: 1,
        2: 4,
        3: 9,
        4: 16,
    }
    assert store.read_results(path, Square) == results
    store.run_missing(square, runs, path, workers=1)
    assert square.calls == [1, 2, 3, 4]


ZERO_IS_CONSTANT = [
    "heavy tails × 0.001",
    "heavy tails × 1000",
    "residual net",
    "conv net",
    "vision transformer",
    "temporal order",
    "speech, masks",
    "MLP, faults",
    "fine-tuning",
    "control",
]
"""The tasks in which a network of zeros ignores its input as well as is possible."""


def test_a_network_of_zeros_has_the_loss_of_a_constant_prediction(load):
    torch, tasks = load("torch"), load("tasks").TASKS
    for name in ZERO_IS_CONSTANT:
        problem = tasks[name].make(0, 1)
        with torch.no_grad():
            for parameter in problem.model.parameters():
                parameter.zero_()
            assert float(problem.test()) == pytest.approx(problem.level, rel=1e-5), name


def test_the_tasks_for_tuning_and_the_others_have_nothing_in_common(load):
    tasks = load("tasks")
    assert not set(tasks.TUNING) & set(tasks.HELD_OUT)
    assert len(tasks.TASKS) >= 8
    assert abs(len(tasks.TUNING) - len(tasks.HELD_OUT)) <= 1
    assert (min(tasks.FACTORS), max(tasks.FACTORS)) == (0.1, 100.0)


def test_lamb_moves_weights_by_a_share_of_their_norm(load):
    torch, lamb = load("torch"), load("lamb").LAMB
    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = lamb([weight], lr=0.1, weight_decay=0.0)
    weight.grad = torch.tensor([1e-2, -1e2])
    optimizer.step()
    # The first update of Adam is the gradient's sign; it gets the length 0.1 · 5.
    expected = [3 - 0.5 / math.sqrt(2), 4 + 0.5 / math.sqrt(2)]
    assert weight.tolist() == pytest.approx(expected, rel=1e-3)


def test_a_trial_resumes_and_reports_both_halves(load, tmp_path, capsys):
    module = load("no_tuning")
    arguments = ["--quick", "--workers", "1", "--output", str(tmp_path)]
    path = tmp_path / "no_tuning.jsonl"
    module.main(arguments)
    lines = path.read_text(encoding="utf-8").splitlines()
    runs = [json.loads(line) for line in lines]
    assert {run["seed"] for run in runs} == {0, 1}
    assert {run["contender"] for run in runs} == set(module.TRIAL.contenders)
    tables = json.loads((tmp_path / "no_tuning.json").read_text())["tables"]
    summary, _, seeds, screen = tables.values()
    for table in (summary, seeds, screen):
        assert table.count("(best single)") == 1
    assert not any("nan" in table for table in tables.values())
    assert (tmp_path / "no_tuning.png").read_bytes().startswith(b"\x89PNG")
    path.write_text("\n".join(lines[:-1]), encoding="utf-8")
    capsys.readouterr()
    module.main([*arguments, "--report"])
    module.main(arguments)
    again = [json.loads(x) for x in path.read_text(encoding="utf-8").splitlines()]
    assert [r | {"seconds": 0} for r in again] == [r | {"seconds": 0} for r in runs]
