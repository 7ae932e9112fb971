"""The command line reads files of other tools, reports bad input, writes to pipes."""

import argparse
import contextlib
import inspect
import io
import json
import math
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from autoclip_core import (
    ClipLog,
    Fixed,
    Quantile,
    __version__,
    replay,
    suggest_threshold,
)
from autoclip_core.cli.main import main
from autoclip_core.cli.policy_options import (
    POLICIES,
    add_options,
    as_option,
    make_policy,
)
from autoclip_core.policy import as_code

ROOT = pathlib.Path(__file__).parents[2]
NORMS = [1.0, 2.0, 8.0, 1.5, math.nan, 2.5]

FILES = {
    "plain.csv": "step,loss,grad_norm\n{}",
    "tensorboard.csv": "Wall time,Step,Value\n{}",
    "wandb.csv": '"Step","run - grad_norm","run - grad_norm__MIN",'
    '"run - grad_norm__MAX"\n{}',
    "excel.csv": "\ufeffstep;norm\r\n{}",
    "headless.csv": "{}",
    "lines.jsonl": "{}",
}
ROWS = {
    "plain.csv": "{i},0.5,{n}\n",
    "tensorboard.csv": "1700000000.{i},{i},{n}\n",
    "wandb.csv": '"{i}","{n}","{n}","{n}"\n',
    "excel.csv": "{i};{n}\r\n",
    "headless.csv": "{n}\n",
    "lines.jsonl": '{{"step": {i}, "norm": {n}}}\n',
}


@pytest.fixture
def file(tmp_path):
    def write(text, name="norms.csv"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def run_json(capsys, *argv):
    """Run a command, which must succeed, and return its JSON output."""
    assert main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", FILES)
def test_files_of_other_tools_are_read(file, capsys, name):
    json_nan = [str(n).replace("nan", "NaN") for n in NORMS]
    rows = "".join(ROWS[name].format(i=i, n=n) for i, n in enumerate(json_nan))
    report = run_json(capsys, "replay", file(FILES[name].format(rows), name))
    expected = replay(NORMS, Quantile(0.9))
    assert (report["steps"], report["nonfinite"]) == (6, 1)
    assert report["clip_rate"] == expected.clip_rate
    assert report["median_threshold"] == expected.median_threshold


def test_an_npy_file_and_standard_input_are_read(tmp_path, capsys, monkeypatch):
    np.save(tmp_path / "norms.npy", np.float32(NORMS))
    suggestion = run_json(capsys, "suggest", str(tmp_path / "norms.npy"))
    assert (suggestion["median"], suggestion["nonfinite"]) == (2.0, 1)
    stdin = io.TextIOWrapper(io.BytesIO(b"norm\n1\n\n3\n"))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert run_json(capsys, "suggest", "-")["mean"] == 2.0


def test_until_limits_the_steps_that_are_read(file, capsys):
    path = file("norm\n1\n3\n1e9\n")
    assert run_json(capsys, "suggest", path, "--until", "2")["mean"] == 2.0
    assert run_json(capsys, "replay", path, "--until", "2")["steps"] == 2
    for value in ("0", "-1", "half"):
        with pytest.raises(SystemExit):
            main(["suggest", path, "--until", value])
        assert f"whole number >= 1, got {value}" in capsys.readouterr().err


@pytest.mark.parametrize("write", ["to_csv", "to_jsonl"])
def test_suggest_reads_the_thresholds_of_a_log(tmp_path, capsys, write):
    raw = np.exp(np.random.default_rng(0).normal(0.3, 0.3, 200))
    limits = np.geomspace(3, 1, 200)
    level = np.minimum(raw, 1.0)
    for norms, thresholds, verdict in [
        (np.minimum(raw, limits), limits, "clipped"),
        (level, np.full(200, 0.9), "healthy"),  # the norms themselves stop at 1
        (level, np.full(200, math.inf), "clipped"),
    ]:
        log = ClipLog()
        for norm, threshold in zip(norms, thresholds, strict=True):
            log.record(norm=norm, threshold=threshold)
        getattr(log, write)(tmp_path / "log")
        assert main(["suggest", str(tmp_path / "log"), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["verdict"] == verdict


LOSSES = {
    "another level, and a loss far above": ("loss", 20.0, 9.0, "diverged"),
    "another level, and the loss as before": ("loss", 20.0, 2.6, "shifted"),
    "another level, and a validation loss": ("val_loss", 20.0, 9.0, "shifted"),
    "a spike, and a loss far above": ("train/loss_step", 1.0, 9.0, "diverged"),
    "a spike, and the loss as before": ("train/loss_step", 1.0, 2.6, "spikes"),
    "a spike, and the loss of another run": ("b - loss", 1.0, 9.0, "spikes"),
}
"""The name of the column, norm and loss after a spike at step 200, and the verdict."""


@pytest.mark.parametrize("case", LOSSES)
def test_suggest_reads_the_loss_beside_the_norms(file, capsys, case):
    """A loss that ends far above its level before a spike or a jump shows damage."""
    column, level, end, verdict = LOSSES[case]
    rng = np.random.default_rng(0)
    norms = np.exp(rng.normal(np.log(np.repeat([1.0, level], [200, 100])), 0.1))
    losses = rng.normal(np.repeat([2.6, end], [200, 100]), 0.05)
    norms[200], losses[210] = 60.0, math.nan
    rows = [f"{s},{x},{n}" for s, (x, n) in enumerate(zip(losses, norms, strict=True))]
    run = "a - " if column.startswith("b - ") else ""
    lines = f"step,{column},{run}grad_norm", *rows
    path = file("\n".join(lines).replace("nan", ""))
    result = run_json(capsys, "suggest", path)
    assert result["verdict"] == verdict
    if verdict == "diverged":
        assert result["step"] - 200 in (0, 3)  # a level is found some steps late
        last = np.nanmedian(losses[-20:])
        assert f"The loss ends at {last:.4g}; before" in result["sentence"]
    assert run_json(capsys, "suggest", path, "--until", "200")["verdict"] == "healthy"


@pytest.mark.parametrize("write", ["to_csv", "to_jsonl"])
@pytest.mark.parametrize("has_updates", [True, False])
def test_suggest_reads_a_log_once(tmp_path, capsys, monkeypatch, write, has_updates):
    """Stdin cannot be read twice. A log with updates is one of TrustClip."""
    log, rng = ClipLog(), np.random.default_rng(0)
    for norm in np.minimum(np.exp(rng.normal(0.5, 0.3, 200)), 1.5):
        metrics = {"clip/norm": norm, "clip/threshold": 1.0}
        updates = {"clip/update_norm": 1.0, "clip/update_threshold": 2.0}
        log.record(metrics | (updates if has_updates else {}))
    getattr(log, write)(tmp_path / "log")
    data = io.BytesIO((tmp_path / "log").read_bytes())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(data))
    assert main(["suggest", "-"]) == 0
    text = capsys.readouterr().out
    assert "Healthy: " in text  # norms above their thresholds are from before clipping
    assert ("Begin with TrustClip" in text) == (not has_updates)


@pytest.mark.parametrize(
    ("scale", "rise", "words"),
    [
        (0.29, 1.0, "keeps this run healthy (mean scale 0.29, below 0.3)"),
        (0.31, 1.0, None),
        (0.29, 1e9, "if the log is of a dry run, set dry_run=False, so that TrustClip"),
        (0.31, 1e9, "if the log is of a dry run, set dry_run=False, so that TrustClip"),
    ],
)
def test_suggest_says_what_the_bound_of_the_update_did(
    tmp_path, capsys, scale, rise, words
):
    """`--until` also ends the scales."""
    log, rng = ClipLog(), np.random.default_rng(0)
    for step, norm in enumerate(np.exp(rng.normal(0, 0.3, 300))):
        size = norm * rise ** (step >= 200)
        updates = {"clip/update_norm": 1.0, "clip/update_threshold": scale}
        updates["clip/update_scale"] = scale if step < 260 else 9.0
        log.record({"clip/norm": size, "clip/threshold": 9.0} | updates)
    log.to_csv(tmp_path / "log.csv")
    assert main(["suggest", str(tmp_path / "log.csv"), "--until", "260"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Begin with TrustClip" not in text
    assert ("dry run" in text) == (words is not None)
    assert (words or "") in text


def test_suggest_in_json_begins_with_the_verdict(file, capsys):
    """The steps are those of the file: each norm is of 50 steps."""
    norms = [1.0, 1.5, 2.0, 1.25] * 25 + [1e4, 5e8] * 15
    rows = "".join(f"{50 * i},{n}\n" for i, n in enumerate(norms))
    path = file("step,norm\n" + rows)
    suggestion = run_json(capsys, "suggest", path)
    assert (suggestion["verdict"], suggestion["step"]) == ("diverged", 5000)
    assert (suggestion["median"], suggestion["max_norm"]) == (1.375, 2.0)
    assert suggestion["policy"] == as_code(Quantile(0.9))
    assert run_json(capsys, "suggest", path, "--until", "5000")["max_norm"] == 2.0
    assert main(["suggest", path]) == 0
    second = capsys.readouterr().out.splitlines()[1]
    assert second.startswith("The run diverged at step 5000: ")
    suggestion = run_json(capsys, "suggest", file("norm\n" + "nan\n" * 90))
    names = "median", "max_norm", "mean_range", "policy"
    assert [suggestion[name] for name in names] == [None] * 4
    assert suggestion["verdict"] == "non-finite"


def test_a_json_array_is_read(file, capsys):
    assert run_json(capsys, "suggest", file("[1.0, 3.0]", "a.json"))["mean"] == 2.0


def test_empty_cells_are_left_out(file, capsys):
    path = file("step,norm,other_norm\n0,1,9\n1,,9\n2,inf,9\n3,3\n")
    report = run_json(capsys, "suggest", path, "--column", "norm")
    assert (report["steps"], report["nonfinite"], report["mean"]) == (3, 1, 2.0)


def test_options_reach_the_policy(file, capsys):
    path = file("norm\n1\n4\n")
    argv = ["replay", path, "--policy", "fixed", "--max-norm", "2"]
    assert run_json(capsys, *argv)["clip_rate"] == 0.5
    argv = ["replay", path, "--quantile", "0.5", "--history-length", "none"]
    argv += ["--max-threshold", "3", "--include-current"]
    inner = "Quantile(quantile=0.5, history_length=None, include_current=True)"
    assert run_json(capsys, *argv)["policy"] == f"Cap(policy={inner}, max_norm=3.0)"


@pytest.mark.parametrize("name", POLICIES)
def test_every_argument_of_a_policy_is_an_option(name):
    """Each option accepts the default of its argument, in the type that it has."""
    kind = POLICIES[name]
    arguments = {"max_norm": 2.0} if name == "fixed" else {}
    for argument, parameter in inspect.signature(kind).parameters.items():
        if parameter.default is not parameter.empty and argument != "_":
            arguments[argument] = parameter.default
    words = ["--policy", name]
    for argument, value in arguments.items():
        option = as_option(argument)
        if isinstance(value, bool):
            words.append(option if value else option.replace("--", "--no-", 1))
        else:
            words += [option, str(value)]
    parser = argparse.ArgumentParser()
    add_options(parser)
    assert make_policy(parser.parse_args(words)) == kind(**arguments)


def test_the_steps_can_be_saved(file, tmp_path):
    path = file("norm\n1\n4\n")
    out = tmp_path / "steps.csv"
    argv = ["replay", path, "--policy", "fixed", "--max-norm", "2"]
    assert main([*argv, "--output", str(out)]) == 0
    assert ClipLog.from_csv(out).scales.tolist() == [1.0, 0.5]


def test_compare_is_a_table_of_all_policies(file, capsys):
    """The norms are 1.00 to 1.09; their p90 without the spike is 1.08."""
    norms = [1 + step % 10 / 100 for step in range(150)]
    norms[99] = 50.0
    path = file("norm\n" + "\n".join(map(str, norms)))
    assert main(["replay", path, "--compare"]) == 0
    text = capsys.readouterr().out
    for name in (
        "quantile 0.9",
        "streaming",
        "mean-std",
        "zscore",
        "ema",
        "fixed 1.08",
    ):
        assert name in text
    assert "caught" in text
    assert "1/1" in text
    rows = run_json(capsys, "replay", path, "--compare")["policies"]
    fixed = replay(norms, Fixed(suggest_threshold(norms).max_norm))
    assert rows[-1]["clip_rate"] == fixed.clip_rate


def test_compare_offers_only_a_constant_that_is_suggested(file, capsys):
    path = file("norm\n" + "1\n" * 5 + "1e18\n" * 60)
    assert main(["suggest", path]) == 0
    assert "suggested     none" in capsys.readouterr().out
    assert main(["replay", path, "--compare"]) == 0
    text = capsys.readouterr().out
    assert "fixed" not in text
    assert "none" in text  # spikes


@pytest.mark.parametrize(
    ("text", "argv", "words"),
    [
        (None, [], "No such file"),
        ("", [], "empty"),
        ("norm\n", [], "column 'norm' is empty"),
        ("norm\n1\ntwo\n", [], "column 'norm' must hold numbers, got 'two' in row 2"),
        ("a,b\n1,2\n", [], "'a', 'b'"),
        ("a_norm,b_norm\n1,2\n", [], "--column: 'a_norm', 'b_norm'"),
        ("norm\n1\n", ["--column", "x"], "no column 'x'; the columns are 'norm'"),
        ("norm\n-1\n", [], "norms must be >= 0, got -1.0"),
        ("norm\n1,2\n", [], "line 2 must have 1 cells"),
        ("norm\n1\n", ["--compare", "--quantile", "0.5"], "--quantile is for one"),
        ("norm,norm\n1,2\n", [], "different names, got 'norm' twice"),
        ('{"a": ' * 100_000, [], "line 1 is not JSON"),
        ("[" * 100_000, [], "it looks like JSON, but line 1 is not JSON"),
        ('{"norm": 1\n', [], "line 1 is not JSON"),
        ("norm\n1\n", ["--quantile", "90"], "did you mean 0.9?"),
        ("norm\n1\n", ["--z", "3"], "--z is no option of --policy quantile"),
        ("norm\n1\n", ["--policy", "fixed"], "needs --max-norm"),
        ("norm\n1\n", ["--policy", "best"], "invalid choice"),
        ("norm\n1\n", ["--policy", "trust"], "trust needs the weights of the model"),
        ("norm\n1\n", ["--policy", "param-ratio"], "read clip/clip_rate; see"),
        pytest.param(
            *(
                "norm\n1\n",
                ["--plot", "/no/such/a.png"],
                "/no/such/a.png: No such file",
            ),
            marks=pytest.mark.needs("plot"),
        ),
    ],
    ids=lambda value: None if not isinstance(value, str) else value[:20] or "empty",
)
def test_bad_input_is_one_line_and_status_2(file, tmp_path, capsys, text, argv, words):
    path = str(tmp_path / "none.csv") if text is None else file(text)
    try:
        status = main(["replay", path, *argv])
    except SystemExit as stop:  # argparse exits this way
        status = stop.code
    out, err = capsys.readouterr()
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert words in err


def test_a_file_that_is_not_text_is_one_error_line(tmp_path, capsys):
    path = tmp_path / "a.csv"
    for data in (b"\xff\xfe\x00", b"\x93NUMPYxx", b"\x93NUMPY"):
        path.write_bytes(data)
        assert main(["suggest", str(path)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_the_module_runs_and_a_broken_pipe_is_quiet(file):
    path = file("norm\n" + "1\n" * 50)
    argv = [sys.executable, "-m", "autoclip_core", "replay", path, "--compare"]
    run = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    run.stdout.close()
    assert run.stderr.read() == b""
    run.stderr.close()
    assert run.wait() == 0


@pytest.mark.parametrize(
    ("redirect", "message"),
    [(">&-", "Bad file descriptor"), (">/dev/full", "No space left on device")],
)
def test_an_error_of_stdout_names_stdout(file, redirect, message):
    command = f'"$0" -m autoclip_core suggest "$1" {redirect}'
    run = subprocess.run(
        ["sh", "-c", command, sys.executable, file("norm\n1\n")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stderr) == (2, f"autoclip: stdout: {message}\n")


INTERRUPTED = """
import os, signal, sys
class Finder:
    def find_spec(name, path, target=None):
        if name == "numpy":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder)
# A shell starts a command in the background with this signal ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
{}
"""


@pytest.mark.parametrize(
    ("module", "command"),
    [
        ("numpy", "import autoclip_command"),
        ("autoclip_core.cli", "import runpy; runpy.run_module('autoclip_core')"),
    ],
)
def test_an_interrupt_during_the_imports_has_no_traceback(module, command):
    code = INTERRUPTED.replace('"numpy"', f'"{module}"').format(command)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert (run.returncode, run.stderr) == (130, b"")


@pytest.mark.parametrize(
    "argv",
    [
        ["replay", "--output"],
        pytest.param(["replay", "--plot"], marks=pytest.mark.needs("plot")),
        pytest.param(["report", "-o"], marks=pytest.mark.needs("plot")),
    ],
    ids=" ".join,
)
def test_the_file_that_is_read_is_not_overwritten(file, tmp_path, capsys, argv):
    path = file("norm\n1\n")
    (tmp_path / "link.csv").symlink_to(path)
    command, option = argv
    for output in (path, str(tmp_path / "link.csv")):
        assert main([command, path, option, output]) == 2
        assert "must be another file than the one that is" in capsys.readouterr().err
    assert (tmp_path / "norms.csv").read_text() == "norm\n1\n"


def test_a_closed_stdin_is_one_error_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)  # what Python makes of `<&-`
    assert main(["suggest", "-"]) == 2
    assert capsys.readouterr().err == "autoclip: -: stdin is closed; name a file\n"


@pytest.mark.parametrize("name", ["-", "run"])
def test_a_file_on_stdin_or_in_a_folder_is_not_overwritten(tmp_path, name):
    """stdin may be a file, and of a folder one file is read."""
    log = tmp_path / "run" / "metrics.csv"
    log.parent.mkdir()
    log.write_text("norm\n1\n")
    command = [sys.executable, "-m", "autoclip_core", "replay", name, "--output"]
    with log.open() as stdin:
        run = subprocess.run(
            [*command, str(log)],
            stdin=stdin,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            check=False,
            capture_output=True,
            text=True,
        )
    assert run.returncode == 2
    assert "must be another file than the one that is read" in run.stderr
    assert log.read_text() == "norm\n1\n"


def test_norms_beyond_float32_have_no_clip_rate_and_no_warning(file, capsys):
    path = file("norm\n1e308\n1.7e308\n")
    for more in ([], ["--compare"]):
        assert main(["replay", path, *more]) == 0
        out = capsys.readouterr().out
        assert "nan" not in out
        assert "unknown" in out


def test_version_prints_the_name_and_the_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"autoclip {__version__}\n"


@pytest.mark.parametrize("command", [[], ["replay"], ["suggest"], ["report"]])
def test_help_describes_the_file_in_80_columns(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "FILE" in out
    assert max(map(len, out.splitlines())) <= 80


@pytest.fixture(params=["rich", "plain"])
def library(request, monkeypatch):
    """Whether the extra `cli` is installed."""
    if request.param == "plain":
        monkeypatch.setitem(sys.modules, "rich.progress", None)
    else:
        pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    return request.param


def test_a_progress_bar_is_shown_only_on_a_terminal(file, capsys, monkeypatch, library):
    monkeypatch.setattr("autoclip_core.cli.progress.UPDATE_SECONDS", 0.0)
    path = file("norm\n" + "1\n" * 1500)
    assert main(["replay", path]) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["replay", path]) == 0
    assert ("100%" if library == "rich" else "100 %") in capsys.readouterr().err


def test_a_table_has_colours_only_on_a_terminal(file, capsys, monkeypatch, library):
    path = file("norm\n" + "1\n" * 99 + "50\n" + "9\n" * 99)
    assert main(["replay", path, "--compare"]) == 0
    plain = capsys.readouterr().out
    assert "\x1b" not in plain
    assert "follows" in plain  # the level rises; in a damaged run it is no merit
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["replay", path, "--compare"]) == 0
    coloured = capsys.readouterr().out
    assert ("\x1b[36m" in coloured) == (library == "rich")
    text = re.sub("\x1b\\[[0-9;]*m|[-─]", "", coloured).split()
    assert text == plain.replace("-", "").split()
    assert max(map(len, re.sub("\x1b\\[[0-9;]*m", "", coloured).splitlines())) <= 80


@pytest.mark.needs("plot")
def test_plots_are_saved(file, tmp_path):
    path = file("norm\n" + "1\n2\n1.5\n" * 700)
    for name, more in [("one.png", []), ("all.png", ["--compare"])]:
        out = tmp_path / name
        assert main(["replay", path, "--plot", str(out), *more]) == 0
        assert out.read_bytes().startswith(b"\x89PNG")
        assert out.stat().st_size > 20_000


def test_without_matplotlib_the_extra_is_named(file, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["replay", file("norm\n1\n"), "--plot", "a.png"]) == 2
    assert "autoclip-toolkit[plot]" in capsys.readouterr().err


def test_a_semicolon_in_a_quoted_name_is_not_a_delimiter(file, capsys):
    path = file('Step,"lr=1;wd=2;b - norm"\n0,1.5\n1,2.5\n')
    assert main(["suggest", path]) == 0
    assert "lr=1;wd=2;b - norm" in capsys.readouterr().out


LONG = "run \x1b[31mwith a long name\x1b[0m, lr=0.001 and more - train/layers/grad_norm"


@pytest.mark.parametrize(
    "argv",
    [
        *(["suggest"], ["replay"], ["replay", "--compare"]),
        pytest.param(["report"], marks=pytest.mark.needs("plot")),
    ],
    ids=" ".join,
)
def test_the_output_fits_80_columns_and_has_no_escape_sequences(
    file, tmp_path, capsys, monkeypatch, argv
):
    monkeypatch.chdir(tmp_path)
    norms = [1.5] * 60 + [90.0] + [9.0] * 60  # with a spike and a change of level
    file(f'Step,"{LONG}"\n' + "".join(f"{i},{n}\n" for i, n in enumerate(norms)))
    assert main([*argv, "norms.csv"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "\x1b" not in out
    first = " ".join(out.split())
    name = LONG.replace("\x1b", "\\x1b")
    assert first.startswith(f"CSV, column {name}: 121 steps, 0 empty cells")
    assert argv != ["report"] or "report.html: written, " in first


@pytest.mark.parametrize("argv", [["suggest"], ["replay", "--policy", "best"]])
def test_an_error_fits_80_columns_on_a_terminal(tmp_path, capsys, monkeypatch, argv):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "norms.csv").write_text("step,val_loss,param_norm\n1,2,3\n")
    lines = []
    for is_terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda value=is_terminal: value)
        with contextlib.suppress(SystemExit):  # argparse exits this way
            assert main([*argv, "norms.csv"]) == 2
        lines.append(capsys.readouterr().err.splitlines())
    [line], wrapped = lines
    assert len(line) > 80 >= max(map(len, wrapped))
    assert " ".join(wrapped) == line


def test_an_error_shows_escape_sequences(tmp_path, capsys):
    assert main(["suggest", str(tmp_path / "\x1b[31m.csv")]) == 2
    assert "\x1b" not in capsys.readouterr().err


@pytest.mark.needs("plot")
def test_report_says_what_it_overwrites(file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # a long path is wrapped
    page = tmp_path / "page.html"
    page.write_text("old")
    assert main(["report", file("norm\n" + "1\n" * 9), "-o", page.name]) == 0
    out = capsys.readouterr().out.rstrip()
    assert out.endswith(f"page.html: overwritten, {page.stat().st_size // 1000} kB")
