"""Runs benchmark scripts in this process, because their imports are slow."""

import json
import re
import runpy
import sys
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "benchmarks"


@contextmanager
def scripts_on_path(monkeypatch):
    """Put the benchmarks' folder on the path; afterwards, remove its modules."""
    names = {path.stem for path in SCRIPTS.glob("*.py")}
    before = {name: sys.modules.pop(name, None) for name in names}
    monkeypatch.syspath_prepend(SCRIPTS)
    yield
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update({name: m for name, m in before.items() if m is not None})


def trial(script, folder, monkeypatch, *options):
    """Return what the trial run of a script saves."""
    path = folder / f"{script}.json"
    argv = [script, "--quick", "--json", str(path), *options]
    monkeypatch.setattr(sys, "argv", argv)
    runpy.run_path(str(SCRIPTS / f"{script}.py"), run_name="__main__")
    return json.loads(path.read_text())


def numbers(node):
    """Return every number in what was saved."""
    if isinstance(node, dict | list):
        parts = node.values() if isinstance(node, dict) else node
        return [number for part in parts for number in numbers(part)]
    return [node] if isinstance(node, int | float) else []


def marks():
    """Return the names of the tables that the docs have marks for."""
    pages = (path.read_text(encoding="utf-8") for path in (ROOT / "docs").rglob("*.md"))
    return re.findall(r"<!-- table: (.+?) -->", "".join(pages))
