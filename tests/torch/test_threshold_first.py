"""The example with an engine that clips by itself."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "threshold_first.py"


@pytest.fixture
def example():
    spec = importlib.util.spec_from_file_location("threshold_first", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_engine_clips_at_the_quantile_of_the_norms_it_reported(
    example, monkeypatch
):
    updates = []

    class Watched(example.Engine):
        """Notes the limit it was given, the norm, and the norm it stepped with."""

        def update(self):
            hook = self.optimizer.register_step_pre_hook(self.look)
            self.after = None
            super().update()
            hook.remove()
            updates.append((self.clip_grad, self.get_global_grad_norm(), self.after))

        def look(self, *_):
            gradient = torch.cat([p.grad.flatten() for p in self.model.parameters()])
            self.after = gradient.norm().item()

    monkeypatch.setattr(example, "Engine", Watched)
    clipper = example.main(steps=150)
    norms, clipped = [], 0
    for limit, norm, after in updates:
        expected = np.quantile(norms[-100:], 0.9) if norms else 1e9
        assert limit == pytest.approx(expected, rel=1e-5)
        if norm >= 0:  # -1 reports a non-finite gradient
            assert after == pytest.approx(min(norm, limit), rel=1e-4)
            clipped += norm > limit
            norms.append(norm)
    metrics = clipper.metrics()
    assert len(norms) == 149
    assert metrics["clip/steps"] == 150
    assert metrics["clip/nonfinite_total"] == 1
    assert metrics["clip/clip_rate"] == pytest.approx(clipped / 150)
    assert clipped > 0


def test_between_updates_the_engine_reports_an_old_norm(example):
    """DeepSpeed does this, so the loop must ask whether there was an update."""
    model = torch.nn.Linear(2, 1)
    engine = example.Engine(model)
    reports = []
    for _ in range(5):
        engine.backward(model(torch.randn(3, 2)).sum())
        engine.step()
        reports.append((engine.was_step_applied(), engine.get_global_grad_norm()))
    applied, norms = zip(*reports, strict=True)
    assert applied == (False, True, False, True, False)
    assert norms[0] is None
    assert norms[1] == norms[2] != norms[3] == norms[4]
