"""Tests of what is shipped: dependencies, types, and the pins of the two commands."""

import importlib.metadata
import importlib.util
import pathlib
import re
import shutil
import subprocess
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


def test_the_table_of_versions_is_that_of_the_pins():
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| (\w+) \| (\d[\d.]*)[^|]* \| ([^|]+) \|$", page, re.MULTILINE
    )
    tested, lowest = pins("constraints.txt"), pins("constraints-floors.txt")
    assert len(rows) >= 10
    for name, version, floor in rows:
        if name != "Python":
            assert version == tested[name.lower()]
            assert floor == lowest.get(name.lower(), "not run")


# A release. The checks of `.ci/run` are replaced, because they take half an hour.

DATED = "## 1.2.3 - 2026-01-31"


def make_tree(folder, changelog=DATED):
    """Make a repository to release, and return a function that runs a command in it."""

    def run(*command):
        return subprocess.run(command, cwd=folder, capture_output=True, text=True)

    (folder / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "release", folder / ".ci")
    (folder / ".ci" / "run").write_text("#!/bin/sh\ntest ! -e broken\n")
    (folder / ".ci" / "run").chmod(0o755)
    (folder / "autoclip_core").mkdir()
    version = '__version__ = "1.2.3"\n'
    (folder / "autoclip_core" / "__init__.py").write_text(version)
    (folder / "CHANGELOG.md").write_text(f"{changelog}\n")
    (folder / ".gitignore").write_text("broken\n")
    run("git", "init")
    for key in ("user.name", "user.email"):
        run("git", "config", key, "a@example.com")
    run("git", "add", "--all")
    run("git", "commit", "--message", "x")
    return run


def test_a_release_is_tagged_once(tmp_path):
    run = make_tree(tmp_path)
    first = run(".ci/release")
    assert first.returncode == 0, first.stderr
    assert run("git", "tag").stdout.split() == ["v1.2.3"]
    second = run(".ci/release")
    assert second.returncode == 1
    assert "the tag v1.2.3 exists" in second.stderr


@pytest.mark.parametrize(
    ("changelog", "file", "message"),
    [
        ("## 1.2.3 - Unreleased", None, "needs the line '## 1.2.3 - '"),
        ("## 1x2x3 - 2026-01-31", None, "needs the line '## 1.2.3 - '"),
        (DATED, "new.txt", "commit or remove"),
        (DATED, "broken", ""),
    ],
)
def test_what_is_not_ready_is_not_tagged(changelog, file, message, tmp_path):
    run = make_tree(tmp_path, changelog)
    if file:
        (tmp_path / file).touch()
    refused = run(".ci/release")
    assert refused.returncode == 1
    assert message in refused.stderr
    assert run("git", "tag").stdout == ""
