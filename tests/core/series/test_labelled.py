"""The labelled runs of examples/experiments/labelled_series.py, and their verdicts.

A label comes from the fault and from the run's loss. The kept half chose no setting.
docs/evidence/diagnosis.md counts them.
"""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from autoclip_core import suggest_threshold

ROOT = Path(__file__).parents[3]
FILE = ROOT / "tests" / "support" / "labelled_series.npz"
BAD = {"diverged", "never healthy", "non-finite"}


@pytest.fixture(scope="module")
def runs():
    """Each series of the kept half with its label and its suggestion."""
    with np.load(FILE) as file:
        parts = np.split(file["norms"], np.cumsum(file["sizes"])[:-1])
        about = json.loads(str(file["about"]))
    series = [{**a, "norms": part} for a, part in zip(about, parts, strict=True)]
    kept = [run for run in series if run["kept"]]
    assert len(kept) >= 40
    assert len(series) - len(kept) >= 40
    return [run | {"suggestion": suggest_threshold(run["norms"])} for run in kept]


def verdicts(runs, *labels):
    """Count the verdicts of the runs with one of these labels."""
    chosen = [run for run in runs if run["label"] in labels]
    assert len(chosen) >= 5
    return Counter(run["suggestion"].verdict for run in chosen)


def test_no_diverged_run_is_called_healthy(runs):
    assert sum(verdicts(runs, "diverged", "non-finite").values()) >= 25
    assert "healthy" not in verdicts(runs, "diverged", "non-finite")


def test_no_healthy_run_is_called_diverged(runs):
    assert not BAD & set(verdicts(runs, "healthy", "spikes"))


def test_the_constant_is_between_the_80th_and_99th_percentile(runs):
    shares = {}
    for run in runs:
        norms, constant = run["norms"], run["suggestion"].max_norm
        part = np.isfinite(norms)
        part[run["end"] :] = False
        part[run["faults"]] = False
        if constant is not None and part.sum() >= 50:
            shares[run["name"]] = np.mean(norms[part] <= constant)
    assert len(shares) > 40
    assert {n: share for n, share in shares.items() if not 0.8 <= share <= 0.99} == {}


def test_a_healthy_run_has_a_constant_unless_its_level_changes(runs):
    healthy = [run for run in runs if run["label"] == "healthy"]
    withheld = [r for r in healthy if r["suggestion"].max_norm is None]
    assert len(withheld) <= len(healthy) / 4
    for run in withheld:
        diagnosis = run["suggestion"].diagnosis
        sign = [*diagnosis.spikes, diagnosis.step][-1 if diagnosis.step else 0]
        parts = run["norms"][:sign], run["norms"][sign:]
        assert abs(np.diff(np.log(list(map(np.nanmedian, parts))))[0]) > np.log(1.9)


def test_the_evidence_page_counts_these_verdicts(runs):
    text = (ROOT / "docs" / "evidence" / "diagnosis.json").read_text(encoding="utf-8")
    published = {r["name"]: r["verdict"] for r in json.loads(text)["results"]}
    for run in runs:
        assert published[run["name"]] == run["suggestion"].verdict
