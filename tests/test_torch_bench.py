"""The benchmarks run, and their numbers are complete; how large is not promised."""

import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "benchmarks"


def run(*options):
    # It finds the packages where this process does: installed, or in the checkout.
    return subprocess.run(
        [sys.executable, SCRIPTS / "run.py", *options],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def scripts(monkeypatch):
    """The benchmarks' folder on the path, and none of their modules left behind."""
    own = {path.stem for path in SCRIPTS.glob("*.py")}
    before = {name: sys.modules.pop(name, None) for name in own}
    monkeypatch.syspath_prepend(SCRIPTS)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for name in own:
        sys.modules.pop(name, None)
    sys.modules.update({name: m for name, m in before.items() if m is not None})


def test_a_trial_run(tmp_path):
    path = tmp_path / "bench.json"
    done = run("--quick", "--json", path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    saved = json.loads(path.read_text())
    names = {line.split("  ")[0] for line in done.stdout.splitlines()}
    regimes = {"nothing clipped", "all clipped"}
    assert {result["regime"] for result in saved["results"]} == regimes
    for result in saved["results"]:
        assert result["contender"] in names
        for kind in ("milliseconds", "ratio"):
            low, median, high = (result[kind][k] for k in ("low", "median", "high"))
            assert 0 < low <= median <= high


@pytest.mark.parametrize("path", ["no-such-folder/bench.json"])
def test_nothing_is_measured_that_cannot_be_saved(path):
    done = run("--json", path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "no-such-folder" in done.stderr


def numbers(node):
    """Every number in what was saved."""
    if isinstance(node, dict | list):
        parts = node.values() if isinstance(node, dict) else node
        return [number for part in parts for number in numbers(part)]
    return [node] if isinstance(node, int | float) else []


@pytest.mark.parametrize(
    ("script", "results"),
    [
        ("fused", "results"),
        ("memory", "peak_bytes_of_torch_and_of_python"),
        ("growth", "over_rows"),
        ("fixed_cost", "microseconds"),
        ("log_cost", "microseconds_per_record"),
    ],
)
def test_every_script_has_a_trial_and_saves_its_numbers(
    script, results, scripts, monkeypatch, tmp_path, capsys
):
    path = tmp_path / "bench.json"
    monkeypatch.setattr(sys, "argv", [script, "--quick", "--json", str(path)])
    runpy.run_path(str(SCRIPTS / f"{script}.py"), run_name="__main__")
    saved = json.loads(path.read_text())
    assert saved["processors"] >= 1
    found = numbers(saved[results])
    assert len(found) > 3
    assert all(number >= 0 for number in found)
    assert str(path) in capsys.readouterr().out


def test_a_contender_that_leaves_another_norm_is_not_timed(scripts):
    from contenders import Contender, make_contenders
    from models import make_parameters, set_gradients, tiny
    from timing import measure

    parameters = make_parameters(tiny())
    set_gradients(parameters, 1.0)
    reference = make_contenders(parameters)[0]

    def halve():
        reference.step()
        torch._foreach_mul_([p.grad for p in parameters], 0.5)

    with pytest.raises(RuntimeError, match="halves left a norm of"):
        measure([reference, Contender("halves", halve)], parameters, 100.0, 0.0)


def test_what_fails_after_the_last_round_is_not_reported(scripts):
    from contenders import Contender, make_contenders
    from models import make_parameters, set_gradients, tiny
    from timing import LEAST_ROUNDS, measure

    parameters = make_parameters(tiny())
    set_gradients(parameters, 1.0)
    reference = make_contenders(parameters)[0]
    steps = []

    def gives_up():
        steps.append(1)
        if len(steps) <= LEAST_ROUNDS + 1:  # one step before the rounds
            reference.step()

    with pytest.raises(RuntimeError, match="gives up should have clipped all"):
        measure([reference, Contender("gives up", gives_up)], parameters, 100.0, 0.0)


def test_the_script_for_a_device_measures_on_what_there_is(scripts, capsys):
    """What needs no CUDA in it runs here as it is, on a small decoder."""
    import gpu

    sizes = [sum(map(math.prod, shapes())) / 1e6 for shapes in gpu.MODELS.values()]
    assert sizes == pytest.approx([124, 1000], rel=0.02)
    found = gpu.measure(gpu.decoder(16, 2, 50, 8), torch.device("cpu"), 5)
    assert found["parameters"] == 50 * 16 + 8 * 16 + 2 * (12 * 256 + 13 * 16) + 32
    ways = {line["way"]: line for line in found["clip"]}
    assert ways["clip_grad_norm_"]["ratio"]["median"] == 1.0
    assert ways["AGC, unit"]["bytes"] == 4 * 4 * found["parameters"]
    assert "NormClip attached" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_nothing_is_measured_and_that_is_said(
    scripts, monkeypatch, tmp_path, capsys
):
    import gpu

    path = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--json", str(path)])
    gpu.main()
    assert "not measured" in capsys.readouterr().out
    assert json.loads(path.read_text())["measured"] is False


def test_the_page_has_medians_and_quartiles_and_the_least_in_bold(scripts):
    import page

    def line(contender, low, median, high, clips=True):
        ratio = {"low": low, "median": median, "high": high}
        line = {"contender": contender, "model": "tiny", "regime": "all clipped"}
        return line | {"ratio": ratio, "clips": clips, "milliseconds": {"median": 2.5}}

    lines = [
        line("reference", 1.0, 1.0, 1.0, clips=False),
        line("a read", 0.1, 0.2, 0.3, clips=False),
        line("ours", 0.4, 0.5, 0.6),
        line("theirs", 0.45, 0.75, 1.25),
    ]
    [found] = page.tables({"results": lines})
    assert found.splitlines() == [
        "all clipped",
        "",
        "|  | tiny |",
        "| --- | --- |",
        "| reference | 2.50 ms |",
        "| a read | 0.20 (0.10–0.30) |",
        "| ours | **0.50 (0.40–0.60)** |",
        "| theirs | 0.75 (0.45–1.25) |",
    ]
    parts = {"tiny": {"one read": {"step": 3.2}, "ours": {"step": 9.6, "norms": 5.4}}}
    [found] = page.tables({"microseconds": parts})
    assert found.splitlines()[2:] == [
        "| tiny | one read | 3 |  |",
        "| tiny | ours | 10 | 5 |",
    ]
    peaks = {"tiny": {"gradients": [2048], "ours": [1024, 512]}}
    [found] = page.tables({"peak_bytes_of_torch_and_of_python": peaks})
    assert found.splitlines()[2:] == ["| gradients | 2 |", "| ours | 1 + 0 |"]
