"""The README is true: its code runs, its commands exist, its versions agree."""

import math
import pathlib
import re
import tomllib

import pytest

from autoclip_core import ClipLog, __version__

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PYTHON = PROJECT["project"]["requires-python"].removeprefix(">=")


def blocks(language, text=README):
    """Return the code of each block of a language, at its line number in the page."""
    matches = re.finditer(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return ["\n" * text.count("\n", 0, m.start(1)) + m[1] for m in matches]


def by_framework(sources):
    """Return the blocks of each framework; one that names none joins the last one."""
    grouped, framework = {}, "core"
    for source in sources:
        adapter = re.search(r"\b(?:autoclip_)?(torch|tf|jax)\b", source)
        framework = adapter[1] if adapter else framework
        grouped.setdefault(framework, []).append(source)
    return grouped


BLOCKS = by_framework(blocks("python"))


@pytest.mark.parametrize(
    "framework",
    [pytest.param(name, marks=pytest.mark.needs(name)) for name in BLOCKS],
)
def test_the_code_runs(framework, tmp_path, monkeypatch):
    # In order and in one namespace, as a reader runs it. It may write files.
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "readme"}
    for source in BLOCKS[framework]:
        exec(compile(source, "README.md", "exec"), namespace)


@pytest.mark.needs("torch", "tf", "jax")
def test_the_code_runs_in_the_order_of_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "readme"}
    for source in blocks("python"):
        exec(compile(source, "README.md", "exec"), namespace)


@pytest.mark.needs("torch")
@pytest.mark.parametrize(
    ("rate", "said"), [("0.01", "Stabiliser"), ("5.0", "Red light: The run diverged")]
)
def test_trust_clip_trains_at_a_rate_at_which_the_gradient_alone_diverges(
    rate, said, tmp_path, monkeypatch
):
    import torch

    def run(source):
        changed = source.replace("lr=0.01", f"lr={rate}")
        exec(compile(changed, "README.md", "exec"), namespace)
        with torch.no_grad():
            outputs = [namespace["model"](x) - y for x, y in namespace["batches"]]
        return float(torch.stack(outputs).square().mean())

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace = {"__name__": "readme"}
    first, logged = BLOCKS["torch"]
    assert run(first) == pytest.approx(1.0307, rel=0.02)  # at both rates
    assert run(logged) == pytest.approx(1.0203, rel=0.02)
    summary = namespace["log"].summary()
    assert "Stabiliser" in " ".join(str(summary).split())
    assert summary.clip_rate < 0.25
    assert (summary.updates.clip_rate > 0.99) == (rate == "5.0")
    is_high = "the learning rate is above" in " ".join(summary.updates.advice)
    assert is_high == (rate == "5.0")
    assert (tmp_path / "norms.csv").is_file()

    pattern = r"`(\S* = QuantileClip[^`]*|\S*clipper\.step\(\)\S*)`"
    make, record = re.findall(pattern, README)
    namespace["clipper"].detach()
    loop = first[first.index("for x, y") :]
    unrecorded = loop.replace("optimizer.step()", "clipper.step(); optimizer.step()")
    run(f"from autoclip_torch import QuantileClip\n{make}\n{unrecorded}")
    namespace["log"] = ClipLog(settings={"policy": namespace["clipper"]})
    recorded = loop.replace("optimizer.step()", f"{record}; optimizer.step()")
    assert math.isfinite(run(recorded)) == (rate == "0.01")
    summary = namespace["log"].summary()
    assert said in " ".join(str(summary).split())  # lines are wrapped
    assert (summary.clip_rate > 0.9) == (rate == "5.0")


def test_there_is_code_to_run():
    assert "torch" in BLOCKS


def test_the_edit_to_a_loop_stands_within_the_first_ten_lines_of_code():
    lines = BLOCKS["torch"][0].strip().splitlines()
    code = [line.strip() for line in lines if line.strip()][:10]
    assert "clipper = TrustClip(model, optimizer)  # the added line" in code


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_every_command_named_exists(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    named = re.findall(r"^make ([a-z]+)|`make ([a-z]+)", text, re.MULTILINE)
    assert named
    assert {a or b for a, b in named} <= targets


def test_every_extra_named_exists():
    extras = PROJECT["project"]["optional-dependencies"]
    lines = "".join(blocks("sh"))
    named = re.findall(r"\[([a-z,]+)\]", lines) + re.findall(r"# or (.*)", lines)
    assert named
    assert set(re.findall(r"[a-z]+", " ".join(named))) <= set(extras)


@pytest.mark.parametrize(
    ("document", "pattern"),
    [
        ("README.md", r"Python (\d+\.\d+) or newer"),
        ("Makefile", r"Python (\d+\.\d+) or\s+(?:# )?newer"),
        ("Makefile", r"older than (\d+\.\d+)"),
        ("Makefile", r"version_info < \((\d+, \d+)\)"),
    ],
)
def test_the_oldest_python_is_the_same_wherever_it_stands(document, pattern):
    stated = re.findall(pattern, (ROOT / document).read_text(encoding="utf-8"))
    assert stated
    assert {version.replace(", ", ".") for version in stated} == {PYTHON}


def test_the_changelog_begins_with_this_version():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (\S+)", changelog, re.MULTILINE)[1] == __version__
