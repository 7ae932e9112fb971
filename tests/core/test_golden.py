"""Every policy in NumPy gives the results of the independent oracle in `golden/`."""

import json

import numpy as np
import pytest

from ..support.cases import run
from ..support.traces import check_traces, golden, oracle, traced_policies


def in_numpy(policy, series):
    _, decision = run(policy, series)
    return decision.threshold, decision.scale


@pytest.mark.parametrize("code", traced_policies())
def test_numpy_answers_as_the_oracle(code):
    check_traces(in_numpy, code)


@pytest.mark.parametrize("wrong", [0, 1], ids=["thresholds", "scales"])
def test_a_wrong_answer_is_found(wrong):
    def almost(policy, series):
        answer = list(in_numpy(policy, series))
        answer[wrong] = answer[wrong].copy()
        answer[wrong][-1, -1] *= 1.0001
        return answer

    with pytest.raises(AssertionError, match=r"Quantile\(0.9\) on"):
        check_traces(almost, "Quantile(0.9)")


def test_the_oracle_agrees_with_calculations_by_hand():
    oracle().check_by_hand()


def test_the_file_is_what_the_script_writes(tmp_path, monkeypatch):
    committed = golden()
    path = tmp_path / "traces.json"
    monkeypatch.setattr(oracle(), "TRACES", path)
    oracle().write()
    written = json.loads(path.read_text(encoding="utf-8"))
    for part in ("format", "series", "param_norms"):
        same(written[part], committed[part])
    assert len(written["traces"]) == len(committed["traces"])
    for new, old in zip(written["traces"], committed["traces"], strict=True):
        same(new, old)


def same(new, old):
    """Compare; numbers to 1e-5, because NumPy before 2.4 rounds the rank."""
    if isinstance(new, dict):
        assert new.keys() == old.keys()
        for key in new:
            same(new[key], old[key])
    elif isinstance(new, list):
        np.testing.assert_allclose(new, old, rtol=1e-5)
    else:
        assert new == old
