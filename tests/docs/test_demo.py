"""The demo trains in every framework, and names a missing package in one line."""

import importlib.util
import pathlib
import subprocess
import sys

import pytest

DEMO = pathlib.Path(__file__).parents[2] / "examples" / "demo.py"


def demo_modules():
    """The frameworks that `demo.py` names, and the module of each."""
    spec = importlib.util.spec_from_file_location("demo", DEMO)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.MODULES


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
    done = run("--quick", before=hide)
    assert done.returncode == 2
    name = {"sklearn": "scikit-learn", "array_api_compat": "array-api-compat"}
    assert "not installed:" in done.stderr
    assert name.get(module, module) in done.stderr.split("`make demo`")[0]
    assert "pip install" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def demo(monkeypatch):
    """Import a module of the demo, and remove all of them after the test."""
    names = {path.stem for path in DEMO.parent.glob("*.py")}
    monkeypatch.syspath_prepend(DEMO.parent)
    yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture
def threads():
    """Restore the number of threads of torch, which the demo changes."""
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


FRAMEWORKS = [
    pytest.param(name, marks=pytest.mark.needs(name, "stacks"))
    for name in demo_modules()
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_every_framework_starts_where_the_others_do(framework, demo, request):
    """50 steps are two intervals of one length, so JAX compiles one of them."""
    if framework == "torch":
        request.getfixturevalue("threads")
    module = demo(demo_modules()[framework])
    methods = {method.name: method for method in demo("demo_task").METHODS}
    # torch's RNN has two biases where the others have one, so its norm is larger.
    norm = 60.116 if framework == "torch" else 59.896
    for name in ("agc", "none"):
        run = module.train(methods[name], seed=0, steps=50)
        assert (len(run.losses), len(run.accuracies)) == (50, 2), name
        assert run.losses[0] == pytest.approx(5.66768, rel=1e-4)
        assert run.clip_rate > 0.5 or name == "none"
    assert run.norms[0] == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_every_method_has_a_clipper(framework, demo):
    module = demo(demo_modules()[framework])
    make = module.make_optimizer if framework == "jax" else module.make_clipper
    for method in demo("demo_task").METHODS:
        arguments = []
        if framework == "torch":
            model = module.Reader(seed=0)
            arguments = [model, module.SGD(model.parameters(), lr=0.1)]
        assert make(method, *arguments) is not None
