"""CITATION.cff says the version and the name that the package has."""

import re
import tomllib
from pathlib import Path

import pytest

import autoclip_core

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))[
    "project"
]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("version", autoclip_core.__version__),
        ("title", PROJECT["name"]),
        ("license", PROJECT["license"]),
        ("cff-version", "1.2.0"),
    ],
)
def test_the_citation_is_of_this_package(field, value):
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(rf"^{field}: (.+)$", text, re.MULTILINE) == [value]
