"""The mutation check changes every operator and constant, and nothing else."""

import ast
from functools import cache

import pytest

from ..support import mutants

SOURCE = '''
"""A docstring has no mutants."""
def scaled(x: int | None, y=2.0, xp=None):
    if not 0 <= x < y and y is None:
        raise ValueError(x + 1)
    return xp.where(x > y, xp.minimum(x, -y), 1 - x / y)
'''
CHANGED = """
    2.0 -> 2.02
    not 0 <= x < y and y is None -> not 0 <= x < y or y is None
    not 0 <= x < y -> 0 <= x < y
    0 <= x < y -> 0 < x < y
    0 <= x < y -> 0 > x < y
    0 <= x < y -> 0 <= x <= y
    0 <= x < y -> 0 <= x >= y
    0 -> 1
    y is None -> y is not None
    xp.where(x > y, xp.minimum(x, -y), 1 - x / y)
        -> xp.where(x > y, 1 - x / y, xp.minimum(x, -y))
    x > y -> x >= y
    x > y -> x <= y
    xp.minimum -> xp.maximum
    -y -> y
    1 - x / y -> 1 + x / y
    1 -> 2
    x / y -> x * y
"""


def test_every_operator_and_constant_is_changed_once():
    changes = [what.split(": ", 1)[1] for what, _ in mutants.make_mutants(SOURCE)]
    expected = CHANGED.replace("\n        ->", " ->").strip().splitlines()
    assert sorted(" ".join(what.split()) for what in changes) == sorted(
        line.strip() for line in expected
    )


def test_each_mutant_differs_from_the_source_in_one_line():
    plain = ast.unparse(ast.parse(SOURCE)).splitlines()
    for what, source in mutants.make_mutants(SOURCE):
        lines = zip(plain, source.splitlines(), strict=True)
        assert sum(before != after for before, after in lines) == 1, what


@cache
def read_changes(file):
    """Return the source of a file, and the changes of its mutants."""
    source = (mutants.ROOT / mutants.PACKAGE / file).read_text(encoding="utf-8")
    places = mutants.find_places(ast.parse(source))
    return source, [
        mutants.describe_change(node, changed)
        for node, _ in places
        for changed in mutants.make_replacements(node)
    ]


@pytest.mark.parametrize("file", mutants.TESTS)
def test_each_file_has_mutants_and_its_tests_exist(file):
    assert len(read_changes(file)[1]) >= 2
    for name in mutants.TESTS[file]:
        assert (mutants.ROOT / mutants.test_file(name)).is_file()


@pytest.mark.parametrize("file", mutants.TESTS)
def test_each_explanation_matches_one_mutant(file):
    """No explanation is out of date, and none covers two mutants."""
    source, changes = read_changes(file)
    matches = [what for what in changes if mutants.is_explained(file, source, what)]
    assert len(matches) == len(mutants.EQUIVALENT.get(file, []))


@pytest.mark.parametrize("files", [[], ["scale.py"]])
def test_the_command_tries_the_given_files_or_all(files, monkeypatch):
    tried = []
    monkeypatch.setattr(mutants, "copy_package", lambda folder: folder)
    monkeypatch.setattr(
        mutants, "count_survivors", lambda folder, file, every: tried.append(file) or 0
    )
    monkeypatch.setattr("sys.argv", ["mutants.py", *files])
    assert mutants.main() == 0
    assert tried == (files or list(mutants.TESTS))
