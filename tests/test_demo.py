"""The demo says in one line why it cannot run, with exit status 2."""

import pathlib
import subprocess
import sys

import pytest

DEMO = pathlib.Path(__file__).parent.parent / "examples" / "demo.py"


def run(*arguments, before="pass"):
    code = f"import runpy, sys; {before}; sys.argv = ['demo.py', *sys.argv[1:]]; "
    code += f"runpy.run_path({str(DEMO)!r}, run_name='__main__')"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=DEMO.parent,
        env={"PYTHONPATH": str(DEMO.parent)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("module", ["torch", "array_api_compat", "sklearn", "rich"])
def test_a_missing_package_is_named(module):
    hide = (
        "import importlib.util as u; find = u.find_spec; "
        f"u.find_spec = lambda name: None if name == {module!r} else find(name)"
    )
    told = run("--quick", before=hide)
    assert told.returncode == 2
    name = {"sklearn": "scikit-learn", "array_api_compat": "array-api-compat"}
    assert "not installed:" in told.stderr
    assert name.get(module, module) in told.stderr.split("`make demo`")[0]
    assert "pip install" in told.stderr
    assert "Traceback" not in told.stderr


def test_a_framework_without_a_demo_is_said():
    told = run("--framework", "tf")
    assert told.returncode == 2
    assert "no demo for tf yet" in told.stderr
