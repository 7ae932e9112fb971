"""Which frameworks are here, which must be, and the settings every test runs under.

`AUTOCLIP_TEST=core,torch` names what has to be tested: where one of these is not
installed, or is no name of the table below, the run is a usage error and not a skip.
What is present is tested whether it was named or not; the report's head says so.

The folders `torch`, `tf` and `jax`, and files named `test_torch_*.py`, `test_tf_*.py`,
`test_jax_*.py` and `test_plot_*.py` elsewhere, are not collected without their
framework, so they import it at the top.
A single test that needs one says `@pytest.mark.needs("jax")` and imports it inside.
"""

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
}
"""What a name stands for; `stacks` is what surrounds the frameworks in a test, `peers`
are clippers of other people to compare with."""


def found(module):
    """Whether `module` is installed, asked without importing it.

    A folder that merely bears the name (`tests/torch`) has no origin: it is not torch.
    """
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # not even what it is a part of
        return False
    return spec is not None and spec.origin is not None


MISSING = {
    name: [module for module in modules if not found(module)]
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
    # Keras reads and writes a settings file at import; not the user's, in a test.
    keras_home = tempfile.TemporaryDirectory(prefix="keras-")
    config.add_cleanup(keras_home.cleanup)
    os.environ["KERAS_HOME"] = keras_home.name
    os.environ["KERAS_BACKEND"] = "tensorflow"
    os.environ["MPLBACKEND"] = "agg"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def pytest_report_header(config):
    absent = [f"{n} (no {', '.join(MISSING[n])})" for n in MODULES if MISSING[n]]
    return [
        f"autoclip tests: {', '.join(TESTED)}",
        f"autoclip absent: {', '.join(absent) or 'none'}",
        f"autoclip required: {', '.join(REQUIRED) or 'none (set AUTOCLIP_TEST)'}",
    ]


def pytest_collection_modifyitems(config, items):
    for item in items:
        for mark in item.iter_markers("needs"):
            for name in mark.args:
                if MISSING[name]:
                    reason = f"{name}: {', '.join(MISSING[name])} not installed"
                    item.add_marker(pytest.mark.skip(reason=reason))
        if item.get_closest_marker("gpu") and not cuda():
            item.add_marker(pytest.mark.skip(reason="gpu: no CUDA device here"))


def pytest_report_collectionfinish(config, items):
    marked = sum(item.get_closest_marker("gpu") is not None for item in items)
    if marked:
        what = "run on a CUDA device" if cuda() else "skipped, no CUDA device here"
        return f"gpu tests: {marked}, {what}"
    return None


def cuda():
    """Whether torch sees a CUDA device; a test that asks has imported torch already."""
    return "torch" in sys.modules and sys.modules["torch"].cuda.is_available()


@pytest.fixture
def scripts(monkeypatch):
    """The modules of benchmarks, for one test."""
    from .support.trials import (
        scripts_on_path,  # this file has to stand alone, in a copy too
    )

    with scripts_on_path(monkeypatch):
        yield
