"""The code of the page about JAX runs, in order and in one namespace."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "jax.md"


def test_the_code_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.M | re.S)
    namespace = {"__name__": "jax_page"}
    for block in blocks:
        exec(compile(block, "jax.md", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "clip rate" in printed
    assert "step=2, norm=343" in printed


def test_a_loop_needs_one_added_line():
    assert PAGE.read_text("utf-8").count("# the added line") == 1
