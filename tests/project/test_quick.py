"""`make quick` has tests for every folder, and each of them exists."""

import pytest

from ..support import quick

PACKAGES = ("autoclip_core", "autoclip_torch", "autoclip_tf", "autoclip_jax")


def test_every_folder_of_a_package_has_tests():
    files = [file for p in PACKAGES for file in (quick.ROOT / p).rglob("*.py")]
    folders = {file.parent.relative_to(quick.ROOT).as_posix() for file in files}
    assert folders - set(quick.TESTS) == set()


@pytest.mark.parametrize("folder", quick.TESTS)
def test_the_path_and_its_tests_exist(folder):
    assert (quick.ROOT / folder).exists()
    names = f"{quick.TESTS[folder]} {quick.ALWAYS}".split()
    assert [n for n in names if not (quick.ROOT / quick.file_of(n)).is_file()] == []


def test_every_test_file_is_in_an_entry_or_left_out_with_a_reason():
    tests = quick.ROOT / "tests"
    files = [file.relative_to(tests) for file in tests.glob("*/**/test_*.py")]
    names = {f"{f.parent.as_posix()}/{f.stem.removeprefix('test_')}" for f in files}
    listed = set(" ".join([*quick.TESTS.values(), quick.ALWAYS]).split())
    assert listed & set(quick.LEFT_OUT) == set()
    assert listed | set(quick.LEFT_OUT) == names


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("autoclip_core/cli/main.py", ["tests/core/test_cli.py"]),
        ("autoclip_core/cli", ["tests/core/test_cli.py"]),
        ("tests/core/test_cli.py", ["tests/core/test_cli.py"]),
        ("tests/core/test_removed.py", []),
        (
            "docs/policies/fixed.md",
            ["tests/docs/test_pages.py", "tests/docs/test_readme.py"],
        ),
    ],
)
def test_a_changed_file_has_the_tests_of_its_folder(path, expected):
    assert quick.tests_for(path) == expected


def test_a_file_of_the_root_has_tests():
    assert "tests/project/test_packaging.py" in quick.tests_for("pyproject.toml")
