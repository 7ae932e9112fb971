"""Every experiment runs as a trial, and the evidence pages show what was saved.

The trials run in this process: starting Python and torch six times would take longer.
"""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
EVIDENCE = ROOT / "docs" / "evidence"
NAMES = [
    "heavy_tails",
    "asymmetric_noise",
    "temporal_order",
    "agc_batch",
    "history_length",
    "speech_losses",
    "language_model",
]


@pytest.fixture
def trial(load, tmp_path, capsys):
    """Return a function that runs an experiment's trial and returns what it saved."""

    def run(name):
        arguments = ["--quick", "--workers", "1", "--output", str(tmp_path)]
        load(name).main(arguments)
        saved = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        printed = capsys.readouterr().out
        for text in saved["tables"].values():
            assert text in printed
        return saved

    return run


def numbers(text):
    """Return the numbers of a Markdown table, without its head and first column."""
    rows = [line.split(" | ")[1:] for line in text.splitlines()[2:]]
    return [
        float(n) for row in rows for n in re.findall(r"-?\d+\.?\d*(?:e.\d+)?", str(row))
    ]


@pytest.mark.needs("plot", "stacks")
@pytest.mark.parametrize("name", NAMES)
def test_a_trial_gives_finite_tables_and_a_picture(trial, name):
    saved = trial(name)
    assert saved["tables"]
    for text in saved["tables"].values():
        cells = numbers(text)
        assert cells
        assert all(map(math.isfinite, cells))
        assert "nan" not in text
        columns = {line.count("|") for line in text.splitlines()}
        assert len(columns) == 1
    assert saved["results"]


@pytest.mark.needs("plot")
def test_quantiles_hold_at_every_noise_scale_and_a_fixed_threshold_does_not(load):
    descend = load("heavy_tails").descend
    of_quantile = descend("quantile 0.5", 0.05, seeds=3, steps=3000).mean(axis=1)
    of_fixed = descend("fixed 3", 0.05, seeds=3, steps=3000).mean(axis=1)
    assert of_quantile.max() / of_quantile.min() < 1.001
    assert of_fixed.max() / of_fixed.min() > 10
    assert of_fixed.min() < 2 * of_quantile.min()  # at the scale that fits it


@pytest.mark.needs("plot")
def test_skewed_noise_biases_a_fixed_quantile_and_a_rising_one_less_and_less(load):
    descend = load("asymmetric_noise").descend
    marks = (400, 6400)
    at_first, at_last = np.median(descend("quantile 0.5", 4, marks), axis=1)
    assert at_last > 0.9 * at_first > 0.5
    at_first, at_last = np.median(descend("rising from 0.5", 4, marks), axis=1)
    assert at_last < 0.7 * at_first


@pytest.mark.needs("plot")
def test_a_temporal_order_sequence_holds_two_marks_that_name_its_class(load):
    task = load("temporal_task")
    x, y = task.make_batch(np.random.default_rng(0), 20, 500)
    symbols = x.argmax(axis=2)
    marks = symbols < 2
    assert (marks.sum(axis=0) == 2).all()
    first, second = (symbols.T[marks.T].reshape(-1, 2)).T
    assert (2 * first + second == y).all()
    assert set(y) == {0, 1, 2, 3}
    assert np.flatnonzero(marks.any(axis=1)).tolist() == [2, 3, 4, 10, 11, 12]


@pytest.mark.needs("plot")
def test_networks_side_by_side_do_what_each_does_alone(load):
    task = load("temporal_order")
    together = task.train("quantile 0.5", 10, (0.02, 0.05), seeds=2, updates=40)
    alone = task.train("quantile 0.5", 10, (0.05,), seeds=2, updates=40)
    np.testing.assert_allclose(together["clip_rate"][1], alone["clip_rate"][0])
    np.testing.assert_allclose(together["largest"][1], alone["largest"][0], rtol=1e-3)
    assert not np.allclose(together["largest"][0], alone["largest"][0], rtol=1e-2)


@pytest.mark.needs("plot", "stacks")
def test_agc_trains_the_batch_size_at_which_no_clipping_fails(load):
    task = load("agc_batch")
    plain, clipped = task.SETTINGS[0], task.SETTINGS[2]
    accuracy = {s: task.final(task.train(s, 256, 0, 40)) for s in (plain, clipped)}
    assert accuracy[plain] < 0.3
    assert accuracy[clipped] > 0.5


@pytest.mark.needs("plot", "stacks")
def test_a_short_history_keeps_the_clip_rate_that_a_long_one_loses(load):
    task = load("history_length")
    median = task.QUANTILES.index(0.5)
    short, whole = (task.train(h, 0.1, 1, 120)["clip_rate"][median] for h in (25, 1600))
    assert whole < short - 0.1


@pytest.mark.needs("plot")
def test_perfect_masks_separate_and_losses_do_not_mind_the_order(load):
    voices, separation, score = map(load, ("voices", "separation", "score"))
    batch = separation.Batch.of(voices.make_mixtures(3, 4, 2000))
    ratio = batch.source_spectra.abs()
    masks = ratio / ratio.sum(dim=1, keepdim=True)
    waves = voices.istft(masks * batch.mixed_spectra.unsqueeze(1), 2000)
    mixed = batch.sources.sum(dim=1, keepdim=True)
    before = score.si_sdr(mixed, batch.sources).mean()
    assert score.si_sdr(waves, batch.sources).mean() > before + 5
    loss = separation.waveform
    flipped = loss(masks.flip(1), None, batch)
    assert float(flipped) == pytest.approx(float(loss(masks, None, batch)), rel=1e-5)


@pytest.mark.needs("plot")
def test_deep_clustering_is_the_distance_of_the_affinities(load):
    voices, separation = map(load, ("voices", "separation"))
    batch = separation.Batch.of(voices.make_mixtures(3, 2, 200))
    torch.manual_seed(0)
    with torch.no_grad():
        _, places = separation.Separator()(batch.mixed_spectra)
    v, y = separation.memberships(places, batch)
    expected = (v @ v.mT - y @ y.mT).square().sum(dim=(1, 2)).mean()
    loss = separation.deep_clustering(None, places, batch)
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.needs("plot")
def test_faults_ruin_sgd_unless_it_clips(load):
    task = load("language_model")
    loss = {
        method: task.train("SGD", 0.3, method, faulty=True, seed=0, steps=60)["loss"]
        for method in ("no clipping", "quantile 0.9")
    }
    assert loss["quantile 0.9"] < 3.0
    assert loss["no clipping"] == math.inf


@pytest.mark.needs("plot")
def test_the_pages_show_the_tables_that_were_saved(load):
    script = load("write_tables")
    pages = {path: path.read_text(encoding="utf-8") for path in script.PAGES}
    for page in pages.values():
        assert script.with_tables(page) == page
    page = pages[EVIDENCE / "diagnosis.md"]
    assert script.with_tables(page.replace(" | ", " | 9")) == page
    summary = EVIDENCE.with_suffix(".md").read_text(encoding="utf-8")
    for name in NAMES:
        details = pages[EVIDENCE / f"{name}.md"]
        assert f"({name}.json)" in details
        assert f"](evidence/{name}.md)" in summary
        assert f"({name}.png)" in details
        assert (EVIDENCE / f"{name}.png").stat().st_size < 80_000


def test_the_interval_of_a_median_covers_as_often_as_it_says(load):
    rng = np.random.default_rng(0)
    median_interval = load("intervals").median_interval
    for n, expected in ((3, 0.75), (6, 0.96875), (20, 0.9586)):
        intervals = [median_interval(rng.standard_cauchy(n)) for _ in range(2000)]
        covered = np.mean([low <= 0 <= high for _, low, high in intervals])
        assert covered == pytest.approx(expected, abs=0.02)
    assert median_interval([1.0, math.nan, 2.0]) == (2.0, 1.0, math.inf)


@pytest.mark.needs("plot")
def test_a_labelled_series_can_be_trained_again(load):
    script, table = load("labelled_series"), load("diagnosis_table")
    stored = {series["name"]: series for series in table.load_series()}
    wanted = "heavy tails", "NaN from step 3"
    cases = script.list_cases([script.KEPT_SEED])
    case = next(c for c in cases if (c.task, c.fault) == wanted)
    run, series = script.train(case), stored[case.name]
    assert (run["label"], run["end"]) == (series["label"], series["end"])
    np.testing.assert_allclose(run["norms"], series["norms"], rtol=1e-3)
    assert series["kept"]


def test_the_tables_of_the_diagnosis_are_those_of_its_results(load):
    table = load("diagnosis_table")
    saved = json.loads((EVIDENCE / "diagnosis.json").read_text(encoding="utf-8"))
    kept = [result for result in saved["results"] if result["kept"]]
    tables = map(str, (table.count_verdicts(kept), table.count_percentiles(kept)))
    assert list(saved["tables"].values())[:2] == list(tables)
    assert len(kept) == 174
