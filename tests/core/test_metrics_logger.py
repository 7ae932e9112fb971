"""`MetricsLogger` sends metrics to TensorBoard files, offline MLflow and functions."""

import importlib.util
import math

import pytest

from autoclip_core import ClipLog, MetricsLogger, read_norms

METRICS = {
    "clip/norm": 3.0,
    "clip/threshold": 2.0,
    "clip/scale": 0.5,
    "clip/clipped": 1.0,
    "clip/steps": 1,
}


def is_installed(module):
    return importlib.util.find_spec(module) is not None


def test_metrics_are_read_once_per_logged_step_for_all_places():
    reads, first, second = [], [], []

    def metrics():
        reads.append(1)
        return METRICS

    send = MetricsLogger(first.append, lambda v, step: second.append(step), every=10)
    for _ in range(25):
        send(metrics)
    assert len(reads) == 3
    assert first == [METRICS] * 3
    assert second == [0, 10, 20]


def test_a_clip_log_is_a_place_and_the_step_may_be_passed():
    log, sent = ClipLog(), []
    send = MetricsLogger(log, lambda v, step: sent.append((step, v)), every=5)
    for step in (5, 7, 10):
        send(METRICS | {"clip/threshold": math.inf, "clip/steps": step}, step=step)
    assert log.thresholds.tolist() == [math.inf] * 2
    assert [step for step, _ in sent] == [5, 10]
    assert "clip/threshold" not in sent[0][1]  # a curve cannot show infinity


@pytest.mark.parametrize(
    ("places", "every", "error", "words"),
    [
        ((), 1, ValueError, "places must be at least one"),
        ((3,), 1, TypeError, "places must be a SummaryWriter.*calls tf.summary.scalar"),
        ((print,), 0, ValueError, "every must be"),
    ],
    ids=["none", "number", "every"],
)
def test_the_error_names_bad_arguments(places, every, error, words):
    with pytest.raises(error, match=words):
        MetricsLogger(*places, every=every)


@pytest.mark.needs("torch")
@pytest.mark.skipif(not is_installed("tensorboard"), reason="tensorboard not installed")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_files_contain_the_metrics(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:
        send = MetricsLogger(writer, every=2)
        for step in range(5):
            send(METRICS | {"clip/norm": float(step)})
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(METRICS)
    norms = [(e.step, e.value) for e in events.Scalars("clip/norm")]
    assert norms == [(0, 0.0), (2, 2.0), (4, 4.0)]
    [file] = tmp_path.iterdir()
    for path in (tmp_path, file):
        read = read_norms(path)
        assert (read.kind, read.column) == ("TensorBoard events", "clip/norm")
        assert list(zip(read.steps, read.norms, strict=True)) == norms
    assert read_norms(file, "clip/scale").norms.tolist() == [0.5] * 3


@pytest.mark.skipif(not is_installed("mlflow"), reason="mlflow not installed")
@pytest.mark.filterwarnings("ignore")
def test_the_offline_store_of_mlflow_contains_the_metrics(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    import mlflow

    mlflow.set_tracking_uri((tmp_path / "runs").as_uri())
    with mlflow.start_run() as run:
        send = MetricsLogger(mlflow.log_metrics, every=2)
        for step in range(5):
            send(METRICS | {"clip/norm": float(step)})
    client = mlflow.MlflowClient()
    history = client.get_metric_history(run.info.run_id, "clip/norm")
    assert [(m.step, m.value) for m in history] == [(0, 0.0), (2, 2.0), (4, 4.0)]
    assert client.get_run(run.info.run_id).data.metrics["clip/scale"] == 0.5
    folder = tmp_path / "runs" / run.info.experiment_id / run.info.run_id
    for path in (folder, folder / "metrics" / "clip" / "norm"):
        read = read_norms(path)
        assert (read.kind, read.column) == ("MLflow metric", "clip/norm")
        assert (read.norms.tolist(), read.steps.tolist()) == ([0, 2, 4], [0, 2, 4])
    assert read_norms(folder, "clip/scale").norms.tolist() == [0.5] * 3


@pytest.mark.needs("torch")
def test_the_metrics_method_of_a_clipper_can_be_passed():
    import torch

    from autoclip_torch import QuantileClip

    model = torch.nn.Linear(3, 2)
    clipper, log, sent = QuantileClip(model.named_parameters()), ClipLog(), []
    send = MetricsLogger(log, sent.append, every=2)
    for _ in range(4):
        model(torch.ones(1, 3)).sum().backward()
        clipper.step()
        send(clipper.metrics)
    assert len(log) == len(sent) == 2
    assert log.norms.tolist() == [metrics["clip/norm"] for metrics in sent]
