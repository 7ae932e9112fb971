"""Tests of what is shipped: dependencies, types, and the pins of the two commands."""

import importlib.metadata
import importlib.util
import pathlib
import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import autoclip_core
from autoclip_core.cli.main import main

ROOT = pathlib.Path(__file__).parents[2]
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
    extras = {"torch", "tf", "jax", "plot", "files", "cli", "all"}
    assert set(metadata.get_all("Provides-Extra")) == extras


def test_the_metadata_is_what_the_package_says():
    metadata = importlib.metadata.metadata("autoclip-toolkit")
    assert metadata["Version"] == autoclip_core.__version__
    assert metadata["Requires-Python"] == PROJECT["project"]["requires-python"]
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert "Typing :: Typed" in metadata.get_all("Classifier")


def test_the_command_is_installed():
    scripts = importlib.metadata.entry_points(group="console_scripts", name="autoclip")
    assert [script.load() for script in scripts] == [main]


def pins(file):
    """Name to version, of the lines `name==version`."""
    text = (ROOT / file).read_text(encoding="utf-8")
    return dict(re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE))


def asked_for(*groups):
    """Return the requirements of these groups; a group within a group is left out."""
    lines = [line for group in groups for line in group if isinstance(line, str)]
    asked = map(Requirement, lines)
    return [r for r in asked if r.name != PROJECT["project"]["name"]]


RUNTIME = asked_for(
    PROJECT["project"]["dependencies"],
    *PROJECT["project"]["optional-dependencies"].values(),
)


def test_everything_asked_for_is_pinned_within_what_is_allowed():
    pinned = pins("constraints.txt")
    asked = [*RUNTIME, *asked_for(*PROJECT["dependency-groups"].values())]
    allowed = [r for r in asked if r.specifier.contains(pinned.get(r.name, "0"))]
    assert [r for r in asked if r not in allowed] == []


def test_the_floors_are_the_versions_that_were_run():
    run = pins("constraints-floors.txt")
    floors = {r.name: str(r.specifier).removeprefix(">=") for r in RUNTIME}
    assert {n for n in floors if Version(run[n]) != Version(floors[n])} == set()
