"""A run fails if a required framework is absent; the report names what is absent."""

import os
import pathlib
import subprocess
import sys
import types

import pytest

CONFTEST = (pathlib.Path(__file__).parents[1] / "conftest.py").read_text(
    encoding="utf-8"
)
# Hide torch: its name is looked up in the current folder only.
WITHOUT_TORCH = """
from importlib.machinery import PathFinder
real = PathFinder.find_spec
PathFinder.find_spec = classmethod(
    lambda cls, name, path=None, target=None: real(
        name, ["."] if name in {"torch", "array_api_compat"} else path, target
    )
)
"""


@pytest.fixture
def suite(tmp_path):
    """Return a function that runs a small suite in a new pytest without torch."""

    def run(required):
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-ra", "--import-mode=importlib"],
            cwd=tmp_path,
            env=os.environ | {"AUTOCLIP_TEST": required},
            capture_output=True,
            text=True,
            check=False,
        )

    (tmp_path / "conftest.py").write_text(WITHOUT_TORCH + CONFTEST)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n  needs\n  gpu\n")
    for name in ("torch/test_clipper.py", "docs/test_torch_bench.py"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("import no_such_module\n")
    (tmp_path / "test_window.py").write_text(
        "import pytest\n"
        "def test_core(): pass\n"
        "@pytest.mark.gpu\ndef test_gpu(): pass\n"
        "@pytest.mark.needs('torch')\ndef test_torch(): pass\n"
        "@pytest.mark.needs('core')\ndef test_numpy(): pass\n"
    )
    return run


def test_what_is_absent_and_not_required_is_reported(suite):
    run = suite(required="core")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "autoclip absent: " in run.stdout
    assert "torch (no torch, array_api_compat)" in run.stdout
    assert "autoclip required: core" in run.stdout
    assert "torch: torch, array_api_compat not installed" in run.stdout
    assert "gpu tests: 1, skipped, no CUDA device here" in run.stdout
    assert "2 passed, 2 skipped" in run.stdout


def test_what_is_absent_and_required_is_an_error(suite, tmp_path):
    (tmp_path / "array_api_compat").mkdir()  # a folder of that name is no package
    run = suite(required="core,torch")
    assert run.returncode == pytest.ExitCode.USAGE_ERROR
    assert "AUTOCLIP_TEST requires torch" in run.stderr
    assert "not installed: torch, array_api_compat" in run.stderr


def test_a_misspelt_name_is_an_error(monkeypatch):
    monkeypatch.setenv("AUTOCLIP_TEST", "core,pytorch")
    module = types.ModuleType("conftest_copy")
    exec(compile(CONFTEST, "conftest.py", "exec"), vars(module))
    names = "core, plot, torch, tf, jax, stacks, peers, trainers"
    with pytest.raises(pytest.UsageError, match=f"{names}, got .'pytorch'."):
        module.pytest_configure(config=None)
