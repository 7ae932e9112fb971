"""What is shipped: its dependencies, its types, and the pins of the two commands."""

import importlib.metadata
import importlib.util
import pathlib
import re
import tomllib

import pytest
from packaging.requirements import Requirement

ROOT = pathlib.Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]


@pytest.mark.parametrize("package", PACKAGES)
def test_each_package_is_there_and_typed(package):
    folder = importlib.util.find_spec(package).submodule_search_locations[0]
    assert (pathlib.Path(folder) / "py.typed").is_file()


def test_core_needs_numpy_alone():
    requirements = map(Requirement, importlib.metadata.requires("autoclip-toolkit"))
    without_extras = [r.name for r in requirements if "extra" not in str(r.marker)]
    assert without_extras == ["numpy"]


def test_the_extras_are_those_promised():
    metadata = importlib.metadata.metadata("autoclip-toolkit")
    extras = {"torch", "tf", "jax", "plot", "all"}
    assert set(metadata.get_all("Provides-Extra")) == extras


def test_everything_asked_for_is_pinned_within_what_is_allowed():
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)", constraints, re.MULTILINE))
    groups = {
        **PROJECT["project"]["optional-dependencies"],
        **PROJECT["dependency-groups"],
        "core": PROJECT["project"]["dependencies"],
    }
    lines = [line for group in groups.values() for line in group]
    asked = [Requirement(line) for line in lines if isinstance(line, str)]
    ours = PROJECT["project"]["name"]
    pinned = [r for r in asked if r.specifier.contains(pins.get(r.name, "0"))]
    assert [r for r in asked if r not in pinned and r.name != ours] == []
