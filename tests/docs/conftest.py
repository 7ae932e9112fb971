"""What the tests of the experiments share."""

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "experiments"


@pytest.fixture
def load(monkeypatch):
    """Return a function that imports a module of the experiments, as a script would."""
    import torch

    before = set(sys.modules)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a second thread waits more than it helps
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    yield importlib.import_module
    torch.set_num_threads(threads)
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None) or ""
        if file.startswith(str(ROOT / "examples")):
            del sys.modules[name]
