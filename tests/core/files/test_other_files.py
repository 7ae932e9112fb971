"""Files that libraries wrote and the reader's author did not know: read, or refused.

An error says what the file is and the way out.
"""

import io
import json
import logging

import numpy as np
import pytest

from autoclip_core import read_norms

NORMS = [1.5, 2.25, 0.375, 0.8125]
STEPS = list(enumerate(NORMS))
LINES = [f"step {i} | loss 2.5 | grad_norm: {n}\n" for i, n in STEPS]


def check(path, kind):
    read = read_norms(path)
    assert (read.kind, read.norms.tolist()) == (kind, NORMS)
    assert read.steps.tolist() == [0, 1, 2, 3]


@pytest.mark.needs("stacks")
@pytest.mark.parametrize(
    "style",
    ["fancy_grid", "rounded_outline", "double_grid", "simple", "rst", "pipe", "plain"],
)
def test_a_table_of_tabulate_is_read(tmp_path, style):
    from tabulate import tabulate

    rows = [(i, 2.5, n) for i, n in STEPS]
    text = tabulate(rows, headers=["step", "loss", "grad_norm"], tablefmt=style)
    (tmp_path / "table.txt").write_text(text, encoding="utf-8")
    check(tmp_path / "table.txt", "table")


@pytest.mark.needs("stacks")
@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_table_and_a_log_of_rich_are_read(tmp_path, is_terminal):
    from rich.console import Console
    from rich.logging import RichHandler
    from rich.table import Table

    table = Table("step", "grad_norm")
    for step, norm in STEPS:
        table.add_row(str(step), str(norm))
    text = io.StringIO()
    Console(file=text, width=60).print(table)
    (tmp_path / "table.txt").write_text(text.getvalue(), encoding="utf-8")
    check(tmp_path / "table.txt", "table")
    text = io.StringIO()
    console = Console(file=text, width=100, force_terminal=is_terminal)
    logger = logging.Logger("train")
    logger.addHandler(RichHandler(console=console))
    for line in LINES:
        logger.info(line.strip())
    (tmp_path / "log.txt").write_text(text.getvalue(), encoding="utf-8")
    check(tmp_path / "log.txt", "text log")


TEXTS = {
    "a container's log": (
        "".join(json.dumps({"log": line, "stream": "stdout"}) + "\n" for line in LINES),
        "text log",
    ),
    "a notebook": (
        json.dumps({"cells": [{"outputs": [{"text": LINES}]}]}, indent=1),
        "text log",
    ),
    "srun --label": ("".join(f"{r}: {x}" for x in LINES for r in (0, 1)), "text log"),
    "torchrun --tee": ("".join("[default0]:" + line for line in LINES), "text log"),
    "logfmt": (
        "".join(f'level=info msg="a" step={i} grad_norm={n}\n' for i, n in STEPS),
        "text log",
    ),
    "a CSV of Excel": (
        "sep=;\nstep;grad_norm\n" + "".join(f"{i};{n}\n" for i, n in STEPS),
        "CSV",
    ),
    "comments before the header": (
        "# run 7, seed 1\n# lr 1e-3\nstep,grad_norm\n"
        + "".join(f"{i},{n}\n" for i, n in STEPS),
        "CSV",
    ),
}


@pytest.mark.parametrize("case", TEXTS)
def test_what_tools_add_around_norms_is_left_out(tmp_path, case):
    text, kind = TEXTS[case]
    (tmp_path / "file").write_text(text)
    check(tmp_path / "file", kind)


def test_a_header_in_comments_is_the_last_before_numbers(tmp_path):
    header = "run 7\nstep grad_norm"
    np.savetxt(tmp_path / "norms.txt", np.array(STEPS), header=header)
    check(tmp_path / "norms.txt", "table")


def test_python_objects_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.array([NORMS, "x"], dtype=object))
    with pytest.raises(ValueError, match=r"Python objects; .*asarray\(norms, float\)"):
        read_norms(tmp_path / "a.npy")
    (tmp_path / "a.pt").write_bytes(b"PK\x03\x04" + bytes(26) + b"norms/data.pkl")
    with pytest.raises(ValueError, match=r"of torch\.save, .* with numpy\.save"):
        read_norms(tmp_path / "a.pt")


@pytest.mark.needs("stacks")
def test_the_folders_of_add_scalars_are_named(tmp_path):
    """torch's `add_scalars` writes the events of each name into a folder below."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    def write(folder, tag):
        writer = EventFileWriter(str(folder))
        for step, norm in STEPS:
            value = Summary.Value(tag=tag, simple_value=norm)
            writer.add_event(Event(step=step, summary=Summary(value=[value])))
        writer.close()

    write(tmp_path / "a", "loss")
    write(tmp_path / "a" / "grad_norm_total", "grad_norm")
    with pytest.raises(ValueError, match=r"below hold events: '.*grad_norm_total'"):
        read_norms(tmp_path)
    check(tmp_path / "a" / "grad_norm_total", "TensorBoard events")
    write(tmp_path / "a", "train/grad_norm")  # the folder below may be of `add_hparams`
    check(tmp_path, "TensorBoard events")


@pytest.mark.needs("stacks", "torch")
@pytest.mark.parametrize("purge_step", [None, 25])
def test_the_steps_of_a_resumed_run_replace_those_of_the_first(tmp_path, purge_step):
    from torch.utils.tensorboard import SummaryWriter

    runs = [(range(0, 50, 10), 1.0, None), (range(30, 60, 10), 5.0, purge_step)]
    for steps, norm, start in runs:
        with SummaryWriter(str(tmp_path), purge_step=start) as writer:
            for step in steps:
                writer.add_scalar("grad_norm", norm, step)
        with SummaryWriter(str(tmp_path)) as writer:  # another tag replaces nothing
            writer.add_scalar("loss", 1.0, 0)
    with SummaryWriter(str(tmp_path), purge_step=45) as writer:
        writer.add_scalar("loss", 1.0, 60)
    read = read_norms(tmp_path)
    assert read.steps.tolist() == [0, 10, 20, 30, 40]
    assert read.norms.tolist() == [1, 1, 1, 5, 5]
