"""The largest spikes of a log, with their rows, from every source."""

import json
import math

import numpy as np
import pytest

from autoclip_core import ClipLog, Drop, Fixed, Quantile, decide, write_report
from autoclip_core.clipper.metrics import (
    compute_metrics,
    compute_row_metrics,
    count_step,
    empty_tally,
)
from autoclip_core.log.report import format_spikes, select_spikes
from autoclip_core.record.largest import MOST, LargestSteps, divide_known
from autoclip_core.record.step import Step

SPIKES = {40: 90.0, 70: 500.0, 71: 12.0}
"""Step and norm of the second row; the first row's norm is 3 on step 71."""


def run(record, rows=2, steps=100, limit=2.0):
    """Give the decision and the tally of each step to a function."""
    policy, tally = Fixed(limit), empty_tally(rows)
    for step in range(steps):
        norms = np.ones(rows, np.float32)
        norms[-1] = SPIKES.get(step, 1.0)
        if rows > 1 and step == 71:
            norms[0] = 3.0
        _, decision = decide(policy, policy.init(rows), norms)
        tally = count_step(tally, decision)
        record(decision, tally)


def log_of_decisions(rows=2):
    log = ClipLog(["encoder", "head"][-rows:])
    run(lambda decision, tally: log.record(decision), rows)
    return log


def log_of_metrics(rows=2, names=("encoder", "head")):
    log = ClipLog()

    def record(decision, tally):
        metrics = compute_metrics(decision, tally)
        log.record(metrics | compute_row_metrics(names[-rows:], decision, tally))

    run(record, rows)
    return log


@pytest.mark.parametrize("make", [log_of_decisions, log_of_metrics])
def test_rows_are_named_from_decisions_and_from_metrics(make):
    """Metrics are how logs of Keras and JAX get the norms."""
    first, second, third = make().largest
    assert (first.step, first.ratio, first.rows) == (70, 250.0, (("head", 250.0),))
    assert (second.step, second.ratio, second.rows) == (40, 45.0, (("head", 45.0),))
    assert (third.step, third.rows) == (71, (("head", 6.0), ("encoder", 1.5)))
    assert first.norm == pytest.approx(math.hypot(1, 500))


@pytest.mark.parametrize("make", [log_of_decisions, log_of_metrics])
def test_a_single_row_has_ratios_without_names(make):
    largest = make(rows=1).largest
    assert [(s.step, s.ratio) for s in largest] == [(70, 250), (40, 45), (71, 6)]
    assert {s.rows for s in largest} == {()} or make is log_of_decisions


def test_metrics_without_rows_give_the_norm_before_over_after():
    """The threshold of the median row does not apply to the norm of all rows."""
    log = ClipLog()
    run(lambda decision, tally: log.record(compute_metrics(decision, tally)))
    assert [s.step for s in log.largest] == [70, 40, 71]
    expected = math.hypot(1, 500) / math.hypot(1, 2)
    assert log.largest[0].ratio == pytest.approx(expected)
    assert log.largest[0].rows == ()
    assert log.summary().has_several_rows


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("suffix", [None, "csv", "jsonl"])
def test_a_sparse_log_and_its_files_know_the_number_of_rows(tmp_path, rows, suffix):
    """All rows of each recorded step are clipped: it looks like a step of one row."""
    log = ClipLog(every=50)
    run(lambda d, tally: log.record(compute_metrics(d, tally)), rows, limit=0.5)
    if suffix:
        getattr(log, f"to_{suffix}")(path := tmp_path / "run")
        log = getattr(ClipLog, f"from_{suffix}")(path)
    summary = log.summary()
    assert (summary.recorded, summary.has_several_rows) == (2, rows > 1)
    assert (" (median row)" in str(summary)) == (rows > 1)
    assert [s.ratio for s in log.largest] == [pytest.approx(2)] * 2


def test_only_the_largest_are_kept_and_only_above_the_threshold():
    log, rng = ClipLog(), np.random.default_rng(0)
    norms = rng.permutation(np.arange(200))
    for norm in norms:
        log.record(norm=float(norm), threshold=100.0)
    log.record(norm=math.nan, threshold=1.0)
    log.record(norm=5.0, threshold=math.inf)
    log.record(norm=5.0, threshold=0.0)
    log.record(norm=1e300, threshold=1e-300)  # the quotient is infinite
    kept = [(s.norm, s.step) for s in log.largest]
    steps = {norm: step for step, norm in enumerate(norms.tolist())}
    assert kept == [(float(n), steps[n]) for n in range(199, 199 - MOST, -1)]
    assert LargestSteps.from_list(LargestSteps().to_list()).steps == []


def test_rows_that_are_set_to_0_have_no_ratio_without_their_names():
    log = ClipLog()
    log.record({"clip/norm": 5.0, "clip/threshold": 1.0, "clip/scale": 0.0}
               | {"clip/clipped": 1.0, "clip/rows": 2})  # fmt: skip
    assert log.largest == ()


def test_a_number_that_is_not_known_has_the_ratio_0():
    above = np.array([6.0, math.nan, math.inf, 6.0, 6.0, 6.0, 0.0])
    below = np.array([2.0, 2.0, 2.0, math.nan, math.inf, 0.0, 2.0])
    assert divide_known(above, below).tolist() == [3.0, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("norms", "rows"),
    [
        ([3.0, 5.0, 2.0, 4.0], (("b", 5.0), ("d", 4.0), ("a", 3.0))),
        ([1.0, 5.0], (("b", 5.0),)),  # the first row is at its threshold
    ],
)
def test_at_most_three_rows_are_named_the_largest_ratio_first(norms, rows):
    log, policy = ClipLog(list("abcd")[: len(norms)]), Fixed(1.0)
    log.record(decide(policy, policy.init(len(norms)), norms)[1])
    assert log.largest[0].rows == rows


def test_a_table_has_the_twenty_largest_steps(tmp_path):
    log = ClipLog()
    for norm in [*range(40, 21, -1), 20, 21]:
        log.record(norm=float(norm), threshold=1.0)
    log.to_csv(path := tmp_path / "run.csv")
    expected = [float(norm) for norm in range(40, 20, -1)]
    assert [step.norm for step in ClipLog.from_csv(path).largest] == expected
    assert [step.norm for step in log.largest] == expected


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_files_keep_them(tmp_path, suffix):
    log, path = log_of_decisions(), tmp_path / f"run.{suffix}"
    getattr(log, f"to_{suffix}")(path)
    read = getattr(ClipLog, f"from_{suffix}")(path)
    if suffix == "jsonl":
        assert read.largest == log.largest
        return
    assert [s.step for s in read.largest] == [70, 40, 71]  # a table has no rows


def test_files_of_an_earlier_version_have_them_of_one_row(tmp_path):
    path = tmp_path / "run.jsonl"
    step = {"norm": 1.0, "threshold": 2.0, "scale": 1.0, "clipped": 0.0}
    lines = [{"clip_log": {"settings": {}, "told": {}}}]
    lines += [{"step": i, **step} for i in range(9)]
    lines[4] |= {"norm": 8.0, "scale": 0.25, "clipped": 1.0}
    path.write_text("\n".join(map(json.dumps, lines)))
    [large] = ClipLog.from_jsonl(path).largest
    assert (large.step, large.ratio, large.norm) == (3, 4.0, 8.0)
    assert ClipLog.from_jsonl(path).dropped.tolist() == [False] * 9


@pytest.mark.needs("plot")
def test_the_report_lists_step_ratio_and_rows(tmp_path):
    write_report(log_of_decisions(), tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    cells = [">70<", ">250<", ">head (6), encoder (1.5)<"]
    assert all(cell in text for cell in cells)
    write_report(log_of_decisions(rows=1), tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert ">250<" in text
    assert "<h2>Rows</h2>" not in text
    assert format_spikes((), ClipLog().summary()) == []


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("jump", "spikes"), [(1.0, []), (20.0, [150])])
def test_a_threshold_that_always_acts_has_only_spikes_that_stand_out(
    rows, jump, spikes
):
    log, rng = ClipLog(), np.random.default_rng(0)
    for step, noise in enumerate(rng.normal(0, 0.3, 300)):
        norm = 50 * math.exp(noise) * (jump if step == 150 else 1)
        about = {"clip/scale": 1 / norm, "clip/clipped": 1.0, "clip/rows": rows}
        log.record({"clip/norm": norm, "clip/threshold": 1.0} | about)
    assert [spike.step for spike in select_spikes(log)] == spikes


# Dropped steps.


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("source", ["decisions", "metrics"])
def test_dropped_steps_have_a_column_and_a_mark(tmp_path, rows, source):
    policy, log, tally = Drop(Fixed(9.0), clip=Fixed(2.0)), ClipLog(), empty_tally(rows)
    for norm in [1.0, 4.0, 10.0, 1.0, 20.0]:
        norms = [1.0] * (rows - 1) + [norm]
        _, decision = decide(policy, policy.init(rows), norms)
        tally = count_step(tally, decision)
        metrics = compute_metrics(decision, tally)
        log.record(decision if source == "decisions" else metrics)
    dropped = [False, False, True, False, True]
    assert log.dropped.tolist() == dropped
    for suffix in ("csv", "jsonl"):
        getattr(log, f"to_{suffix}")(path := tmp_path / f"run.{suffix}")
        read = getattr(ClipLog, f"from_{suffix}")(path)
        assert read.dropped.tolist() == dropped
        assert read.summary().dropped == 2
    assert (tmp_path / "run.csv").read_text().startswith("step,norm,threshold,")
    assert ",dropped,rows\n" in (tmp_path / "run.csv").read_text()


@pytest.mark.needs("plot")
def test_a_picture_marks_dropped_steps():
    for rows, label in [(1, "dropped"), (2, "a row dropped")]:
        policy, log = Drop(Quantile(1.0, history_length=3)), ClipLog()
        state = policy.init(rows)
        for norm in [1.0, 1.0, 8.0, 1.0]:
            state, decision = decide(policy, state, [norm] * rows)
            log.record(decision)
        axes = log.plot().axes[0]
        drawn = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        assert drawn[label].get_xdata().tolist() == [2]


def test_a_dropped_step_of_one_row_is_read_from_its_scale():
    log = ClipLog()
    metrics = {"clip/norm": 9.0, "clip/threshold": 2.0, "clip/clipped": 1.0}
    log.record(metrics | {"clip/scale": 0.0, "clip/steps": 51, "clip/dropped_total": 3})
    log.record(metrics | {"clip/scale": 0.2, "clip/steps": 101})
    assert log.dropped.tolist() == [True, False]
    assert Step(1.0, 2.0, 1.0, 0.0, True, False).dropped is False
