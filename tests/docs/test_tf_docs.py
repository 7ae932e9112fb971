"""The code of the page about Keras runs, in order and in one namespace."""

import pathlib
import re

import pytest

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "keras.md"


def test_the_code_runs(tmp_path, monkeypatch):
    pytest.importorskip("tf_keras")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.M | re.S)
    assert len(blocks) > 5
    namespace = {"__name__": "keras_page"}
    for block in blocks:
        exec(compile(block, "keras.md", "exec"), namespace)
    assert len(namespace["history"]["clip/norm"]) == 2
    assert namespace["clip"].policy.clipping == 0.01
    assert 2 in namespace["spiked"]
    names = [name.split("/")[-1] for name in namespace["log"].names]
    assert names == ["kernel", "bias"]
