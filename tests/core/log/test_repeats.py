"""Metrics that are read again without a step: gradients accumulate, or no update."""

import math

import pytest

from autoclip_core import ClipLog


def metrics_of(steps, norm=1.0):
    """Return the metrics of a clipper after a number of steps."""
    return {"clip/norm": norm, "clip/threshold": 2.0, "clip/steps": steps}


def log_of(counts, **arguments):
    """Return a log of batches; `counts` is the number of steps after each batch."""
    log = ClipLog(**arguments)
    for steps in counts:
        log.record(metrics_of(steps, float(steps)))
    return log


def red_lights(log):
    return [s for s in log.summary().advice if s.startswith("Red light: the last")]


ACCUMULATED = [batch // 4 for batch in range(1, 122)]
"""4 micro-batches per update: 30 updates in 121 batches, the first after 3."""

SKIPPED = [*range(1, 118), *[117] * 123]
"""A loss scale that skips the last 123 updates."""

NEVER = [0] * 240
"""A loss scale that skips each update."""

CASES = {
    "every batch updates": (range(1, 121), 120, 0),
    "accumulation": (ACCUMULATED, 30, 91),
    "skipped to the end": (SKIPPED, 117, 123),
    "never updated": (NEVER, 0, 240),
    "an earlier checkpoint": ([1, 2, 3, 2, 3, 4], 6, 0),
    "an overflow in between": ([1, 2, 2, 3], 3, 1),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("is_saved", [False, True])
def test_a_step_is_counted_once(tmp_path, case, is_saved):
    counts, steps, repeated = CASES[case]
    log = log_of(counts)
    if is_saved:
        log.to_jsonl(tmp_path / "run.jsonl")
        log = ClipLog.from_jsonl(tmp_path / "run.jsonl")
    summary = log.summary()
    assert (len(log), len(log.norms)) == (steps, steps)
    assert (summary.recorded, summary.repeated) == (steps, repeated)
    assert (f"repeated records  {repeated} (no update" in str(summary)) == bool(
        repeated
    )


def test_the_norms_of_a_file_are_those_of_the_updates(tmp_path):
    log = log_of(ACCUMULATED)
    log.to_csv(tmp_path / "run.csv")
    assert ClipLog.from_csv(tmp_path / "run.csv").norms.tolist() == [*range(1, 31)]


def test_a_resumed_log_does_not_count_the_last_step_again(tmp_path):
    log_of([1, 2, 3, 3]).to_jsonl(tmp_path / "run.jsonl")
    log = ClipLog.from_jsonl(tmp_path / "run.jsonl")
    log.record(metrics_of(3))
    log.record(metrics_of(4))
    assert (log.steps.tolist(), log.summary().repeated) == ([0, 1, 2, 3], 2)


def test_both_halves_leave_the_same_records_out():
    log = ClipLog()
    for steps in [1, 1, 2]:
        updates = {"clip/update_norm": 3.0, "clip/update_threshold": 4.0}
        log.record({**metrics_of(steps), **updates, "clip/update_steps": steps})
    assert len(log) == len(log.updates) == 2
    assert log.updates.steps.tolist() == [0, 1]


def test_total_steps_are_updates_if_the_log_reads_one_batch_in_ten():
    assert log_of(ACCUMULATED, every=10).summary().steps == 30


LONG = [batch // 256 for batch in range(1, 256 * 9)]
"""8 updates, and 255 micro-batches of the ninth."""


@pytest.mark.parametrize(
    ("counts", "latest"),
    [
        (ACCUMULATED, 0),
        (LONG, 0),
        ([1, 2] + [2] * 99, 0),
        ([1, 2] + [2] * 100, 100),
        (SKIPPED, 123),
        (NEVER, 240),
        ([*ACCUMULATED, *[30] * 300], 301),
        ([*SKIPPED, 118], 0),
    ],
)
def test_a_run_that_ends_without_updates_is_not_healthy(counts, latest):
    lights = red_lights(log_of(counts))
    assert len(lights) == bool(latest)
    if latest:
        assert f"the last {latest} records repeat one step" in lights[0]


@pytest.mark.parametrize("value", [-1, 1.5, "null"])
def test_a_file_with_a_damaged_count_is_refused(tmp_path, value):
    log_of([1, 1]).to_jsonl(path := tmp_path / "run.jsonl")
    text = path.read_text().replace('"total": 1', f'"total": {value}')
    path.write_text(text)
    with pytest.raises(ValueError, match="clip_log must be as to_jsonl wrote it"):
        ClipLog.from_jsonl(path)


def test_other_norms_in_the_same_step_warn_once():
    """Each step begins with a new state of the clipper."""
    log = ClipLog()
    with pytest.warns(RuntimeWarning, match="begins with a new state") as warned:
        record_all(log, [metrics_of(1, 1.0 + index) for index in range(40)])
    assert len(warned) == 1


def test_a_state_that_begins_anew_after_some_steps_warns_once():
    log, metrics = ClipLog(), [metrics_of(1 + i % 20, float(i)) for i in range(300)]
    with pytest.warns(RuntimeWarning, match="has fallen 5 times: its state") as warned:
        record_all(log, metrics)
    assert len(warned) == 1


SILENT = {
    "a few runs in one log": [metrics_of(1 + i % 50, float(i)) for i in range(250)],
    "long runs in one log": [metrics_of(1 + i % 300, float(i)) for i in range(3000)],
    "earlier checkpoints": [metrics_of(1 + i - i // 50 * 20) for i in range(999)],
    "nothing changes": [metrics_of(1)] * 40,
    "no step yet": [metrics_of(0, float(index)) for index in range(40)],
    "two clippers in one log": [metrics_of(i // 2, float(i)) for i in range(2, 80)],
    "NaN": [metrics_of(1), *[metrics_of(1, math.nan)] * 40],
}


@pytest.mark.parametrize("case", SILENT)
def test_other_repeats_are_silent(case):
    record_all(ClipLog(), SILENT[case])


def record_all(log, metrics):
    for each in metrics:
        log.record(each)
