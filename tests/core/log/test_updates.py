"""Logs of metrics: totals of steps that were not recorded, and the update half."""

import copy
import math
import pickle
import re

import numpy as np
import pytest

from autoclip_core import ClipLog, Fixed, MetricsLogger, decide, write_report
from autoclip_core.cli.main import main
from autoclip_core.clipper.metrics import (
    compute_metrics,
    count_step,
    empty_tally,
    name_update_metrics,
)
from autoclip_core.record import store


class Run:
    """The metrics of a clipper on a series of norms; every tenth step is clipped."""

    def __init__(self):
        self.tally, self.decision, self.reads = empty_tally(1), None, 0

    def step(self, norm):
        policy = Fixed(2.0)
        _, self.decision = decide(policy, policy.init(1), [norm])
        self.tally = count_step(self.tally, self.decision)

    def metrics(self):
        self.reads += 1
        return compute_metrics(self.decision, self.tally)


def norm_of(step):
    return 4.0 if step % 10 == 9 else 1.0


@pytest.mark.parametrize("way", ["method", "dict", "log"])
def test_a_step_in_fifty_reports_all_steps(tmp_path, way):
    """The last step that is recorded is step 150 of 200."""
    run, log = Run(), ClipLog(every=50) if way == "log" else ClipLog()
    send = MetricsLogger(log, every=50)
    for step in range(200):
        run.step(norm_of(step))
        if way == "log":
            log.record(run.metrics())
        else:
            send(run.metrics if way == "method" else run.metrics())
    reads = run.reads
    summary = log.summary()
    assert (summary.steps, summary.recorded, summary.measured) == (200, 4, 4)
    assert (summary.clip_rate, summary.nonfinite) == (0.1, 0)
    text = str(summary)
    assert "total steps       200 (4 recorded, 4 with a finite norm)" in text
    assert "Stabiliser (5 to 25 %): clip rate 10 % over 200 steps" in text
    assert run.reads <= reads + 1
    log.to_jsonl(tmp_path / "run.jsonl")
    assert str(ClipLog.from_jsonl(tmp_path / "run.jsonl").summary()) == text
    assert str(pickle.loads(pickle.dumps(log)).summary()) == text
    assert str(copy.deepcopy(log).summary()) == text


def test_a_log_of_decisions_counts_the_steps_between(tmp_path):
    log = ClipLog(every=50)
    for step in range(200):
        log.record(decide(Fixed(2.0), Fixed(2.0).init(1), [norm_of(step)])[1])
    assert (log.summary().steps, log.summary().recorded) == (200, 4)
    log.to_jsonl(tmp_path / "run.jsonl")
    assert ClipLog.from_jsonl(tmp_path / "run.jsonl").summary().steps == 200


@pytest.mark.needs("jax")
def test_metrics_whose_memory_jax_reused_leave_the_earlier_totals():
    import jax.numpy as jnp

    log = ClipLog(every=2)
    for step in range(2):
        metrics = {"clip/norm": jnp.ones(()), "clip/threshold": jnp.ones(())}
        log.record(metrics | {"clip/steps": jnp.asarray(step + 1), "clip/clip_rate": 0})
    log._unread["clip/steps"].delete()
    assert log.summary().steps == 2  # record() was called twice


# The update half.


def both_metrics(step, size=1):
    """Metrics of a gradient of norm 3 and of an update that grows."""
    halves = []
    for norm, limit in [(3.0, 2.0), (1.0 + step, 5.0)]:
        policy, tally = Fixed(limit), empty_tally(size)
        _, decision = decide(policy, policy.init(size), [norm] * size)
        tally = count_step(tally, decision)
        tally = tally._replace(steps=np.int32(step + 1))
        halves.append(compute_metrics(decision, tally))
    return halves[0] | name_update_metrics(halves[1])


def log_of_both(steps=8, **options):
    log = ClipLog(**options)
    for step in range(steps):
        log.record(both_metrics(step))
    return log


def test_updates_have_a_log_of_their_own():
    log = log_of_both(settings={"clipper": "TrustClip(ratio=0.02)"})
    assert log.norms.tolist() == [3.0] * 8
    assert log.updates.norms.tolist() == [1.0 + step for step in range(8)]
    assert log.updates.thresholds.tolist() == [5.0] * 8
    assert log.updates.clipped.tolist() == [0] * 5 + [1] * 3
    assert log.updates.steps.tolist() == log.steps.tolist() == list(range(8))
    assert [large.step for large in log.updates.largest] == [7, 6, 5]
    assert log.updates.settings == log.settings
    before, _, after = str(log.summary()).partition("\nUpdates\n")
    assert before.startswith("Gradients\ntotal steps")
    assert not str(log.updates.summary()).startswith("Gradients")
    assert "mean norm         3" in before
    assert "mean norm         4.5" in after
    assert log.summary().updates.max_norm == 8.0


def test_other_metrics_have_no_updates():
    log = ClipLog()
    log.record({"clip/norm": 1.0, "clip/threshold": 2.0})
    log.record(both_metrics(1))  # the first step decides
    assert log.updates is None
    log = ClipLog()
    log.record(name_update_metrics({"clip/norm": 3.0, "clip/threshold": 2.0}))
    assert log.updates is None
    assert log.norms.tolist() == [3.0]


def test_a_step_without_an_update_is_not_observed():
    log = log_of_both(2)
    log.record({"clip/norm": 1.0, "clip/threshold": 2.0, "clip/steps": 3})
    assert log.updates.norms[:2].tolist() == [1, 2]
    assert math.isnan(log.updates.norms[2])
    assert log.updates.summary().measured == 2
    assert log.updates.summary().nonfinite == 0


@pytest.mark.parametrize(
    "damage",
    [{"clip/update_norm": -1.0}, {"clip/norm": -1.0}, {"clip/update_scale": "x"}],
)
def test_an_error_changes_neither_half(damage):
    log = log_of_both(2)
    text = str(log.summary())
    with pytest.raises((TypeError, ValueError)):
        log.record(both_metrics(2) | damage)
    assert (len(log), len(log.updates), str(log.summary())) == (2, 2, text)


@pytest.mark.parametrize(
    ("suffix", "steps"), [("csv", 8), ("jsonl", 8), ("jsonl", 500)]
)
def test_files_have_both_halves(tmp_path, monkeypatch, suffix, steps):
    """Steps are thinned if there are 500."""
    if steps == 500:
        for name, value in dict(RECENT=64, BLOCK=32, INTERVALS=16, PENDING=8).items():
            monkeypatch.setattr(store, name, value)
    log, path = log_of_both(steps), tmp_path / f"run.{suffix}"
    getattr(log, f"to_{suffix}")(path)
    read = getattr(ClipLog, f"from_{suffix}")(path)
    assert read.updates.norms.tolist() == log.updates.norms.tolist()
    assert read.updates.clipped.tolist() == log.updates.clipped.tolist()
    assert read.norms.tolist() == log.norms.tolist()
    if suffix == "jsonl":
        assert str(read.summary()) == str(log.summary())
        assert read.updates.largest == log.updates.largest
        read.record(both_metrics(steps))
        assert len(read.updates) == len(read) == len(log) + 1


BOUND = "The bound sets the size of most steps, because the mean scale is below 0.3: "


def log_of_a_bound(has_gradients, policy=None):
    """The updates are 9 to 15 times above their bound, the gradients below theirs."""
    log = ClipLog(settings={} if policy is None else {"policy": policy})
    for norm in np.linspace(1.0, 1.5, 200):
        gradients = {"clip/norm": norm, "clip/threshold": 2.0} if has_gradients else {}
        updates = {"clip/update_norm": 10.0 * norm, "clip/update_threshold": 1.0}
        log.record(gradients | updates)
    return log


@pytest.mark.parametrize("policy", [None, "Quantile(quantile=0.9)", "TrustClip()"])
@pytest.mark.parametrize("suffix", [None, "csv", "jsonl"])
@pytest.mark.parametrize("has_gradients", [True, False])
def test_a_bound_that_acts_in_each_step_is_no_red_light(
    tmp_path, policy, suffix, has_gradients
):
    log = log_of_a_bound(has_gradients, policy)
    if suffix:
        getattr(log, f"to_{suffix}")(tmp_path / "run")
        log = getattr(ClipLog, f"from_{suffix}")(tmp_path / "run")
    half = log.updates if has_gradients else log
    _, sentence = half.summary().advice
    assert sentence.startswith(BOUND)
    assert "Red light" not in str(log.summary())
    assert "aise" not in str(log.summary())


@pytest.mark.needs("plot")
@pytest.mark.parametrize(("suffix", "is_folder"), [("csv", True), ("jsonl", False)])
def test_the_report_reads_a_log_of_updates(tmp_path, capsys, suffix, is_folder):
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / f"log.{suffix}"
    getattr(log_of_a_bound(has_gradients=False), f"to_{suffix}")(path)
    page = tmp_path / "a.html"
    source = path.parent if is_folder else path
    assert main(["report", str(source), "-o", str(page)]) == 0
    assert "column update_norm: 200 steps" in capsys.readouterr().out
    text = page.read_text(encoding="utf-8")
    assert BOUND in text
    assert "spikes" not in text
    assert main(["suggest", str(source)]) == 2
    assert "--column: 'update_norm'" in capsys.readouterr().err


def test_columns_of_updates_alone_are_a_log_of_updates(tmp_path):
    path = tmp_path / "run.csv"
    path.write_text("step,update_norm,update_threshold\n" + "1,10,1\n" * 100)
    assert BOUND in " ".join(ClipLog.from_csv(path).summary().advice)
    path.write_text('{"update_norm": 10, "update_threshold": 1}\n' * 100)
    assert BOUND in " ".join(ClipLog.from_jsonl(path).summary().advice)


@pytest.mark.needs("plot")
def test_the_report_has_both_halves(tmp_path, capsys):
    log_of_both().to_jsonl(tmp_path / "run.jsonl")
    out = tmp_path / "a.html"
    assert main(["report", str(tmp_path / "run.jsonl"), "-o", str(out)]) == 0
    text = out.read_text(encoding="utf-8")
    assert text.count("<h2>Numbers</h2>") == 2
    assert text.index("<h1>Gradients</h1>") < text.index("<h1>Updates</h1>")
    assert log_of_both().updates.plot().axes[0].get_ylabel() == "norm of the update"
    write_report(ClipLog(), out)
    assert not re.search("Gradients|Updates", out.read_text(encoding="utf-8"))


@pytest.mark.needs("torch")
def test_a_log_of_trust_clip_has_both_halves():
    import torch

    from autoclip_torch import TrustClip

    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    clipper, log = TrustClip(model, optimizer), ClipLog()
    for _ in range(3):
        model(torch.ones(4, 3)).square().sum().backward()
        optimizer.step()
        metrics = clipper.metrics()
        log.record(metrics)
    assert log.updates.norms[-1] == metrics["clip/update_norm"]
    assert log.norms[-1] == metrics["clip/norm"]
    assert log.updates.summary().clip_rate == metrics["clip/update_clip_rate"]


def test_one_of_several_numbered_clippers_is_recorded():
    def numbered(scale):
        run = Run()
        run.step(scale)
        names = run.metrics().items()
        return {name.removeprefix("clip/"): value for name, value in names}

    metrics = {
        **{f"clip/0/{name}": value for name, value in numbered(3.0).items()},
        **{f"clip/1/{name}": value for name, value in numbered(1.0).items()},
        "clip/1/norm/clip/0/a": 1.0,
        "clip/1/norm/b": 1.0,
        **{f"clip/update_{name}": value for name, value in numbered(0.5).items()},
    }
    for clipper, norm in [(0, 3.0), (1, 1.0)]:
        log = ClipLog(clipper=clipper)
        log.record(metrics)
        log.read_later({"clip/0/steps": 7, "clip/1/steps": 8})
        assert log.norms.tolist() == [norm]
        assert log.updates.norms.tolist() == [0.5]
        assert log.names == (["clip/0/a", "b"] if clipper else [])
        assert log.summary().steps == 7 + clipper
    with pytest.raises(TypeError, match=r"choose one .*: ClipLog\(clipper=0\)"):
        ClipLog().record(metrics)
    with pytest.raises(ValueError, match="clipper"):
        ClipLog(clipper=-1)


def test_metrics_before_the_first_step_are_no_step(tmp_path):
    """A scaler whose first gradients overflow skips the step of the optimizer."""
    run, log = Run(), ClipLog()
    run.step(3.0)
    metrics = run.metrics()
    log.record(dict.fromkeys(metrics, 0.0) | {"clip/threshold": math.inf})
    assert len(log) == 0
    assert log  # `if log:` asks whether there is a log
    log.record(metrics)
    assert log.steps.tolist() == [0]
    log.to_csv(tmp_path / "log.csv")
    assert ClipLog.from_csv(tmp_path / "log.csv").steps.tolist() == [0]
