"""A log of any length: stored steps, exact totals, rows by name, files."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from autoclip_core import ClipLog, Fixed, decide
from autoclip_core.record import row_counts as log_rows
from autoclip_core.record import store as log_store
from autoclip_core.record.totals import RunTotals

NAN, INF = math.nan, math.inf


@pytest.fixture
def small(monkeypatch):
    """Make the stores so small that a short run fills them."""
    monkeypatch.setattr(log_store, "RECENT", 256)
    monkeypatch.setattr(log_store, "BLOCK", 128)
    monkeypatch.setattr(log_store, "INTERVALS", 128)
    monkeypatch.setattr(log_store, "PENDING", 32)


def long_run(steps=5000, seed=0):
    norms = np.exp(np.random.default_rng(seed).normal(size=steps))
    norms[777], norms[2345], norms[3210] = 1e4, NAN, 1e6
    log = ClipLog()
    for norm in norms.tolist():
        log.record(norm=norm, threshold=2.0)
    return log, norms


@pytest.mark.usefixtures("small")
def test_all_recent_steps_and_an_even_sample_of_older_ones_are_stored():
    log, norms = long_run()
    steps = log.steps
    assert len(log) == 5000
    assert len(steps) <= 128 + 384
    recent = steps >= 5000 - 256
    assert steps[recent].tolist() == list(range(5000 - 256, 5000))
    np.testing.assert_array_equal(log.norms, norms[steps])
    past = steps[: log._store.moved // log._store.stride]
    assert set(np.diff(past)) == {log._store.stride}


@pytest.mark.usefixtures("small")
def test_the_highest_norms_of_the_past_are_stored():
    log, _ = long_run()
    highest = log._store.highest()["step"].tolist()
    assert {777, 2345, 3210} <= set(highest)


@pytest.mark.usefixtures("small")
def test_the_totals_stay_exact():
    log, norms = long_run()
    summary, finite = log.summary(), norms[np.isfinite(norms)]
    assert (summary.steps, summary.measured, summary.nonfinite) == (5000, 4999, 1)
    assert summary.clip_rate == pytest.approx(np.mean(finite > 2.0))
    assert summary.mean_scale == pytest.approx(np.mean(np.minimum(1, 2.0 / finite)))
    assert summary.max_norm == 1e6
    assert summary.median_norm == pytest.approx(np.median(finite), rel=0.01)
    assert summary.p99_norm == pytest.approx(np.quantile(finite, 0.99), rel=0.03)


def test_quantiles_from_bins_are_within_half_a_percent():
    norms = np.exp(np.random.default_rng(0).normal(scale=9, size=20_001))
    totals, steps = RunTotals(), np.zeros(len(norms), log_store.STEP)
    steps["norm"] = norms
    totals.add(steps)
    for q in (0.1, 0.5, 0.9):
        assert totals.quantile(q) == pytest.approx(np.quantile(norms, q), rel=0.0055)


def test_only_every_kth_step_is_read():
    class Device:
        """A number that counts its reads."""

        reads, ndim = 0, 0

        def item(self):
            Device.reads += 1
            return 3.0

    log = ClipLog(every=50)
    for _ in range(200):
        log.record(norm=Device(), threshold=2.0)
    assert Device.reads == 4
    assert log.steps.tolist() == [0, 50, 100, 150]
    assert len(log) == 4


def test_metrics_set_the_totals_and_the_step():
    log = ClipLog()
    for step, nonfinite in [(50, 0), (100, 3)]:
        metrics = {"clip/norm": 4.0, "clip/threshold": 2.0, "clip/scale": 0.7}
        metrics |= {"clip/clipped": 0.25, "clip/nonfinite_total": nonfinite}
        log.record(metrics | {"clip/skipped_total": 1, "clip/steps": step})
    assert log.steps.tolist() == [49, 99]
    assert (log.scales[0], log.clipped[0]) == (0.7, 0.25)
    summary = log.summary()
    assert (summary.steps, summary.measured) == (100, 2)
    assert (summary.nonfinite, summary.skipped) == (3, 1)


@pytest.mark.parametrize("norm", [0.5, 4.0, 0.0, NAN, INF, -INF])
@pytest.mark.parametrize("observed", [True, False])
@pytest.mark.parametrize("threshold", [2.0, NAN])
def test_the_short_path_of_one_row_stores_what_the_general_one_does(
    norm, observed, threshold
):
    fields = decide(Fixed(2.0), Fixed(2.0).init(1), [abs(norm)], observed=[observed])[1]
    fields = fields._replace(threshold=np.float32([threshold]))
    short, general = ClipLog(), ClipLog(names=["a"])
    short.record(fields)
    general.record(fields)
    for name in log_store.STEP.names:
        np.testing.assert_array_equal(
            short._store.steps()[name], general._store.steps()[name]
        )


# Rows.


def log_of_rows(steps=300):
    log = ClipLog(["embed", "head", "idle"])
    for step in range(steps):
        policy = Fixed(2.0)
        norms = [1.0 if step % 10 else 4.0, 4.0, 1.0]
        observed = [True, True, step >= 150]
        log.record(decide(policy, policy.init(3), norms, observed=observed)[1])
    return log


def test_rows_are_counted_by_name():
    log = log_of_rows()
    assert log.names == ["embed", "head", "idle"]
    assert log.row_clip_rates.tolist() == [0.1, 1.0, 0.0]
    summary = log.summary()
    assert summary.worst_rows == (("head", 1.0), ("embed", 0.1))
    assert "most clipped rows head 100 %, embed 10 %" in str(summary)
    assert "One row has 90.9 % of the 330 clips of 3 rows: head" in str(summary)


def test_the_map_of_rows_is_bounded_and_its_counts_stay_exact():
    log = log_of_rows(1000)
    counts = log._rows
    assert counts.width == 8
    assert counts.rates_over_time().shape == (3, 125)
    assert counts.clips().tolist() == [100, 1000, 0]
    assert np.isnan(counts.rates_over_time()[2, 0])
    assert counts.rates_over_time()[1].tolist() == [1.0] * 125


def test_rows_that_join_later_get_a_name():
    counts = log_rows.RowCounts(["a"])
    counts.add(np.array([True]), np.array([True]))
    counts.add(np.array([True, True]), np.array([True, True]))
    assert counts.names == ["a", "row 1"]
    assert counts.rates().tolist() == [1.0, 1.0]


# A threshold that falls or climbs.


def test_a_threshold_that_falls_while_more_is_clipped_is_named():
    log, good = ClipLog(), ClipLog()
    for step in range(900):
        norm = 1.0 + step % 7
        log.record(norm=norm, threshold=8.0 - 7.0 * step / 900)
        good.record(norm=norm * (1 - step / 1000), threshold=8 * (1 - step / 1000))
    assert "the threshold fell from" in " ".join(log.summary().advice)
    assert "the threshold fell" not in " ".join(good.summary().advice)


def test_a_threshold_that_climbs_with_the_norms_is_a_red_light():
    log, good = ClipLog(), ClipLog()
    for step in range(300):
        log.record(norm=2.0 * 1.03**step, threshold=1.03**step)
        good.record(norm=2.0 + step % 3, threshold=1.5)
    assert "a threshold for the gradient" in " ".join(log.summary().advice)
    assert "Red light" not in str(good.summary())


# Files.


def assert_same_steps(actual, expected):
    for name in log_store.STEP.names:
        np.testing.assert_array_equal(
            actual._store.steps()[name], expected._store.steps()[name], err_msg=name
        )


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_log_is_the_same_after_writing_and_reading(tmp_path, suffix):
    log, path = ClipLog(every=3), tmp_path / f"run.{suffix}"
    values = [(1 / 3, INF), (NAN, 2.0), (INF, 2.0), (5e-324, 0.1), (7.0, 1e300)]
    for norm, threshold in [v for v in values for _ in range(3)]:
        log.record(norm=norm, threshold=threshold)
    getattr(log, f"to_{suffix}")(path)
    read = getattr(ClipLog, f"from_{suffix}")(path)
    assert_same_steps(read, log)
    assert log.steps.tolist() == [0, 3, 6, 9, 12]
    lines = str(read.summary()).splitlines(), str(log.summary()).splitlines()
    if suffix == "csv":  # it has no totals: the last step that it knows is step 12
        assert [text.pop(0)[:32] for text in lines] == [
            f"total steps       {steps} (5 recorded" for steps in (13, 15)
        ]
    assert lines[0] == lines[1]


@pytest.mark.usefixtures("small")
def test_json_lines_store_settings_rows_and_totals(tmp_path):
    log, path = log_of_rows(3000), tmp_path / "run.jsonl"
    log.settings = {"policy": "Fixed(2.0)"}
    log.to_jsonl(path)
    read = ClipLog.from_jsonl(path)
    assert_same_steps(read, log)
    assert read.settings == {"policy": "Fixed(2.0)"}
    assert read.summary() == log.summary()
    np.testing.assert_array_equal(read._store.highest(), log._store.highest())
    assert len(read) == 3000
    np.testing.assert_array_equal(
        read._rows.rates_over_time(), log._rows.rates_over_time()
    )
    for line in path.read_text(encoding="utf-8").splitlines():
        json.loads(line, parse_constant=pytest.fail)  # strict JSON


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("step,norm\n0,1\n", "columns norm and threshold, got 'norm'"),
        ("norm,threshold\n1,2\nx,2\n", "'norm' must hold numbers, got 'x' in row 2"),
        ("norm,threshold\n1,2\n,2\n", "no empty cells"),
    ],
    ids=["column", "text", "empty"],
)
def test_the_error_says_why_a_file_is_not_a_log(tmp_path, text, words):
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        ClipLog.from_csv(path)


def test_every_must_be_a_number_of_steps():
    with pytest.raises(ValueError, match="every must be a whole number >= 1, got 0"):
        ClipLog(every=0)


@pytest.mark.needs("torch")
def test_a_decision_on_a_device_is_read_in_one_transfer():
    import torch

    class DeviceTensor(torch.Tensor):
        """A tensor that claims to be on a device, and counts its copies."""

        copies = 0

        @property
        def device(self):
            return SimpleNamespace(type="other")

        def cpu(self):
            DeviceTensor.copies += 1
            return self.as_subclass(torch.Tensor)

    fields = dict(norm=[3.0, 4.0], threshold=[9.0, 2.0], scale=[1.0, 0.5])
    fields |= dict(clipped=[0.0, 1.0], finite=[1.0, 1.0])
    tensors = {k: torch.tensor(v).as_subclass(DeviceTensor) for k, v in fields.items()}
    log = ClipLog()
    log.record(SimpleNamespace(**tensors))
    assert DeviceTensor.copies == 1
    assert (log.norms[0], log.clipped[0]) == (5.0, 0.5)
