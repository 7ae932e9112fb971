"""The example that drives an engine which clips by itself."""

import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parent.parent / "examples" / "threshold_first.py"


def test_the_example_learns_what_the_engine_tells():
    clipper = runpy.run_path(str(EXAMPLE))["main"](steps=200)
    metrics = clipper.metrics()
    assert metrics["clip/steps"] == 200
    assert metrics["clip/nonfinite_total"] == 1
    assert 0 < metrics["clip/clip_rate"] < 0.3
    state = clipper.state_dict()["states"][0]
    expected = state["ring"][0].quantile(0.9).item()
    assert clipper.threshold().item() == pytest.approx(expected, rel=1e-6)
