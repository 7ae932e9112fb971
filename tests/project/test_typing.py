"""The types of the public API, as `mypy --strict` sees them."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1] / "support"
MYPY = importlib.util.find_spec("mypy") is not None

pytestmark = [
    pytest.mark.needs("torch", "tf", "jax"),
    pytest.mark.skipif(
        not MYPY, reason="mypy is not installed; `make types` brings it"
    ),
]


def errors(file):
    """The lines in which mypy finds an error, as `name:line`."""
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", HERE / file],
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return re.findall(r"^(.+:\d+): error:", done.stdout, re.MULTILINE)


def test_right_uses_have_the_types_promised():
    assert errors("typed_uses.py") == []


def test_every_wrong_use_is_refused():
    lines = (HERE / "typed_misuses.py").read_text(encoding="utf-8").splitlines()
    wrong = [n for n, line in enumerate(lines, start=1) if line.endswith("# wrong")]
    assert errors("typed_misuses.py") == [
        f"tests/support/typed_misuses.py:{n}" for n in wrong
    ]
