"""The benchmark runs, and its numbers are complete; their size is nobody's promise."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "run.py"


def run(*options):
    # It finds the packages where this process does: installed, or in the checkout.
    return subprocess.run(
        [sys.executable, SCRIPT, *options],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )


def test_a_trial_run(tmp_path):
    path = tmp_path / "bench.json"
    done = run("--quick", "--json", path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    saved = json.loads(path.read_text())
    names = {line.split("  ")[0] for line in done.stdout.splitlines()}
    regimes = {"nothing clipped", "all clipped"}
    assert {result["regime"] for result in saved["results"]} == regimes
    for result in saved["results"]:
        assert result["contender"] in names
        for kind in ("milliseconds", "ratio"):
            low, median, high = (result[kind][k] for k in ("low", "median", "high"))
            assert 0 < low <= median <= high


@pytest.mark.parametrize("path", ["no-such-folder/bench.json"])
def test_nothing_is_measured_that_cannot_be_saved(path):
    done = run("--json", path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "no-such-folder" in done.stderr
