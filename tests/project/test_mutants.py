"""The mutation check finds what it is to change, and leaves everything else alone."""

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
    found = [what.split(": ", 1)[1] for what, _ in mutants.mutants(SOURCE)]
    joined = CHANGED.replace("\n        ->", " ->").strip().splitlines()
    assert sorted(" ".join(what.split()) for what in found) == sorted(
        line.strip() for line in joined
    )


def test_each_mutant_differs_from_the_source_in_one_line():
    plain = ast.unparse(ast.parse(SOURCE)).splitlines()
    for what, source in mutants.mutants(SOURCE):
        lines = zip(plain, source.splitlines(), strict=True)
        assert sum(one != other for one, other in lines) == 1, what


@cache
def of(file):
    """The source of a file, and what its mutants change."""
    source = (mutants.ROOT / mutants.PACKAGE / file).read_text(encoding="utf-8")
    places = mutants.slots(ast.parse(source))
    return source, [
        mutants.words(node, changed)
        for node, _ in places
        for changed in mutants.changes(node)
    ]


@pytest.mark.parametrize("file", mutants.TESTS)
def test_each_file_has_mutants_and_its_tests_are_there(file):
    assert len(of(file)[1]) >= 2
    for name in mutants.TESTS[file]:
        assert (mutants.ROOT / "tests" / "core" / f"test_{name}.py").is_file()


@pytest.mark.parametrize("file", mutants.TESTS)
def test_each_explanation_is_of_one_mutant(file):
    """Else it has outlived its line, or excuses more than it should."""
    source, found = of(file)
    excused = [what for what in found if mutants.explained(file, source, what)]
    assert len(excused) == len(mutants.EQUIVALENT.get(file, []))
