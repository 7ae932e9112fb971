"""The demo says in one line why it cannot run, with exit status 2."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

DEMO = pathlib.Path(__file__).parents[2] / "examples" / "demo.py"


def demo_modules():
    """The frameworks that `demo.py` names."""
    spec = importlib.util.spec_from_file_location("demo", DEMO)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return list(module.MODULES)


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


TRAIN = """
import importlib, json, sys
import numpy as np
import demo, demo_task
module = importlib.import_module(demo.MODULES[sys.argv[1]])
methods = {method.name: method for method in demo_task.METHODS}
found = {}
for name in ("fixed", "agc", "none"):
    run = module.train(methods[name], 0, 30)
    found[name] = [len(run.losses), float(run.losses[0]), float(run.norms[0]),
                   float(run.clip_rate), len(run.accuracies)]
print(json.dumps(found))
"""


@pytest.mark.parametrize(
    "framework",
    [pytest.param(f, marks=pytest.mark.needs(f, "stacks")) for f in demo_modules()],
)
def test_every_framework_starts_where_the_others_do(framework):
    told = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TRAIN, framework],
        cwd=DEMO.parent,
        env={**os.environ, "PYTHONPATH": str(DEMO.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(told.stdout.splitlines()[-1])
    # torch's RNN has two biases where the others have one, so its norm is larger.
    norm = 60.116 if framework == "torch" else 59.896
    for name, (steps, loss, first, rate, tests) in found.items():
        assert (steps, tests) == (30, 2), name
        assert loss == pytest.approx(5.66768, rel=1e-4)
        if name != "agc":
            assert first == pytest.approx(norm, rel=1e-4)
        assert rate > 0.5 or name == "none"
