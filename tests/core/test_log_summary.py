"""The summary and the advice of a log, at the limits of each rule."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from autoclip_core import ClipLog, Fixed, decide
from autoclip_core.log.advice import advise_on_rows
from autoclip_core.log.rate_advice import (
    advise_on_rate,
    explain_too_early,
    name_regime,
)
from autoclip_core.log.summary import find_worst_rows, measure_quantiles
from autoclip_core.record.totals import RunTotals

from ..support.log_steps import steps_of

NAN, INF = math.nan, math.inf


# The numbers.


def test_an_empty_log_has_no_numbers():
    summary = ClipLog().summary()
    assert (summary.steps, summary.measured) == (0, 0)
    assert (summary.nonfinite, summary.skipped) == (0, 0)
    assert math.isnan(summary.max_norm)
    assert math.isnan(summary.threshold)
    assert math.isnan(summary.clip_rate)


def test_the_recent_clipping_rate_is_of_the_last_thousand_steps():
    log = ClipLog()
    for step in range(1500):
        norm = NAN if step == 600 else 1.0
        log.record(norm=4.0 if step < 500 else norm, threshold=2.0)
    summary = log.summary()
    assert (summary.recent, summary.recent_clip_rate) == (999, 0.0)
    assert summary.clip_rate == pytest.approx(500 / 1499)
    log.record(norm=4.0, threshold=3.0)
    assert (log.summary().recent, log.summary().threshold) == (999, 3.0)
    assert log.summary().recent_clip_rate == 1 / 999


@pytest.mark.parametrize("scale", [1.0, 1e306])
def test_the_quantiles_of_all_norms(scale):
    """The quantile q of 0 to 100 is 100 q. Norms may be near the largest float."""
    norms = [*(scale * np.arange(101)), NAN, INF]
    store = SimpleNamespace(is_thinned=False)
    steps = steps_of(range(103), 1.0, norm=norms)
    expected = (50 * scale, 90 * scale, 99 * scale)
    assert measure_quantiles(store, steps) == pytest.approx(expected, rel=1e-12)
    assert all(map(math.isnan, measure_quantiles(store, steps[101:])))


def test_the_quantiles_of_a_thinned_log_come_from_the_bins():
    totals = SimpleNamespace(quantile=lambda q: f"the quantile {q}")
    quantiles = measure_quantiles(SimpleNamespace(is_thinned=True, totals=totals), None)
    assert quantiles == ("the quantile 0.5", "the quantile 0.9", "the quantile 0.99")


def test_the_worst_rows_are_the_five_most_clipped_ones():
    rates = np.array([0.1, 0.9, NAN, 0.2, 0.9, 0.0, 0.3, 0.4])
    rows = SimpleNamespace(rates=lambda: rates, names=list("abcdefgh"))
    worst = [("b", 0.9), ("e", 0.9), ("h", 0.4), ("g", 0.3), ("d", 0.2)]
    assert find_worst_rows(rows) == tuple(worst)
    rows = SimpleNamespace(rates=lambda: rates[2:6], names=list("cdef"))
    assert find_worst_rows(rows) == (("e", 0.9), ("d", 0.2))
    assert find_worst_rows(SimpleNamespace(rates=lambda: rates[1:2], names=["b"])) == ()


# The regime.


@pytest.mark.parametrize(
    ("rate", "steps", "start"),
    [
        (0.0, 999, "Inert so far: clip rate 0 % over 999 steps"),
        (0.0, 1000, "Inert: clip rate 0 % over 1000 steps"),
        (0.001, 5000, "Spike filter (0.1 to 2 %): clip rate 0.1 %"),
        (0.02, 5000, "Spike filter (0.1 to 2 %): clip rate 2 %"),
        (0.0201, 5000, "Moderate (2 to 5 %): clip rate 2.01 % over 5000 steps"),
        (0.05, 5000, "Stabiliser (5 to 25 %): clip rate 5 %"),
        (0.25, 5000, "Stabiliser (5 to 25 %): clip rate 25 %"),
        (0.4, 5000, "High (25 to 50 %): clip rate 40 % over 5000 steps"),
        (0.5, 5000, "Normaliser (50 to 100 %): clip rate 50 %"),
        (1.0, 5000, "Normaliser (50 to 100 %): clip rate 100 %"),
    ],
)
def test_the_regime_follows_from_the_rate(rate, steps, start):
    assert name_regime(rate, steps).startswith(start)


def test_a_bound_without_effect_is_not_to_be_lowered():
    assert name_regime(0.0, 1000).endswith("almost no effect, lower it")
    assert name_regime(0.0, 1000, True).endswith("the bound has almost no effect")
    start = "Clip rate 0.1 % over 1000 steps"
    assert name_regime(0.001, 1000, is_update=True) == start


def advice(
    measured=1000, armed=1000, clipped=0.0, armed_clipped=0.0, scale=1.0, **about
):
    totals = RunTotals()
    totals.counts |= {"measured": measured, "armed": armed}
    totals.sums |= {"clipped": clipped, "armed_clipped": armed_clipped}
    totals.sums["scale"] = scale * measured
    return advise_on_rate(totals, **about)


@pytest.mark.parametrize(
    ("policy", "aim"),
    [
        ("Quantile(quantile=0.9, history_length=None)", "A quantile of 0.9 aims at 10"),
        ("QuantileClip(quantile=0.95, scope='global')", "A quantile of 0.95 aims at 5"),
        ("TrustClip(ratio=0.02, quantile=0.9)", "A quantile of 0.9 aims at 10 %."),
        ("Cap(policy=Quantile(quantile=0.9), max_norm=1.0)", None),
        ("Quantile(quantile=0.9, max_threshold=3.0)", None),
        ("TrustClip()", None),
        ("Fixed(max_norm=1.0)", None),
        ("", None),
    ],
)
def test_a_rate_between_the_regimes_is_compared_with_that_of_the_quantile(policy, aim):
    settings = {"policy": policy}
    [sentence] = advice(clipped=47, scale=0.97, settings=settings)
    start = "Moderate (2 to 5 %): clip rate 4.7 % over 1000 steps, mean scale 0.97."
    assert sentence.startswith(start)
    assert sentence.removeprefix(start).startswith(f" {aim}" if aim else "")
    assert ("aims" in sentence) == (aim is not None)
    assert "aims" not in advice(clipped=100, settings=settings)[0]
    [sentence] = advice(clipped=47, settings=settings, is_update=True)
    assert sentence == "Clip rate 4.7 % over 1000 steps, mean scale 1."


@pytest.mark.parametrize(
    ("clipped", "scale", "start"),
    [
        (500, 0.3, None),
        (501, 0.9, "A bound that acts in most steps is normal"),
        (1000, 0.3, "A bound that acts in most steps is normal"),
        (1000, 0.2999, "The bound sets the size of most steps"),
        (100, 0.2999, "The bound sets the size of most steps"),
        (0, NAN, None),
    ],
)
def test_only_the_mean_scale_says_whether_a_bound_acts_too_much(clipped, scale, start):
    first, *rest = advice(clipped=clipped, scale=scale, is_update=True)
    assert not first.startswith(("High", "Normaliser"))
    assert [start and s.startswith(start) for s in rest] == [True] * (start is not None)


def test_with_several_rows_each_clip_rate_is_of_the_rows():
    about = {"clipped": 600, "armed_clipped": 225, "has_several_rows": True}
    first, high, armed = advice(armed=899, **about)
    assert "clip rate 60 % of the rows over 1000 steps" in first
    assert high.startswith("Clip rate 60 % of the rows is above 50 %")
    assert armed.endswith("the clip rate is 25 % of the rows.")
    settings = {"clipper": "NormClip(max_norm=1.0, dry_run=True)"}
    [_, dry, _] = advice(armed=899, settings=settings, **about)
    assert "60 % of the rows would be clipped" in dry
    [bound, _] = advice(is_update=True, clipped=600, has_several_rows=True)
    assert bound.startswith("Clip rate 60 % of the rows over 1000 steps")


def test_advice_reports_a_high_rate():
    assert len(advice(clipped=500)) == 1
    assert "rate 50.1 % is above 50 %" in advice(clipped=501)[1]
    assert len(advice(armed=900)) == 1
    [_, sentence] = advice(armed=899, armed_clipped=899 / 4)
    assert sentence.startswith("101 of 1000 steps had no threshold; over the other 899")
    assert sentence.endswith("the clip rate is 25 %.")


@pytest.mark.parametrize(
    ("measured", "armed", "steps", "start"),
    [
        (4, 3, 200, "Stabiliser (5 to 25 %): clip rate 10 % over 200 steps, mean sc"),
        (4, 1, 200, "Too early to judge: 50 of 200 steps had a threshold"),
        (4, 0, 200, "Nothing could be clipped: in all 200 steps"),
        (200, 150, 200, "Stabiliser (5 to 25 %): clip rate 10 % over 200 steps, mean"),
    ],
)
def test_the_rate_of_metrics_is_of_all_steps(measured, armed, steps, start):
    logged = {"clip_rate": 0.1, "steps": steps}
    sums = {"clipped": 1.0, "armed_clipped": 1.0}
    first = advice(measured, armed, **sums, scale=0.9, logged=logged)[0]
    assert first.startswith(start)
    assert ("over 4 recorded steps" in first) == (start[0] == "S" and measured == 4)


def test_a_hundred_steps_with_a_threshold_are_enough():
    """A policy has no threshold in the first step, so 100 steps have 99."""
    [sentence] = advice(measured=99, armed=99)
    assert sentence.startswith("Too early to judge: 99 steps had a finite norm; a")
    assert sentence.endswith("a clip rate needs at least 100.")
    [sentence] = advice(armed=89)
    assert sentence.startswith("Too early to judge: 89 of 1000 steps had a threshold;")
    assert sentence.endswith("a clip rate needs at least 90.")
    for armed in (90, 99):
        [sentence] = advice(measured=100, armed=armed)
        assert sentence.startswith("Inert so far")
    assert explain_too_early(100, 0).startswith("Nothing could be clipped: in all 100")
    assert explain_too_early(99, 0).startswith("Too early to judge: 99 steps")
    assert explain_too_early(100, 1).startswith("Too early to judge: 1 of 100 steps")


# The rows.


@pytest.mark.parametrize(
    ("clips", "start"),
    [
        ([100], None),
        ([50, 50], None),
        ([51, 48], None),
        ([499, 501], "One row has 50.1 % of the 1000 clips of 2 rows: row 1."),
        ([49, 51], "One row has 51 % of the 100 clips of 2 rows: row 1."),
        ([20, 90, 40], "One row has 60 % of the 150 clips of 3 rows: row 1."),
    ],
    ids=str,
)
def test_advice_names_a_row_with_most_of_the_clips(clips, start):
    names = [f"row {place}" for place in range(len(clips))]
    rows = SimpleNamespace(clips=lambda: np.array(clips), names=names)
    sentences = advise_on_rows(rows)
    assert [s.startswith(start) for s in sentences] == ([True] if start else [])


def test_the_summary_fits_80_columns_and_shows_escape_sequences():
    names = [f"\x1b[31mmodel.layers.{i}.self_attn.q_proj.weight" for i in range(9)]
    log = ClipLog(names)
    norm = np.full(9, 4.0, np.float32)
    for _ in range(200):
        log.record(decide(Fixed(1.0), Fixed(1.0).init(9), norm)[1])
    text = str(log.summary())
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text
    assert "\\x1b[31mmodel.layers.0" in text
