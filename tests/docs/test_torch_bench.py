"""The benchmarks run and save complete numbers; their values are not tested."""

import json
import math
import pathlib
import sys

import pytest
import torch

from ..support.trials import marks, numbers, trial


@pytest.fixture(autouse=True)
def _threads():
    """Use one thread; afterwards, restore the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_trial_run_saves_results_tables_and_a_plot(
    scripts, monkeypatch, tmp_path, capsys
):
    saved = trial("run", tmp_path, monkeypatch)
    assert saved["machine"]["processor"]
    names = {line.split("  ")[0] for line in capsys.readouterr().out.splitlines()}
    assert {"clip_grad_norm_", "NormClip", "AGC, per unit"} <= names
    regimes = {"nothing clipped", "all clipped"}
    assert {result["regime"] for result in saved["results"]} == regimes
    for result in saved["results"]:
        for kind in ("milliseconds", "ratio"):
            low, median, high = (result[kind][k] for k in ("low", "median", "high"))
            assert 0 < low <= median <= high
    from picture import draw
    from tables import make_tables

    assert set(make_tables(saved)) == {"ratios"} <= set(marks())
    draw(tmp_path / "bench.png", saved["results"])
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_a_script_stops_first_if_it_cannot_save(scripts, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        trial("run", pathlib.Path("no-such-folder"), monkeypatch)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "no-such-folder" in captured.err


@pytest.mark.parametrize(
    ("script", "results", "on_pages"),
    [
        ("fused", "results", set()),
        ("share", "milliseconds", {"share", "fixed cost"}),
        ("trust", "results", {"TrustClip"}),
        ("memory", "peak_bytes_of_torch_and_of_python", set()),
        ("growth", "steps", set()),
        ("fixed_cost", "microseconds", set()),
        ("log_cost", "microseconds_per_record", set()),
        ("startup", "results", {"startup"}),
    ],
)
def test_every_script_has_a_trial_and_saves_its_numbers(
    script, results, on_pages, scripts, monkeypatch, tmp_path, capsys
):
    saved = trial(script, tmp_path, monkeypatch)
    assert saved["machine"]["processors"] >= 1
    measured = [number for number in numbers(saved[results]) if number is not None]
    assert len(measured) > 3
    assert all(number >= 0 for number in measured)
    printed = capsys.readouterr().out
    assert str(tmp_path) in printed
    import tables

    made = tables.make_tables(saved)
    assert set(made) & set(marks()) == on_pages
    for rows in made.values():
        assert {len(row) for row in rows} == {len(rows[0])}
        assert rows[-1][0] in printed


def test_a_contender_that_leaves_a_wrong_norm_is_not_timed(scripts):
    from checked import measure
    from contenders import Contender, make_contenders
    from models import make_parameters, set_gradients, tiny

    parameters = make_parameters(tiny())
    set_gradients(parameters, 1.0)
    reference = make_contenders(parameters)[0]

    def halve():
        reference.step()
        torch._foreach_mul_([p.grad for p in parameters], 0.5)

    with pytest.raises(RuntimeError, match="halves left a norm of"):
        measure([reference, Contender("halves", halve)], parameters, 100.0, 0.0)


def test_a_contender_that_stops_clipping_is_not_reported(scripts):
    from checked import measure
    from contenders import Contender, make_contenders
    from models import make_parameters, set_gradients, tiny
    from timing import LEAST_ROUNDS

    parameters = make_parameters(tiny())
    set_gradients(parameters, 1.0)
    reference = make_contenders(parameters)[0]
    steps = []

    def give_up():
        steps.append(1)
        if len(steps) <= LEAST_ROUNDS + 1:  # one step before the rounds
            reference.step()

    with pytest.raises(RuntimeError, match="gives up should have clipped all"):
        measure([reference, Contender("gives up", give_up)], parameters, 100.0, 0.0)


def test_the_gpu_script_can_measure_on_the_cpu(scripts, monkeypatch, tmp_path, capsys):
    """The parts that need no CUDA run on the CPU, with a small decoder."""
    import gpu
    from tables import make_tables

    sizes = [sum(map(math.prod, shapes())) / 1e6 for shapes in gpu.MODELS.values()]
    assert sizes == pytest.approx([124, 1000], rel=0.02)
    saved = trial("gpu", tmp_path, monkeypatch, "--device", "cpu")
    size = 50 * 16 + 8 * 16 + 2 * (12 * 256 + 13 * 16) + 32
    for dtype, width, of_agc in (("float32", 4, 14), ("bfloat16", 2, 22)):
        regimes = saved["results"]["tiny"][dtype]
        assert list(regimes) == ["nothing clipped", "all clipped"]
        for parts in regimes.values():
            ways = {line["contender"]: line for line in parts["clip"]}
            assert ways["clip_grad_norm_"]["ratio"]["median"] == 1.0
            assert ways["AGC, per unit"]["bytes"] == of_agc * width * size
            assert ways["NormClip"]["bytes"] == 5 * width * size
            for kind in ("fused", "foreach"):
                names = [line["contender"] for line in parts[kind]]
                assert names[0] == f"AdamW, {kind}"
                assert {"NormClip, attached", "TrustClip"} <= set(names)
    tables = make_tables(saved)
    assert len(tables) == 6
    assert tables["tiny, bfloat16, clip"][2][0] == "NormClip"
    assert "tiny, float32, foreach" in capsys.readouterr().out
    assert gpu.Way("with the kernel", print, 1, 5).in_graph == 5
    assert gpu.Way("without one", print, 3).in_graph == 3


@pytest.mark.parametrize(
    ("regime", "is_clipped"), [("nothing clipped", False), ("all clipped", True)]
)
def test_the_gpu_script_clips_nothing_or_all(regime, is_clipped, scripts):
    import gpu
    from models import set_gradients
    from regimes import REGIMES

    device = torch.device("cpu")
    for dtype in gpu.TYPES:
        parameters = gpu.make_parameters(gpu.decoder(16, 1, 50, 8), device, dtype)
        for name, clipper in gpu.make_clippers(parameters, regime).items():
            for _ in range(3):
                set_gradients(parameters, REGIMES[regime])
                clipped = clipper.step().clipped
                assert (clipped == is_clipped).all(), (name, dtype)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_cuda_device_the_gpu_script_says_that_it_measures_nothing(
    scripts, monkeypatch, tmp_path, capsys
):
    import gpu

    path = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--json", str(path)])
    gpu.main()
    assert "not measured" in capsys.readouterr().out
    assert json.loads(path.read_text())["measured"] is False


# The tables.


def line(contender, low, median, high, kind="ours", regime="all clipped"):
    ratio = {"low": low, "median": median, "high": high}
    line = {"contender": contender, "model": "GPT", "regime": regime, "kind": kind}
    return line | {
        "rounds": 7,
        "ratio": ratio,
        "milliseconds": {"median": 2.5 * median},
    }


def test_a_table_shows_medians_and_quartiles_of_the_contenders_on_the_page(scripts):
    import layout
    import tables

    lines = [
        line("clip_grad_norm_", 1.0, 1.0, 1.0, kind="reference"),
        line("the same again", 0.1, 0.2, 0.3, kind="reference"),
        line("NormClip", 0.4, 0.5, 0.6),
        line("smartclip", 0.45, 0.75, 1.25, kind="theirs"),
    ]
    assert layout.markdown(tables.ratios(lines)).splitlines() == [
        "|  | GPT |",
        "| --- | --- |",
        "| clip_grad_norm_ | 2.50\N{NO-BREAK SPACE}ms |",
        "| NormClip | 0.50 (0.40–0.60) |",
        "| smartclip | 0.75 (0.45–1.25) |",
    ]


def test_the_table_of_all_contenders_has_the_medians_of_both_regimes(scripts):
    import tables

    nothing = [
        line("clip_grad_norm_", 1.0, 1.0, 1.0, "reference", "nothing clipped"),
        line("NormClip", 0.4, 0.5, 0.6, "ours", "nothing clipped"),
        line("drawn only", 0.4, 0.5, 0.6, "ours", "nothing clipped"),
    ]
    clipped = [line("clip_grad_norm_", 1.0, 1.0, 1.0), line("NormClip", 1.0, 1.1, 1.2)]
    rows = tables.make_tables({"script": "run", "results": [*nothing, *clipped]})
    assert rows["ratios"] == [
        ["nothing clipped, all clipped", "GPT"],
        ["clip_grad_norm_", "2.50\N{NO-BREAK SPACE}ms, 2.50\N{NO-BREAK SPACE}ms"],
        ["NormClip", "0.50, 1.10"],
    ]


def test_tables_are_written_between_their_marks_and_other_text_stays(scripts):
    import page

    before = (
        "a\n<!-- table: one -->\n\nold\n\n<!-- end of table -->\nb\n"
        "<!-- table: two -->\n\n<!-- end of table -->\nc\n"
        "<!-- table: three -->\n\nkept\n\n<!-- end of table -->\n"
    )
    tables = {"one": [["x"], ["1"]], "two": [["y"], ["2"]]}
    after = page.put_between_marks(before, tables)
    assert after == (
        "a\n<!-- table: one -->\n\n| x |\n| --- |\n| 1 |\n\n<!-- end of table -->\nb\n"
        "<!-- table: two -->\n\n| y |\n| --- |\n| 2 |\n\n<!-- end of table -->\nc\n"
        "<!-- table: three -->\n\nkept\n\n<!-- end of table -->\n"
    )
    assert page.put_between_marks(after, tables) == after


def test_results_of_two_machines_are_not_combined(scripts):
    import page

    about = {"processor": "one", "python": "3.11"}
    log = {"script": "log_cost", "machine": about}
    assert page.all_tables([log]) == {"machine": [list(about), list(about.values())]}
    with pytest.raises(SystemExit, match="of different processors"):
        page.all_tables([log, log | {"machine": about | {"processor": "two"}}])


def test_the_share_of_a_step_has_rows_of_all_frameworks(scripts):
    import page
    import shares

    steps = {"no clipping": [0.03, 0.04, 0.06], "optax": [0.04, 0.08, 0.12]}
    of_jax = shares.find_shares(steps, {"fixed clip": ["optax"], "AGC": ["agc"]})
    steps |= {"nothing": [0.04, 0.04, 0.06], "all": [0.05, 0.05, 0.08]}
    of_torch = shares.find_shares(steps, {"TrustClip": ["nothing", "all"]})
    about = {"machine": {"processor": "one"}, "results": [], "threads": 2}
    keras = {"LSTM": of_jax, "one layer": of_jax}
    keras = about | {"script": "keras_steps", "shares": keras}
    torchs = about | {"script": "share", "shares": {"GPT": of_torch}}
    tables = page.all_tables([keras, torchs])
    head, *rows = tables["share"]
    assert head[:3] == ["nothing clipped, all clipped", "a step", "fixed clip"]
    assert rows == [  # 1 - 4/4, 1 - 4/5; 1 - 4/8
        ["PyTorch, GPT", "40\N{NO-BREAK SPACE}ms", "", "0.0, 25.0", "", "", ""],
        ["Keras, LSTM", "40\N{NO-BREAK SPACE}ms", "50.0", "", "", "", ""],
    ]
    [_, added] = tables["fixed cost"]
    assert added == ["Keras", "40000", "", "", "", ""]


def test_files_of_one_framework_leave_the_tables_of_all(scripts, monkeypatch, tmp_path):
    import page

    (tmp_path / "details").mkdir()
    written = tmp_path / "details" / "cost.md"
    text = "<!-- table: {} -->\n\n| kept |\n| --- |\n\n<!-- end of table -->\n"
    names = ("machine", "ratios", "share")
    written.write_text("".join(map(text.format, names)))
    monkeypatch.setattr(page, "DOCS", tmp_path)
    one = {"machine": [["torch"], ["2.13"]], "ratios": [["x"], ["1"]]}
    one["share"] = [["share"], ["2"]]
    page.write(one)
    assert written.read_text().count("kept") == 2
    every = [["torch", "jax", "keras"], ["2.13", "0.10", "3.15"]]
    page.write(one | {"machine": every})
    assert "| 2.13 | 0.10 | 3.15 |" in written.read_text()


def test_a_trial_is_not_written_to_the_docs(scripts, monkeypatch, tmp_path):
    import page

    trial("log_cost", tmp_path, monkeypatch)
    monkeypatch.setattr(page, "DOCS", tmp_path)
    argv = ["page.py", "--write", str(tmp_path / "log_cost.json")]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit, match="were only tried"):
        page.main()


@pytest.mark.parametrize(
    ("code", "tolerance"),
    [
        ("Quantile(history_length=100)", 0.0),
        ("MeanStd(history_length=100)", 0.0),
        ("EmaRatio()", 1e-6),
        ("ZScore()", 1e-6),
        ("StreamingQuantile()", 0.05),  # its threshold moves in steps of this size
    ],
)
def test_the_last_norms_give_the_state_of_a_whole_run(code, tolerance, scripts):
    """A policy with a bounded history runs over the last norms only."""
    import numpy as np

    import growth

    policy, steps = growth.policy_of(code), growth.LAST_NORMS + 2000
    whole, _ = growth.run(policy, policy.init(1), growth.draw(steps))
    late, times = growth.run(policy, policy.init(1), growth.norms_until(policy, steps))
    assert len(times) == growth.LAST_NORMS
    assert growth.bytes_of(whole) == growth.bytes_of(late)
    actual, expected = (policy.limit(state).threshold for state in (late, whole))
    np.testing.assert_allclose(actual, expected, rtol=tolerance)


@pytest.mark.parametrize("name", ["Quantile", "MeanStd"])
def test_a_policy_with_an_unbounded_history_runs_over_all_norms(name, scripts):
    import growth

    policy = growth.policy_of(f"{name}(history_length=None)")
    assert len(growth.norms_until(policy, 12_000)) == 12_000


def test_a_state_of_one_row_is_repeated_for_many_rows(scripts):
    import numpy as np

    import growth

    policy, norms = growth.policy_of("Quantile(history_length=None)"), growth.draw(1500)
    one, _ = growth.run(policy, policy.init(1), norms)
    three, _ = growth.run(policy, policy.init(3), norms.repeat(3, axis=1))
    copied = growth.repeated(one, 3)
    assert growth.bytes_of(copied) == growth.bytes_of(three) == 3 * growth.bytes_of(one)
    np.testing.assert_array_equal(
        policy.limit(copied).threshold, policy.limit(three).threshold
    )
