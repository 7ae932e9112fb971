"""`read_norms` on tables, JSON and arrays: which column, which cells, which errors."""

import gzip
import io
import json
import math
import sys
import zipfile

import numpy as np
import pytest

from autoclip_core import ClipLog, read_norms
from autoclip_core.cli.main import main

NAN, INF = math.nan, math.inf
NORMS = [1.5, 2.25, 8.0]


@pytest.fixture
def file(tmp_path):
    def write(content, name="norms.csv"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = content if isinstance(content, bytes) else content.encode()
        path.write_bytes(data)
        return path

    return write


def table(header, rows, delimiter=","):
    lines = [header, *(delimiter.join(map(str, row)) for row in rows)]
    return "".join(line + "\n" for line in lines)


INDEXED = [(10 * i, n) for i, n in enumerate(NORMS)]
WANDB = "a - train/grad_norm"
TABLES = {
    "comma": (table("step,grad_norm", INDEXED), "CSV"),
    "semicolon": (table("step;grad_norm", INDEXED, ";"), "CSV"),
    "tab": (table("step\tgrad_norm", INDEXED, "\t"), "TSV"),
    "spaces": (table("step   grad_norm", INDEXED, "    "), "table"),
    "a table that pandas printed": (
        "   step  grad_norm\n0 0 1.5\n1 10 2.25\n2 20 8\n",
        "table",
    ),
    "np.savetxt with a header": ("# step grad_norm\n0 1.5\n10 2.25\n20 8.0\n", "table"),
    "Markdown": (
        "| step | loss | grad_norm |\n|---|:-:|---|\n| 0 | 3 | 1.5 |\n"
        "| 10 | | 2.25 |\n| 20 | 3 | 8 |\n",
        "table",
    ),
    "psql": (
        " step | grad_norm\n------+----------\n   0 |  1.5\n  10 | 2.25\n  20 | 8\n",
        "table",
    ),
    "PrettyTable": (
        "+------+-----------+\n| step | grad_norm |\n+======+===========+\n"
        "|    0 |       1.5 |\n|   10 |      2.25 |\n|   20 |         8 |\n"
        "+------+-----------+\n",
        "table",
    ),
    "bars without white space": ("step|grad_norm\n0|1.5\n10|2.25\n20|8\n", "table"),
    "decimal comma": ("step;grad_norm\n0;1,5\n10;2,25\n20;8,0\n", "CSV"),
    "decimal comma in quotes": (
        'step,grad_norm\n0,"1,5"\n10,"2,25"\n20,"8,0"\n',
        "CSV",
    ),
    "decimal comma and tab": ("step\tgrad_norm\n0\t1,5\n10\t2,25\n20\t8,0\n", "TSV"),
    "the index of pandas": (",step,grad_norm\n0,0,1.5\n1,10,2.25\n2,20,8.0\n", "CSV"),
    "W&B history": (
        "_step,_runtime,_timestamp,train/grad_norm,train/loss\n"
        "0,1,17,1.5,3\n10,2,18,2.25,3\n20,3,19,8,3\n",
        "CSV",
    ),
    "W&B panel": (
        f'"Step","{WANDB}","{WANDB}__MIN","{WANDB}__MAX"\n'
        '"0","1.5","1.5","1.5"\n"10","2.25","2","3"\n"20","8","8","8"\n',
        "W&B CSV",
    ),
    "TensorBoard": (
        "Wall time,Step,Value\n1.7e9,0,1.5\n1.7e9,10,2.25\n1.7e9,20,8.0\n",
        "TensorBoard CSV",
    ),
    "JSON lines": (
        '{"step": 0, "grad_norm": 1.5}\n{"step": 10, "grad_norm": 2.25}\n'
        '{"step": 20, "grad_norm": 8}\n',
        "JSON lines",
    ),
    "nested JSON lines": (
        "".join(
            json.dumps({"step": s, "train": {"loss": 1, "o": {"grad_norm": n}}}) + "\n"
            for s, n in INDEXED
        ),
        "JSON lines",
    ),
    "JSON lines of ms-swift": (
        "".join(
            json.dumps({"grad_norm": n, "global_step/max_steps": f"{s}/90"}) + "\n"
            for s, n in INDEXED
        ),
        "JSON lines",
    ),
    "JSON lines of Ray": (
        "".join(
            json.dumps({"train/grad_norm": n, "training_iteration": s}) + "\n"
            for s, n in INDEXED
        ),
        "JSON lines",
    ),
    "long table": (
        "run,metric,step,value\n"
        + "".join(f"a,loss,{s},3\na,train/grad_norm,{s},{n}\n" for s, n in INDEXED),
        "CSV",
    ),
    "long table of TensorBoard's get_scalars": (
        ",run,tag,step,value\n"
        + "".join(f"{i},a,grad_norm,{s},{n}\n" for i, (s, n) in enumerate(INDEXED))
        + "".join(f"{i},a,loss,{s},3\n" for i, (s, _) in enumerate(INDEXED, 3)),
        "CSV",
    ),
    "long JSON lines": (
        '{"config": 1}\n'
        + "".join(
            json.dumps({"name": name, "value": n, "step": s}) + "\n"
            for s, n in INDEXED
            for name in ("lr", "grad_norm")
        ),
        "JSON lines",
    ),
    "JSON list": (json.dumps([{"step": s, "norm": n} for s, n in INDEXED]), "JSON"),
    "TensorBoard JSON": (
        json.dumps([[1.7e9, s, n] for s, n in INDEXED], indent=1),
        "TensorBoard JSON",
    ),
    "dict of lists": (
        json.dumps({"loss": [3, 2, 1], "step": [0, 10, 20], "grad_norm": NORMS}),
        "JSON",
    ),
    "pandas JSON": (
        json.dumps(
            {"step": {"0": 0, "1": 10, "2": 20}, "norm": {"0": 1.5, "1": 2.25, "2": 8}}
        ),
        "JSON",
    ),
    "trainer state": (
        json.dumps(
            {
                "global_step": 20,
                "log_history": [
                    {"epoch": 0.1, "grad_norm": 1.5, "step": 0},
                    {"epoch": 0.2, "grad_norm": 2.25, "step": 10},
                    {"epoch": 0.3, "grad_norm": 8, "step": 20},
                ],
            },
            indent=2,
        ),
        "Hugging Face trainer state",
    ),
    "MLflow": ("1732900000000 1.5 0\n1732900000001 2.25 10\n1732900000002 8 20\n", 0),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLES)
def test_norms_and_steps_are_read(file, case):
    content, kind = TABLES[case]
    read = read_norms(file(content, "grad_norm" if case == "MLflow" else "norms.csv"))
    assert read.norms.tolist() == NORMS
    assert read.steps.tolist() == [0, 10, 20]
    assert (read.norms.dtype, read.steps.dtype) == (np.float64, np.int64)
    assert read.empty == 0
    assert kind in (0, read.kind)


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"]
)
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_each_encoding_and_gzip_are_read(file, encoding, compress):
    data = table("step,grad_norm", INDEXED).replace("\n", "\r\n").encode(encoding)
    assert read_norms(file(compress(data))).norms.tolist() == NORMS


@pytest.mark.parametrize("is_sparse", [False, True])
def test_many_json_lines_are_read(file, is_sparse):
    """Time that grows as the square of the lines would take minutes here."""
    count = 50_000
    steps = [{"step": i, "norm": 1.0, "threshold": 2.0} for i in range(count)]
    if is_sparse:
        steps[-1]["scale_later"] = 1.0
    path = file("\n".join(map(json.dumps, steps)), "run.jsonl")
    assert len(ClipLog.from_jsonl(path)) == count
    assert len(read_norms(path).norms) == count


def test_line_separators_inside_a_string_do_not_end_a_line(file):
    text = '{"note": "a\u2028b\x85c", "norm": 1.5, "threshold": 2}\n'
    path = file(text * 2, "run.jsonl")
    assert read_norms(path).norms.tolist() == [1.5, 1.5]
    assert ClipLog.from_jsonl(path).norms.tolist() == [1.5, 1.5]


@pytest.mark.parametrize("digits", [400, 5000])
def test_a_number_of_hundreds_of_digits_is_infinite(file, digits):
    """Python converts at most 4300 digits to an int."""
    for text in ('{"norm": %s}\n{"norm": 1}\n', "[%s, 1]", "norm\n%s\n1\n"):
        assert read_norms(file(text % ("9" * digits))).norms.tolist() == [INF, 1.0]


@pytest.mark.parametrize("method", ["from_csv", "from_jsonl"])
def test_an_error_about_many_columns_is_short(file, method):
    names = [f"column_{i}" for i in range(50_000)]
    table_of_one = ",".join(names) + "\n" + ",".join(["1"] * len(names))
    text = json.dumps(dict.fromkeys(names, 1)) if "json" in method else table_of_one
    with pytest.raises(ValueError, match="the columns norm and threshold") as caught:
        getattr(ClipLog, method)(file(text))
    assert len(str(caught.value)) < 1000


def test_bytes_that_are_no_text_do_not_stop_the_reader(file):
    text = "step,grad_norm,note\n0,1.5,caf\xe9\n".encode("latin-1")
    assert read_norms(file(text)).norms.tolist() == [1.5]


def write_array(array, save=np.save):
    data = io.BytesIO()
    save(data, array)
    return data.getvalue()


def write_archive(**arrays):
    data = io.BytesIO()
    np.savez(data, **arrays)
    return data.getvalue()


@pytest.mark.parametrize(
    ("data", "column"),
    [
        (write_array(np.float32(NORMS)), None),
        (write_array(np.float32(NORMS)[:, None]), None),
        (write_array(np.array([[0, n] for n in NORMS])), "1"),
        (write_array(np.rec.fromarrays([NORMS, NORMS], names="grad_norm,loss")), None),
        (write_archive(grad_norm=NORMS, loss=[1.0, 2.0, 3.0], names=["a"]), None),
        (write_archive(loss=[1.0], table=np.array([[n, 0] for n in NORMS])), "table.0"),
    ],
)
def test_arrays_are_read(file, data, column):
    assert read_norms(file(data, "norms.npy"), column).norms.tolist() == NORMS


LIGHTNING = (
    "epoch,grad_2.0_norm/fc.bias,grad_2.0_norm/fc.weight,grad_2.0_norm_total,step,"
    "val_loss\n0,0.5,1.4,1.5,9,\n0,,,,9,2.5\n1,0.5,2.2,2.25,19,\n1,,,,19,2.4\n"
)

COLUMNS = {  # the columns, and the one that holds the norms
    "train/grad_norm": ["step", "train/loss", "train/grad_norm", "lr"],
    "total_norm": ["total_norm", "loss"],
    "clip/norm": ["clip/norm", "clip/threshold", "clip/norm_after", "clip/clip_rate"],
    "gnorm": ["num_updates", "gnorm", "clip", "loss_scale"],
    "l2_norm/grad/global": [
        *("l2_norm/grad/global", "l2_norm/grad/layers.0.input_layernorm.weight"),
        *("l2_norm/param/global", "l2_norm/moment/global", "l2_norm/update/global"),
    ],
    "l2_grads": ["training_loss", "l2_params", "l2_grads", "l2_updates"],
    "grad_norm_before_clip": ["grad_norm_before_clip", "grad_norm_after_clip"],
    "optim/total_grad_norm": ["optim/total_grad_norm", "optim/grad_norm/wte"],
    "gradient norm": ["gradient norm", "params norm", "max_grad_norm"],
    "clip/update_norm": ["clip/norm", "clip/update_norm"],
    "actor/grad_norm": ["actor/grad_norm", "actor/loss"],
}


@pytest.mark.parametrize("wanted", COLUMNS)
def test_the_norm_of_the_whole_gradient_is_chosen(file, wanted):
    names = COLUMNS[wanted]
    path = file(
        table(",".join(names), [["1.5" if n == wanted else "7" for n in names]])
    )
    read = read_norms(path, "clip/update_norm" if "update" in wanted else None)
    assert (read.column, read.norms.tolist()) == (wanted, [1.5])
    assert read.columns == tuple(names)


def test_a_lightning_table_gives_the_total_and_counts_empty_cells(file, capsys):
    path = file(LIGHTNING, "metrics.csv")
    read = read_norms(path)
    assert (read.column, read.norms.tolist()) == ("grad_2.0_norm_total", [1.5, 2.25])
    assert (read.steps.tolist(), read.empty) == ([9, 19], 2)
    assert main(["suggest", str(path)]) == 0
    line = capsys.readouterr().out.splitlines()[0]
    assert line == "CSV, column grad_2.0_norm_total: 2 steps, 2 empty cells"


NO_NORM = [
    *("step,param_norm", "step,layernorm_scale", "step,loss", "loss", "max_norm"),
    *("step,weight_norm,loss", "norm_of_weights", "batch_norm.mean,loss"),
]


@pytest.mark.parametrize("header", NO_NORM)
@pytest.mark.parametrize("command", ["suggest", "replay", "report"])
def test_another_column_is_refused_unless_it_is_named(file, capsys, header, command):
    names = header.split(",")
    path = str(file(table(header, [["1.5"] * len(names)] * 2)))
    assert main([command, path]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "--column" in err
    assert repr(names[-1]) in err
    assert read_norms(path, names[-1]).norms.tolist() == [1.5, 1.5]


@pytest.mark.parametrize("name", ["run-a-tag-train_loss.csv", "run-a-tag-loss.json"])
def test_a_tensorboard_file_of_another_tag_is_refused(file, name):
    text = "Wall time,Step,Value\n1.7e9,0,1.5\n"
    path = file(text if name.endswith("csv") else "[[1.7e9, 0, 1.5]]", name)
    with pytest.raises(ValueError, match="names no gradient norm"):
        read_norms(path)
    assert read_norms(path, "Value").norms.tolist() == [1.5]
    path = file(path.read_bytes(), name.replace("train_", "").replace("loss", "norm"))
    assert read_norms(path).norms.tolist() == [1.5]


def test_the_columns_of_several_runs_are_listed(file):
    names = ["global run 1 - train/grad_norm", "run 2 - train/grad_norm"]
    path = file(table("Step," + ",".join(names), [[0, 1.5, 2.5]]))
    with pytest.raises(
        ValueError, match=r"2 columns match 'train/grad_norm'.*'run 2 -"
    ):
        read_norms(path, "train/grad_norm")
    with pytest.raises(ValueError, match="2 columns are named as gradient norms"):
        read_norms(path)
    assert read_norms(path, names[1]).norms.tolist() == [2.5]
    low = file(table(f"Step,{names[0]}__MIN,{names[0]}", [[0, 1.0, 1.5]]), "low.csv")
    assert read_norms(low, f"{names[0]}__MIN").norms.tolist() == [1.0]
    assert read_norms(low).norms.tolist() == [1.5]
    one = file(table("Step," + names[0], [[0, 1.5]]), "one.csv")
    assert read_norms(one, "train/grad_norm").column == names[0]


def test_nan_of_empty_cells_is_told_apart_from_a_run_with_nan(file):
    """pandas writes the empty cells of Lightning's table as NaN."""
    pandas = (
        LIGHTNING.replace(",,", ",NaN,").replace(",,", ",NaN,").replace(",\n", ",NaN\n")
    )
    read = read_norms(file(pandas))
    assert (read.norms.tolist(), read.steps.tolist()) == ([1.5, 2.25], [9, 19])
    assert read.empty == 2
    run = "step,loss,grad_norm\n0,3,1.5\n1,nan,nan\n2,2.5,inf\n3,2,nan\n"
    read = read_norms(file(run))
    np.testing.assert_equal(read.norms, [1.5, NAN, INF, NAN])
    assert read.empty == 0
    assert str(read).endswith("4 steps, 0 empty cells, 3 NaN or infinite")
    np.testing.assert_equal(read_norms(file("norm\nnan\nnan\n")).norms, [NAN, NAN])


def test_empty_cells_in_json_lines_are_counted(file):
    lines = '{"step": 1, "grad_norm": 1.5}\n{"step": 1, "eval_loss": 2}\n'
    read = read_norms(file(lines + '{"step": 2, "grad_norm": null}\n'))
    assert (read.norms.tolist(), read.empty) == ([1.5], 2)


@pytest.mark.parametrize("delimiter", [",", "\t", " "])
@pytest.mark.parametrize("size", [3, 60])
def test_a_header_that_a_resumed_run_repeats_is_no_row(file, size, delimiter):
    part = table(
        "step,grad_norm".replace(",", delimiter), enumerate([1.5] * size), delimiter
    )
    read = read_norms(file(part + part))
    assert read.norms.tolist() == [1.5] * 2 * size
    assert read.empty == 0


def test_a_table_of_headers_only_has_an_empty_column(file):
    with pytest.raises(ValueError, match="column 'grad_norm' is empty"):
        read_norms(file("step,grad_norm\n" * 2))


CUT_OFF = {
    "JSON lines": '{"step": 0, "grad_norm": 1.5}\n{"step": 1, "grad_norm": 2.25}\n',
    "CSV": "step,grad_norm,loss\n0,1.5,3.5\n1,2.25,3.5\n",
    "TSV": "step\tgrad_norm\tloss\n0\t1.5\t3.5\n1\t2.25\t3.5\n",
    "table": "step grad_norm loss\n0 1.5 3.5\n1 2.25 3.5\n",
    "MLflow metric": "1732900000000 1.5 0\n1732900000001 2.25 1\n",
}


@pytest.mark.parametrize("kind", CUT_OFF)
def test_a_last_line_that_is_cut_off_is_an_empty_row(file, kind):
    text = CUT_OFF[kind]
    last = text.splitlines()[-1]
    for end in (last[:-4], last[: len(last) // 2]):
        read = read_norms(file(text + end, "grad_norm"))
        assert (read.kind, read.norms.tolist()) == (kind, [1.5, 2.25])
        assert (read.steps.tolist(), read.empty) == ([0, 1], 1)


@pytest.mark.parametrize("method", ["csv", "jsonl"])
def test_a_log_whose_last_line_is_cut_off_is_read(file, tmp_path, method):
    log = ClipLog()
    for norm in NORMS:
        log.record(norm=norm, threshold=2.0)
    getattr(log, f"to_{method}")(tmp_path / "log")
    path = file((tmp_path / "log").read_bytes()[:-7], "log")
    assert getattr(ClipLog, f"from_{method}")(path).norms.tolist() == NORMS[:-1]


def test_a_line_of_json_may_be_cut_off_before_a_resumed_run(file):
    lines = '{"step": 1, "grad_norm": 1.5}\n{"step": 2, "grad_no'
    read = read_norms(file(lines + "\n" + lines))
    assert (read.norms.tolist(), read.empty) == ([1.5, 1.5], 2)
    with pytest.raises(ValueError, match=r"line 2 is not JSON: .* delete that line"):
        read_norms(file(lines + lines))


@pytest.mark.parametrize("delimiter", [",", "\t", " "])
@pytest.mark.parametrize("size", [3, 60])
def test_a_resumed_run_may_have_more_columns(file, size, delimiter):
    rows = [[i, 1.5] for i in range(size)]
    more = [[i, 0.1, 2.25] for i in range(size)]
    first = table(delimiter.join(["step", "grad_norm"]), rows, delimiter)
    second = table(delimiter.join(["step", "lr", "grad_norm"]), more, delimiter)
    read = read_norms(file(first + second))
    assert read.norms.tolist() == [1.5] * size + [2.25] * size
    assert read.steps.tolist() == 2 * list(range(size))
    cells = table("step,grad_norm", rows + more)
    with pytest.raises(ValueError, match=r"must have 2 cells .*names into a line"):
        read_norms(file(cells))


def test_steps_are_counted_if_the_file_has_none(file):
    assert read_norms(file("norm\n3\n1\n")).steps.tolist() == [0, 1]
    gaps = '{"step": 5, "norm": 3}\n{"norm": 1}\n'
    assert read_norms(file(gaps)).steps.tolist() == [0, 1]


def zipped(name):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr(name, "text")
    return data.getvalue()


ERRORS = [
    (b"", "it is empty"),
    (b"\n \n", "it is empty"),
    (b"step,grad_norm\n", "looks like CSV, but column 'grad_norm' is empty"),
    (b"norm\n1\ntwo\n", "looks like CSV, but .* got 'two' in row 2"),
    (b"1 2\n3 4\n", "--column: '1', '2'"),
    (b"PAR1....", "looks like a Parquet file.*to_csv"),
    (b"SQLite format 3\x00", "an SQLite database"),
    (b":W&B\x00\x01", "W&B's own run file"),
    (b"\x80\x04\x95", "a pickle"),
    (b"\x00\x01\x02\x03" * 9, "looks like a binary file"),
    (zipped("xl/workbook.xml"), "a zip archive"),
    (b'{"model": {"layers": 2}}', "looks like JSON, but no column is named"),
    (b'[[1, 2], "a"]', "JSON list must hold"),
    (b'{"norm": 1\n', "looks like JSON, but line 1 is not JSON"),
    (b'{\n"norm": [1, 2]', "looks like"),
    (b"[1, 1.5]\n[2, 2.5]\n", "line 1 must be an object or a number, got '.1, 1.5.'"),
    (gzip.compress(b"norm\n1.5\n" * 9999, mtime=0)[:40], "a gzip file that is damaged"),
    (b"Epoch 1/3\nall is well\n", "text"),
    (b"iter 0: loss 2.5, time 3ms\n", "a text log, .* --column, .*'loss'"),
    (write_array(np.zeros((2, 2, 2))), r"shape \(2, 2, 2\).*numpy.save"),
    (write_array(np.zeros((2, 3))), "looks like NumPy array, but .*'0', '1', '2'"),
    (write_array(np.array(["a"])), "real numbers"),
    (write_array(np.zeros(3, "V2")), r"got \|V2; bfloat16 .*astype\('float32'\)"),
    (b"1,1.5\n2,1.25\n", "2 columns have no names; .*'1', '2'; or write a header"),
    (b"key,value\nloss,2\nlr,1\n", "no column is named as .*: 'loss', 'lr'"),
    (b"tag,value\na/norm,2\nb/grad_norm,1\nc/grad_norm,1\n", "'b/grad_norm', 'c/gr"),
    (b"run,tag,value\na,norm,2\nb,norm,1\n", "'a - norm', 'b - norm'"),
    (
        b'{"run": 0, "tag": "norm", "value": 2}\n'
        b'{"run": 1, "tag": "norm", "value": 1}\n',
        "'0 - norm', '1 - norm'",
    ),
]


@pytest.mark.parametrize(("data", "words"), ERRORS, ids=range(len(ERRORS)))
def test_an_error_says_what_the_file_looks_like_and_the_way_out(file, data, words):
    with pytest.raises(ValueError, match=words):
        read_norms(file(data))


def test_a_log_of_this_package_is_read_with_its_thresholds(tmp_path, capsys):
    log = ClipLog(settings={"policy": "Fixed(2.0)"})
    for norm in NORMS:
        log.record(norm=norm, threshold=2.0)
    log.to_csv(tmp_path / "log.csv")
    log.to_jsonl(tmp_path / "log.jsonl")
    for name in ("log.csv", "log.jsonl"):
        read = read_norms(tmp_path / name)
        assert (read.column, read.norms.tolist(), read.empty) == ("norm", NORMS, 0)


def test_standard_input_is_read(monkeypatch):
    data = io.BytesIO(b'{"norm": 1.5}\nplain text, norm: 2.25\n')
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(data))
    assert read_norms("-").norms.tolist() == [1.5, 2.25]


def test_a_column_behind_very_many_is_found(file):
    names = [*(f"layer{i}" for i in range(10_001)), "grad_norm"]
    read = read_norms(file(table(",".join(names), [range(10_002)] * 2)))
    assert (read.column, read.norms.tolist()) == ("grad_norm", [10_001.0] * 2)


# Folders.


def state_of(norms):
    history = [{"step": i, "grad_norm": n} for i, n in enumerate(norms)]
    return json.dumps({"log_history": history})


FOLDERS = {
    "the newest checkpoint by number": {
        "checkpoint-9/trainer_state.json": state_of(NORMS[:1]),
        "checkpoint-10/trainer_state.json": state_of(NORMS),
    },
    "the state of the run before checkpoints": {
        "checkpoint-10/trainer_state.json": state_of([7.0]),
        "trainer_state.json": state_of(NORMS),
    },
    "the newest version of Lightning": {
        "version_2/metrics.csv": "step,grad_norm\n0,7\n",
        "version_10/metrics.csv": table("step,grad_norm", INDEXED),
    },
    "the only table": {"run.csv": table("step,grad_norm", INDEXED), "notes.md": "a"},
    "the MLflow metric among others": {
        "meta.yaml": "run_id: a",
        "metrics/loss": "1732900000000 7 0\n",
        "metrics/train/grad_norm": "".join(
            f"1732900000000 {n} {s}\n" for s, n in INDEXED
        ),
    },
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_of_a_run_is_read(file, tmp_path, case, capsys):
    for name, content in FOLDERS[case].items():
        file(content, name)
    assert read_norms(tmp_path).norms.tolist() == NORMS
    assert main(["suggest", str(tmp_path)]) == 0
    assert "3 steps, 0 empty cells" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], "holds nothing"),
        (["a.csv", "b.csv"], r"name the file to read\. It holds 'a.csv', 'b.csv'"),
        (["a/events.out.tfevents.1", "b/events.out.tfevents.1"], "2 runs with event"),
        (
            ["metrics/loss", "metrics/lr"],
            r"0 of the MLflow metrics match.*'loss', 'lr'",
        ),
    ],
)
def test_a_folder_without_a_choice_lists_what_it_holds(file, tmp_path, names, words):
    for name in names:
        file("norm\n1\n" if name.endswith("csv") else "1732900000000 7 0\n", name)
    with pytest.raises(ValueError, match=words):
        read_norms(tmp_path)


def test_a_missing_tensorboard_is_named_with_its_extra(file, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    head = (
        b"\x18" + bytes(11) + b"\x09" + bytes(8) + b"\x1a\x0dbrain.Event:2" + bytes(4)
    )
    assert main(["suggest", str(file(head, "events.out.tfevents.1"))]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert 'pip install "autoclip-toolkit[files]"' in err
