"""Run a module of the tests in a process of its own, such as one that starts ranks."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_module(name, folder, timeout):
    """Run `tests.support.<name>` with a folder; raise if it fails or takes longer."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.support.{name}", str(folder)],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
