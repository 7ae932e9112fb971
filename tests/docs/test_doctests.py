"""Every example in a docstring runs, in each package whose framework is here."""

import doctest
import importlib
import pkgutil

import pytest

from ..conftest import is_installed

PACKAGES = {
    "autoclip_core": "core",
    "autoclip_torch": "torch",
    "autoclip_tf": "tf",
    "autoclip_jax": "jax",
}


OPTIONAL = {  # what these import is not installed with their package
    "autoclip_core.log.clip_log.ClipLog.plot": "matplotlib",
    "autoclip_core.log.clip_log.ClipLog.plot_histogram": "matplotlib",
    "autoclip_core.log.clip_log.ClipLog.plot_rows": "matplotlib",
    "autoclip_core.log.report.write_report": "matplotlib",
    "autoclip_tf.legacy": "tf_keras",
    "autoclip_torch.kernels.scale": "triton",
    "autoclip_torch.lightning": "lightning",
    "autoclip_torch.transformers": "transformers",
}


@pytest.mark.parametrize(
    "package",
    [pytest.param(p, marks=pytest.mark.needs(f)) for p, f in PACKAGES.items()],
)
def test_examples(package, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some examples write a file
    root = importlib.import_module(package)
    modules = [root]
    for info in pkgutil.walk_packages(root.__path__, f"{package}."):
        needed = OPTIONAL.get(info.name)
        # `__main__` runs the command line when it is imported.
        if not info.name.endswith("__main__") and (
            needed is None or is_installed(needed)
        ):
            modules.append(importlib.import_module(info.name))
    runner = doctest.DocTestRunner()
    for module in modules:
        for examples in doctest.DocTestFinder(exclude_empty=True).find(module):
            needed = OPTIONAL.get(examples.name)
            if needed is None or is_installed(needed):
                runner.run(examples)
    assert runner.tries > 0
    assert runner.failures == 0, "the report above says which"


def test_a_wrong_example_is_found():
    wrong = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
    assert doctest.DocTestRunner(verbose=False).run(wrong).failed == 1
