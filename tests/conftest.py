"""Select tests by the installed frameworks, and set what every test runs under.

`AUTOCLIP_TEST=core,torch` names what must be tested. If one of these is not installed
or not in the table below, the run ends with a usage error instead of skipping tests.
Everything that is installed is tested, named or not. The report's first lines list it.

pytest does not collect the folders `torch`, `tf`, `jax` and `trainers` without their
packages, nor files elsewhere that are called `test_torch_*.py`, `test_tf_*.py`,
`test_jax_*.py` or `test_plot_*.py`. These files import their framework at the top. In
other files, a test that needs a framework has `@pytest.mark.needs("jax")` and imports
it inside.
"""

import gc
import importlib.util
import os
import sys
import tempfile

import pytest
from hypothesis import HealthCheck, settings

MODULES = {
    "core": ("numpy",),
    "plot": ("matplotlib",),
    "torch": ("torch", "array_api_compat"),
    "tf": ("tensorflow", "keras"),
    "jax": ("jax", "optax"),
    "stacks": (
        *("flax", "equinox", "haiku", "orbax.checkpoint", "tf_keras"),
        *("lightning", "transformers", "accelerate", "tensorboard", "mlflow"),
        *("sklearn", "rich"),
    ),
    "peers": ("autoclip", "zclip", "smartclip", "pytorch_optimizer", "timm"),
    "trainers": (
        *("trl", "peft", "datasets", "bitsandbytes", "torchao"),
        *("galore_torch", "apollo_torch", "schedulefree", "deepspeed", "fairscale"),
        "triton",
    ),
}
"""The modules of each name. `stacks` are trainers and tools around the frameworks,
`peers` are clippers of other projects, to compare with. `trainers` are too heavy for
`make test`: `make trainers` runs their tests."""

FOLDERS = {"tf": 0, "jax": 1, "torch": 2}
"""The folders whose tests run first, in this order. The others follow."""


def is_installed(module):
    """Return whether `module` is installed, without importing it.

    A folder that has the same name (`tests/torch`) has no origin and does not count.
    """
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # the package that should contain it is not installed
        return False
    return spec is not None and spec.origin is not None


MISSING = {
    name: [module for module in modules if not is_installed(module)]
    for name, modules in MODULES.items()
}
TESTED = [name for name in MODULES if not MISSING[name]]
REQUIRED = [n.strip() for n in os.environ.get("AUTOCLIP_TEST", "").split(",") if n]

collect_ignore_glob = [
    pattern
    for name in MODULES
    if name not in TESTED
    for pattern in (name, f"*/test_{name}_*.py")
]

# Every run draws the same examples; `--hypothesis-profile=explore` draws new ones.
slow_is_fine = [HealthCheck.too_slow]
settings.register_profile(
    "same", derandomize=True, deadline=None, suppress_health_check=slow_is_fine
)
settings.register_profile(
    "explore", max_examples=1000, deadline=None, suppress_health_check=slow_is_fine
)
settings.load_profile("same")


def pytest_configure(config):
    unknown = [name for name in REQUIRED if name not in MODULES]
    if unknown:
        raise pytest.UsageError(
            f"AUTOCLIP_TEST must name some of {', '.join(MODULES)}, got {unknown}"
        )
    absent = {name: MISSING[name] for name in REQUIRED if MISSING[name]}
    if absent:
        raise pytest.UsageError(
            f"AUTOCLIP_TEST requires {', '.join(absent)}, but these modules are not "
            f"installed: {', '.join(m for lacks in absent.values() for m in lacks)}"
        )
    # Keras reads and writes a settings file at import. A test must not use the user's.
    keras_home = tempfile.TemporaryDirectory(prefix="keras-")
    config.add_cleanup(keras_home.cleanup)
    os.environ["KERAS_HOME"] = keras_home.name
    os.environ["KERAS_BACKEND"] = "tensorflow"
    os.environ["MPLBACKEND"] = "agg"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # Python runs the file in this folder at the start of each process of the tests.
    startup = config.rootpath / "tests" / "support" / "startup"
    paths = [str(startup), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    gc.set_threshold(20_000, 20, 20)  # as that file does, which says why


def pytest_report_header(config):
    absent = [f"{n} (no {', '.join(MISSING[n])})" for n in MODULES if MISSING[n]]
    return [
        f"autoclip tests: {', '.join(TESTED)}",
        f"autoclip absent: {', '.join(absent) or 'none'}",
        f"autoclip required: {', '.join(REQUIRED) or 'none (set AUTOCLIP_TEST)'}",
    ]


def pytest_collection_modifyitems(config, items):
    # Long files come first: a worker that starts one last keeps the others waiting.
    items.sort(key=lambda item: FOLDERS.get(item.path.parent.name, len(FOLDERS)))
    for item in items:
        for mark in item.iter_markers("needs"):
            for name in mark.args:
                if MISSING[name]:
                    reason = f"{name}: {', '.join(MISSING[name])} not installed"
                    item.add_marker(pytest.mark.skip(reason=reason))
        if item.get_closest_marker("gpu") and not cuda():
            item.add_marker(pytest.mark.skip(reason="gpu: no CUDA device here"))


def pytest_collection_finish(session):
    set_objects_aside()


# Outside of all other hooks: what is freed here may warn, which is no error of a test.
@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item, nextitem):
    result = yield
    if nextitem is None or nextitem.path != item.path:
        set_objects_aside()
    return result


def set_objects_aside():
    """Free what only cycles keep; no later search for cycles examines the rest.

    The trainers of Hugging Face, Keras, Orbax and some tests call gc.collect(). With
    all that frameworks and earlier files keep, each call takes 0.4 seconds.
    """
    gc.collect()
    gc.freeze()


def pytest_report_collectionfinish(config, items):
    marked = sum(item.get_closest_marker("gpu") is not None for item in items)
    if marked:
        what = "run on a CUDA device" if cuda() else "skipped, no CUDA device here"
        return f"gpu tests: {marked}, {what}"
    return None


def cuda():
    """Return whether torch finds a CUDA device. A `gpu` test has imported torch."""
    return "torch" in sys.modules and sys.modules["torch"].cuda.is_available()


@pytest.fixture
def scripts(monkeypatch):
    """Make the modules of benchmarks importable for one test."""
    # Imported here, because test_conftest.py runs a copy of this file alone.
    from .support.trials import scripts_on_path

    with scripts_on_path(monkeypatch):
        yield
