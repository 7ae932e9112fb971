"""Who may import whom, proved by reading every import and by a fresh interpreter."""

import ast
import importlib.util
import pathlib
import shutil
import subprocess
import sys
from functools import cache

import pytest

MAY_IMPORT = {
    "autoclip_core": {"numpy"},
    "autoclip_torch": {"autoclip_core", "torch", "numpy", "array_api_compat"},
    "autoclip_tf": {"autoclip_core", "tensorflow", "keras", "numpy"},
    "autoclip_jax": {"autoclip_core", "jax", "optax", "numpy"},
}
# The only modules that import a trainer or Triton, at their top.
TRAINERS = {
    ("autoclip_torch", "kernels/scale.py"): {"triton"},
    ("autoclip_torch", "lightning.py"): {"lightning", "pytorch_lightning"},
    ("autoclip_torch", "transformers.py"): {"transformers"},
}
# The only modules that import these packages, inside a function.
LAZY = {
    ("autoclip_tf", "legacy.py"): {"tf_keras"},
    ("autoclip_core", "files/formats/event_rows.py"): {"tensorboard"},
    ("autoclip_core", "cli/rich_output.py"): {"rich"},
}
SLOW = {
    *("asyncio", "concurrent", "ctypes.util", "decimal", "difflib", "doctest", "email"),
    *("fractions", "http", "importlib.metadata", "logging", "multiprocessing", "pdb"),
    *("pydoc", "socket", "sqlite3", "ssl", "statistics", "subprocess", "tarfile"),
    *("unittest", "urllib.request", "uuid", "xml", "numpy.ma", "numpy.typing"),
    *("torch._dynamo", "torch._inductor", "triton"),
}
"""Modules that are slow to import; the compiler of torch and Triton take a second."""


def folder(package):
    """Return the folder of a package, without importing the package."""
    return pathlib.Path(importlib.util.find_spec(package).submodule_search_locations[0])


def imports(source):
    """Yield `(name, line, functions)` for each import, at any depth.

    `name` is the top-level package, "" for a relative import and "?" for one whose name
    only the running program knows; `functions` are the enclosing ones, outermost first.
    """

    def walk(node, functions):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            functions = (*functions, getattr(node, "name", "lambda"))
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.partition(".")[0], node.lineno, functions
        elif isinstance(node, ast.ImportFrom):
            name = "" if node.level else node.module.partition(".")[0]
            yield name, node.lineno, functions
        elif isinstance(node, ast.Call):
            if ast.unparse(node.func).endswith(("import_module", "__import__")):
                yield "?", node.lineno, functions
        for child in ast.iter_child_nodes(node):
            yield from walk(child, functions)

    yield from walk(ast.parse(source), ())


def violations(package, file, source):
    """Return a line per import of `file`, a path in `package`, that is not allowed."""
    lines = []
    for name, line, functions in imports(source):
        at_top = not functions
        plots = not at_top and "plot" in f"{file} {functions}"
        allowed = (
            name in {"", package}
            or name in sys.stdlib_module_names
            or name in MAY_IMPORT[package]
            or (name in TRAINERS.get((package, file), ()) and at_top)
            or (name in LAZY.get((package, file), ()) and not at_top)
            or ((package, name) == ("autoclip_core", "matplotlib") and plots)
        )
        if not allowed:
            lines.append(f"{package}/{file}:{line} imports {name}")
    return lines


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_every_import_is_in_the_table(package):
    files = sorted(folder(package).rglob("*.py"))
    assert files
    lines = []
    for path in files:
        file = path.relative_to(folder(package)).as_posix()
        lines += violations(package, file, path.read_text(encoding="utf-8"))
    assert lines == []


@pytest.mark.parametrize(
    ("package", "file", "source"),
    [
        ("autoclip_core", "policy.py", "import torch"),
        ("autoclip_core", "policy.py", "import os, jax.numpy as jnp"),
        ("autoclip_core", "policy.py", "def step(x):\n    from torch import nn"),
        ("autoclip_core", "policy.py", "if TYPE_CHECKING:\n    import keras"),
        ("autoclip_core", "policy.py", "try:\n    import scipy\nexcept E:\n    pass"),
        ("autoclip_core", "policy.py", "from autoclip_torch import QuantileClip"),
        ("autoclip_core", "policy.py", "importlib.import_module('torch')"),
        ("autoclip_core", "policy.py", "f = lambda: __import__('torch')"),
        ("autoclip_core", "plots/run.py", "import matplotlib"),
        ("autoclip_core", "log/summary.py", "def f():\n    import matplotlib"),
        ("autoclip_core", "files/formats/event_rows.py", "import tensorboard"),
        ("autoclip_core", "files/read.py", "def f():\n    import tensorboard"),
        ("autoclip_torch", "clipper.py", "from autoclip_jax import clip_by_quantile"),
        ("autoclip_torch", "clipper.py", "class A:\n    import transformers"),
        ("autoclip_torch", "lightning.py", "def f():\n    import lightning"),
        ("autoclip_torch", "lightning.py", "import transformers"),
        ("autoclip_tf", "clipper.py", "import torch"),
        ("autoclip_tf", "legacy.py", "import tf_keras"),
        ("autoclip_tf", "optimizers.py", "def f():\n    import tf_keras"),
        ("autoclip_jax", "clipper.py", "import scipy.stats"),
    ],
)
def test_an_import_against_the_table_is_reported(package, file, source):
    assert len(violations(package, file, source)) == 1


@pytest.mark.parametrize(
    ("package", "file", "source"),
    [
        ("autoclip_core", "policy.py", "import math\nfrom .scale import scale"),
        (
            "autoclip_core",
            "log/clip_log.py",
            "def plot(s):\n    from matplotlib import pyplot",
        ),
        ("autoclip_core", "plots/figure.py", "def draw(s):\n    import matplotlib"),
        ("autoclip_torch", "lightning.py", "from lightning import Callback"),
        ("autoclip_torch", "clipper.py", "from array_api_compat import torch as xp"),
        ("autoclip_tf", "legacy.py", "def f():\n    import tf_keras"),
        ("autoclip_jax", "clipper.py", "import jax.numpy as jnp, optax"),
    ],
)
def test_the_reader_lets_an_allowed_import_pass(package, file, source):
    assert violations(package, file, source) == []


def slow_modules_loaded_by(module, cwd):
    """The forbidden packages and the slow modules that a new process loads for it."""
    package = module.partition(".")[0]
    allowed = {package, *MAY_IMPORT[package]}
    first = sorted(MAY_IMPORT[package] - {"autoclip_core"})
    probe = (
        f"import sys, {', '.join(first)}; before = set(sys.modules)\n"
        f"import {module}; new = set(sys.modules) - before\n"
        "packages = {name.partition('.')[0] for name in new}\n"
        f"print(*packages - {allowed!r} - sys.stdlib_module_names, *new & {SLOW!r})"
    )
    run = subprocess.run(
        [sys.executable, "-c", probe],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=True,
    )
    return set(run.stdout.split())


@pytest.mark.parametrize(
    "module",
    [
        "autoclip_core.cli.main",
        pytest.param("autoclip_torch", marks=pytest.mark.needs("torch")),
    ],
)
def test_no_framework_and_no_slow_module_is_loaded(module, tmp_path):
    assert slow_modules_loaded_by(module, tmp_path) == set()


def test_the_probe_reports_what_core_would_load(tmp_path):
    # A copy of core that imports torch late, and a torch.py for it to find.
    shutil.copytree(folder("autoclip_core"), tmp_path / "autoclip_core")
    with (tmp_path / "autoclip_core" / "__init__.py").open("a") as init:
        init.write("\ndef _late():\n    import torch, uuid\n\n_late()\n")
    (tmp_path / "torch.py").touch()
    assert slow_modules_loaded_by("autoclip_core", tmp_path) == {"torch", "uuid"}


@pytest.mark.parametrize(
    ("package", "missing", "message"),
    [
        pytest.param(
            f"autoclip_{extra}",
            missing,
            f"autoclip_{extra} needs {missing}; install it with: "
            f'pip install "autoclip-toolkit[{extra}]"',
            marks=pytest.mark.needs(extra),
        )
        for extra, missing in (
            *(("torch", "torch"), ("torch", "array_api_compat")),
            *(("tf", "tensorflow"), ("tf", "keras")),
            *(("jax", "jax"), ("jax", "optax")),
        )
    ],
)
def test_a_missing_framework_is_named_with_its_extra(package, missing, message):
    assert errors_without((package, missing)) == [f"ModuleNotFoundError: {message}"]


IN_ONE_PROCESS = (
    ("autoclip_torch.lightning", "lightning pytorch_lightning"),
    ("autoclip_torch.lightning", "lightning_utilities"),
    ("autoclip_torch.transformers", "transformers"),
    ("autoclip_torch.transformers", "huggingface_hub"),
)
"""Cases that import torch and fail to import a trainer, so none affects the next."""


@cache
def errors_of_trainers():
    return dict(zip(IN_ONE_PROCESS, errors_without(*IN_ONE_PROCESS), strict=True))


@pytest.mark.needs("torch", "stacks")
@pytest.mark.parametrize(
    ("trainer", "missing", "install"),
    [
        ("lightning", "lightning pytorch_lightning", "lightning"),
        ("transformers", "transformers", "transformers accelerate"),
    ],
)
def test_a_missing_trainer_is_named_with_its_install_line(trainer, missing, install):
    error = errors_of_trainers()[f"autoclip_torch.{trainer}", missing]
    assert error.startswith(f"ModuleNotFoundError: autoclip_torch.{trainer} needs ")
    assert error.endswith(f": pip install {install}")


@pytest.mark.needs("torch", "stacks")
@pytest.mark.parametrize(("module", "missing"), IN_ONE_PROCESS[1::2])
def test_another_missing_module_is_no_reason_to_name_a_trainer(module, missing):
    error = errors_of_trainers()[module, missing]
    assert error == f"ModuleNotFoundError: No module named {missing!r}"


@pytest.mark.needs("torch")
def test_another_missing_module_is_no_reason_to_name_an_extra():
    [error] = errors_without(("autoclip_torch", "hashlib"))
    assert error == "ModuleNotFoundError: No module named 'hashlib'"


def errors_without(*cases):
    """Return the error of importing each package if a module is missing.

    Args:
      cases: pairs of a package and its missing modules, separated by spaces. One new
        process tries them all.
    """
    probe = f"""
import importlib, sys

class Missing:
    def __init__(self, modules):
        self.modules = modules.split()

    def find_spec(self, name, path=None, target=None):
        if name in self.modules:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

for package, missing in {cases!r}:
    finder = Missing(missing)
    sys.meta_path.insert(0, finder)
    for module in finder.modules:
        sys.modules.pop(module, None)
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        print(f"ModuleNotFoundError: {{error.args[0]}}")
    sys.meta_path.remove(finder)
"""
    run = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=True
    )
    return run.stdout.splitlines()
