"""The log of a run: what a step stores, the summary, the advice, the plot.

The standard library computes the expected numbers from plain Python lists.
"""

import json
import math
import statistics
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import autoclip_core.record.store
from autoclip_core import ClipLog, Drop, Fixed, Quantile, decide
from autoclip_core.clipper.metrics import (
    compute_metrics,
    compute_row_metrics,
    count_step,
    empty_tally,
)

NAN, INF = math.nan, math.inf


def rows(norm, threshold, *, finite=None, **more):
    """Return a decision of these rows by the rule s = T/n; `more` adds fields."""
    scale = [t / n if n > t else 1.0 for n, t in zip(norm, threshold, strict=True)]
    clipped = [n > t for n, t in zip(norm, threshold, strict=True)]
    finite = [math.isfinite(n) for n in norm] if finite is None else finite
    fields = dict(norm=norm, threshold=threshold, scale=scale, clipped=clipped)
    fields |= dict(finite=finite) | more
    return SimpleNamespace(**{k: np.asarray(v) for k, v in fields.items()})


def log_of(norms, threshold=2.0):
    log = ClipLog()
    for norm in norms:
        log.record(norm=norm, threshold=threshold)
    return log


def log_with_clips(steps, clipped):
    """Return a log of `steps` steps; `clipped` of them, evenly spread, are halved."""
    at = {round(i * steps / clipped) for i in range(clipped)} if clipped else set()
    return log_of(4.0 if step in at else 1.0 for step in range(steps))


# What a step stores.


def test_the_scale_of_plain_numbers_is_computed():
    log = log_of([3.2, 0.5, 1.0, 0.0], threshold=1.0)
    assert log.norms.tolist() == [3.2, 0.5, 1.0, 0.0]
    assert log.thresholds.tolist() == [1.0] * 4
    assert log.scales.tolist() == [1 / 3.2, 1.0, 1.0, 1.0]
    assert log.clipped.tolist() == [1.0, 0.0, 0.0, 0.0]
    assert log.finite.tolist() == [True] * 4
    assert len(log) == 4


def test_scale_and_clipped_may_be_given():
    log = ClipLog()  # a value clip: the threshold is not a norm
    log.record(norm=5.0, threshold=0.1, scale=0.7, clipped=False)
    assert (log.scales[0], log.clipped[0]) == (0.7, 0.0)


def test_a_non_finite_number_is_a_non_finite_step():
    log = log_of([NAN, INF, 1.0])
    assert log.finite.tolist() == [False, False, True]
    assert np.array_equal(log.norms, [NAN, INF, 1.0], equal_nan=True)
    assert np.array_equal(log.scales, [NAN, NAN, 1.0], equal_nan=True)
    assert log.clipped.tolist() == [0.0, 0.0, 0.0]


def test_the_rows_of_a_step_are_combined():
    log = ClipLog()
    log.record(rows([3.0, 4.0, 12.0, 0.0], [5.0, 2.0, 6.0, INF]))
    assert log.norms[0] == pytest.approx(math.hypot(3, 4, 12, 0))
    assert log.thresholds[0] == 5.0  # the median of 2, 5, 6
    assert log.scales[0] == pytest.approx(math.hypot(3, 2, 6, 0) / 13)
    assert log.clipped[0] == 0.5
    assert log.finite[0]


def test_a_row_that_was_not_observed_is_ignored():
    log = ClipLog()
    log.record(rows([3.0, NAN, 4.0], [2.0, 9.0, 9.0], finite=[True] * 3))
    assert log.norms[0] == 5.0
    assert log.clipped[0] == 0.5
    assert log.finite[0]
    assert log.summary().nonfinite == 0


def test_a_step_without_an_observed_row_is_not_non_finite():
    log = ClipLog()
    log.record(rows([NAN, NAN], [1.0, 1.0], finite=[True, True]))
    summary = log.summary()
    assert math.isnan(log.norms[0])
    assert (summary.steps, summary.measured, summary.nonfinite) == (1, 0, 0)


@pytest.mark.parametrize("bad", [NAN, INF])
def test_the_norm_excludes_a_non_finite_row(bad):
    log = ClipLog()
    log.record(rows([3.0, bad, 4.0], [2.0, 2.0, 9.0], finite=[True, False, True]))
    assert log.norms[0] == 5.0
    assert log.scales[0] == pytest.approx(math.hypot(2, 4) / 5)
    assert log.clipped[0] == pytest.approx(1 / 3)  # of three observed rows
    assert not log.finite[0]


def test_a_row_is_finite_if_the_decision_says_so():
    log = ClipLog()
    log.record(rows([3.0, 7.0, 4.0], [9.0] * 3, finite=[True, False, True]))
    assert log.norms[0] == 5.0
    assert not log.finite[0]


def test_norms_whose_squares_overflow_stay_finite():
    big = np.float32(3e38)
    log = ClipLog()
    decision = rows([big, big], [1.0, 1.0])
    decision.norm = decision.norm.astype(np.float32)
    log.record(decision)
    log.record(norm=1e300, threshold=1e299)
    log.record(rows([5e-320, 0.0], [1.0, 1.0]))
    assert log.norms == pytest.approx([math.hypot(big, big), 1e300, 5e-320])
    assert log.scales[0] == pytest.approx(math.hypot(1, 1) / math.hypot(big, big))


def test_a_step_of_20_000_rows_follows_the_formulas():
    rng = np.random.default_rng(0)
    norms = np.exp(rng.normal(size=20_000)).astype(np.float32)
    limits = np.exp(rng.normal(size=20_000)).astype(np.float32)
    log = ClipLog()
    log.record(rows(norms, limits))
    n, t = norms.astype(float).tolist(), limits.astype(float).tolist()
    before = math.sqrt(math.fsum(x * x for x in n))
    after = math.sqrt(math.fsum(min(x, y) ** 2 for x, y in zip(n, t, strict=True)))
    clips = sum(x > y for x, y in zip(n, t, strict=True))
    assert log.norms[0] == pytest.approx(before)
    assert log.scales[0] == pytest.approx(after / before, rel=1e-6)
    assert log.thresholds[0] == statistics.median(t)
    assert log.clipped[0] == pytest.approx(clips / 20_000)


@given(
    st.lists(
        st.tuples(st.floats(0, 1e38), st.floats(1e-30, 1e38) | st.just(INF)),
        min_size=1,
        max_size=8,
    )
)
def test_any_finite_rows_follow_the_formulas(pairs):
    norms, limits = map(list, zip(*pairs, strict=True))
    log = ClipLog()
    log.record(rows(norms, limits))
    known = [t for t in limits if t < INF]
    before = math.hypot(*norms)
    after = math.hypot(*map(min, norms, limits))
    assert log.norms[0] == pytest.approx(before)
    assert log.scales[0] == pytest.approx(after / before if before else 1.0)
    assert log.thresholds[0] == pytest.approx(statistics.median(known or [INF]))


@given(st.floats(1e-30, 1e38), st.floats(0, 1))
def test_one_row_stores_norm_and_scale_exactly(norm, scale):
    log = ClipLog()
    log.record(norm=norm, threshold=1.0, scale=scale)
    assert (log.norms[0], log.scales[0]) == (norm, scale)


def test_a_0_dim_array_is_a_number():
    log = ClipLog()
    log.record(norm=np.array(3.0, np.float32), threshold=np.float64(1.5))
    fields = dict(norm=3.0, threshold=1.5, scale=0.5, clipped=True, finite=True)
    log.record(SimpleNamespace(**{k: np.array(v) for k, v in fields.items()}))
    log.record(norm=np.array([[3.0]]), threshold=[1.5], clipped=True)
    assert log.scales.tolist() == [0.5, 0.5, 0.5]
    assert log.clipped.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.needs("torch")
def test_tensors_on_the_cpu_are_read():
    import torch

    decision = rows([3.0, 4.0], [9.0, 2.0])
    tensors = {k: torch.as_tensor(v) for k, v in vars(decision).items()}
    log = ClipLog()
    log.record(SimpleNamespace(**tensors))
    log.record(norm=torch.tensor(3.0), threshold=1.0)
    log.record(norm=torch.tensor(4.0, requires_grad=True), threshold=1.0)
    assert log.norms.tolist() == [5.0, 3.0, 4.0]


def test_decisions_of_the_core_are_read():
    policy, log = Quantile(0.5, history_length=4), ClipLog()
    state = policy.init(rows=1)
    for norm in [1.0, 3.0, NAN, 8.0]:
        state, decision = decide(policy, state, [norm])
        log.record(decision)
    assert log.thresholds.tolist() == [INF, 1.0, 2.0, 2.0]
    assert log.clipped.tolist() == [0.0, 1.0, 0.0, 1.0]
    assert log.finite.tolist() == [True, True, False, True]


def test_cancelled_updates_are_counted():
    policy, log = Drop(Fixed(2.0), action="skip"), ClipLog()
    for norms in [[1.0, 1.0], [1.0, 3.0]]:
        log.record(decide(policy, policy.init(rows=2), norms)[1])
    assert log.skipped.tolist() == [False, True]
    assert log.summary().skipped == 1


def test_dropped_steps_are_counted(tmp_path):
    """A dropped row is not scaled to the threshold; the scale of its step is 0."""
    for rows in (1, 2):
        policy, log = Drop(Fixed(9.0), clip=Fixed(2.0)), ClipLog()
        for norm in [1.0, 4.0, 10.0, 20.0]:
            _, decision = decide(policy, policy.init(rows), [norm] * rows)
            log.record(decision)
        assert log.scales.tolist() == [1.0, 0.5, 0.0, 0.0]
        assert log.summary().dropped == 2
        assert "dropped steps     2" in str(log.summary())
        log.to_jsonl(tmp_path / "log.jsonl")
        assert ClipLog.from_jsonl(tmp_path / "log.jsonl").summary().dropped == 2
    log = ClipLog()
    log.record(norm=1.0, threshold=2.0)
    assert log.summary().dropped == 0
    log.record({"clip/norm": 1.0, "clip/threshold": 2.0, "clip/dropped_total": 7})
    assert log.summary().dropped == 7


def test_the_store_grows_without_losing_steps():
    norms = [float(i % 977) for i in range(5000)]
    log = log_of(norms)
    assert log.norms.tolist() == norms
    assert log.norms.itemsize == log.scales.itemsize == 8
    assert autoclip_core.record.store.STEP.itemsize == 48


def test_the_columns_cannot_be_written():
    log = log_of([1.0])
    with pytest.raises(ValueError, match="read-only"):
        log.norms[0] = 2.0
    log.record(norm=2.0, threshold=1.0)
    assert log.norms.tolist() == [1.0, 2.0]


# Bad input.

GOOD = dict(norm=[1.0, 2.0], threshold=[1.0, 1.0])


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "words"),
    [
        ((), {}, ValueError, "needs a decision, or both norm and threshold.*nothing"),
        ((), {"norm": 1.0}, ValueError, "got norm; .*threshold=float"),
        ((), {"threshold": 1.0}, ValueError, "got threshold"),
        ((), {"norm": -1.0, "threshold": 1.0}, ValueError, "norm must be >= 0.*-1"),
        ((), {"norm": 1.0, "threshold": -2.0}, ValueError, "threshold must be >= 0"),
        ((), {"norm": 1, "threshold": 1, "scale": -0.5}, ValueError, "scale must be"),
        ((), {"norm": 1, "threshold": 1, "clipped": 2}, ValueError, r"in \[0, 1\].*2"),
        ((), {"norm": 1, "threshold": 1, "clipped": NAN}, ValueError, "clipped.*nan"),
        ((), {"norm": "1.0", "threshold": 1.0}, TypeError, "norm must be real.*str"),
        ((), {"norm": 1j, "threshold": 1.0}, TypeError, "norm must be real.*complex"),
        ((), {"norm": [1.0, 2.0], "threshold": 1.0}, ValueError, "must be one number"),
        (({"clip/steps": [1, 1]},), {}, ValueError, r"got \[1, 1\].*: x\[0\], metrics"),
        ((rows(**GOOD),), {"norm": 1.0}, ValueError, "a decision and norm; leave"),
        ((3.2,), {}, TypeError, "got a float without norm.*norm=..., threshold=..."),
        (({"norm": 1.0},), {}, TypeError, "got a dict without clip/norm"),
        ((SimpleNamespace(norm=1.0),), {}, TypeError, "without threshold, scale"),
        ((rows([-1.0], [1.0]),), {}, ValueError, "norm must be >= 0, got -1"),
        ((rows(**GOOD, skipped=[True]),), {}, ValueError, "skipped.*one entry per row"),
        ((rows(**GOOD, finite=[True]),), {}, ValueError, r"shape.*'finite': \(1,\)"),
        ((rows(**GOOD, clipped=[[True, True]]),), {}, ValueError, r"\(1, 2\)"),
    ],
)
def test_the_error_names_bad_input_and_changes_nothing(args, kwargs, error, words):
    log = log_of([1.0, 3.0])
    before = str(log.summary())
    with pytest.raises(error, match=words):
        log.record(*args, **kwargs)
    assert str(log.summary()) == before


# Summary and advice.


def test_the_summary_reports_these_numbers():
    norms = [1.0, 8.0, NAN, 4.0, 0.0, INF, 3.0]
    summary = log_of(norms, threshold=4.0).summary()
    finite = [1.0, 8.0, 4.0, 0.0, 3.0]
    assert summary.steps == 7
    assert summary.measured == 5
    assert summary.clip_rate == 1 / 5
    assert summary.mean_scale == statistics.fmean([1, 0.5, 1, 1, 1])
    assert summary.mean_norm == statistics.fmean(finite)
    assert summary.max_norm == max(finite)
    assert summary.nonfinite == 2
    assert summary.skipped == 0
    assert summary.threshold == 4.0


def test_a_step_of_several_rows_counts_as_a_fraction():
    log = ClipLog()
    log.record(rows([1.0, 1.0, 1.0, 9.0], [2.0] * 4))
    log.record(rows([9.0, 9.0, 1.0, 9.0], [2.0] * 4))
    assert log.summary().clip_rate == pytest.approx((1 / 4 + 3 / 4) / 2)


def test_the_summary_prints_these_lines():
    text = str(log_of([4.0, *[1.0] * 9] * 20 + [NAN]).summary())
    assert text.splitlines()[:9] == [
        "total steps       201 (200 with a finite norm)",
        "clip rate         10 % (10 % over the last 200)",
        "mean scale        0.95",
        "mean norm         1.3",
        "norm quantiles    median 1, p90 1.3, p99 4",
        "max norm          4",
        "threshold now     2",
        "non-finite steps  1",
        "skipped steps     0",
    ]
    assert "threshold now     none" in str(log_of([1.0], threshold=INF).summary())


def test_a_summary_cannot_be_changed():
    with pytest.raises(AttributeError):
        log_of([1.0]).summary().steps = 5


@pytest.mark.parametrize("steps", [0, 1, 99])
def test_below_100_steps_it_is_too_early_to_judge(steps):
    summary = log_of([3.0] * steps).summary()
    assert len(summary.advice) == 1
    assert summary.advice[0].startswith("Too early to judge")
    assert f"{steps} steps" in summary.advice[0]
    assert "100" in summary.advice[0]
    assert "Too early" in str(summary)


@pytest.mark.parametrize(
    ("steps", "clipped", "regime", "rate"),
    [
        (200, 0, "Inert so far", "0 %"),
        (10_000, 0, "Inert:", "0 %"),
        (10_000, 9, "Inert:", "0.09 %"),
        (10_000, 10, "Spike filter (0.1 to 2 %)", "0.1 %"),
        (10_000, 200, "Spike filter", "2 %"),
        (10_000, 201, "Moderate (2 to 5 %)", "2.01 %"),
        (10_000, 499, "Moderate", "4.99 %"),
        (10_000, 500, "Stabiliser (5 to 25 %)", "5 %"),
        (10_000, 2500, "Stabiliser", "25 %"),
        (1000, 251, "High (25 to 50 %)", "25.1 %"),
        (1000, 501, "Normaliser (50 to 100 %)", "50.1 %"),
        (1000, 1000, "Normaliser", "100 %"),
    ],
)
def test_the_regime_is_named_with_its_numbers(steps, clipped, regime, rate):
    summary = log_with_clips(steps, clipped).summary()
    assert summary.clip_rate == pytest.approx(clipped / steps)
    assert summary.advice[0].startswith(regime)
    assert f"clip rate {rate} over {steps} steps" in summary.advice[0]
    assert "mean scale" in summary.advice[0]
    sentences = [sentence for sentence in summary.advice if "SGD" in sentence]
    assert len(sentences) == (clipped / steps > 0.5)
    assert all("Lower the learning rate" in sentence for sentence in sentences)


def test_a_low_mean_scale_is_named():
    assert "mean scale 0.25 is below 0.3" in str(log_of([8.0] * 100).summary())
    assert "is below 0.3" not in str(log_of([5.0] * 100).summary())


def test_steps_without_a_threshold_are_counted_separately():
    log = log_of([1.0] * 300, threshold=INF)
    assert log.summary().advice[0].startswith("Nothing could be clipped: in all 300")
    for step in range(100):
        log.record(norm=4.0 if step % 5 == 0 else 1.0, threshold=2.0)
    assert log.summary().clip_rate == 20 / 400
    start = "300 of 400 steps had no threshold; over the other 100"
    assert f"{start} the clip rate is 20 %" in str(log.summary())


def test_non_finite_steps_are_reported_from_the_first_step():
    advice = log_of([1.0, NAN, INF, 1.0]).summary().advice
    assert advice[-1].startswith("2 of 4 steps (50 %) had a NaN or infinite norm")


# The plot.


def artists(figure):
    """Return the artists of the upper panel by label."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    return dict(zip(labels, handles, strict=True))


def count_pixels(path, color):
    """Count the pixels of a saved image that have exactly this color, "#RRGGBB"."""
    from matplotlib.image import imread

    image = np.round(255 * imread(path)[..., :3]).astype(int)
    wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return int((image == wanted).all(axis=-1).sum())


def log_of_a_run(steps, seed=0):
    """Return a log, its norms, and the steps of its spikes, zeros and NaN."""
    rng = np.random.default_rng(seed)
    norms = np.exp(rng.normal(scale=0.3, size=steps))
    spikes = np.arange(steps // 10, steps, steps // 10)
    zeros, nans = spikes[:-1] + 3, spikes[:-1] + 5
    norms[spikes], norms[zeros], norms[nans] = 1e3 + spikes, 0, NAN
    log = ClipLog()
    for step, norm in enumerate(norms):
        log.record(norm=norm, threshold=10.0 if step >= steps // 20 else INF)
    return log, norms, spikes, zeros, nans


@pytest.mark.needs("plot")
@pytest.mark.parametrize("steps", [1000, 100_000])
def test_the_plot_shows_clips_thresholds_zeros_and_nan(tmp_path, steps):
    log, norms, spikes, zeros, nans = log_of_a_run(steps)
    figure = log.plot(tmp_path / "run.png")
    drawn, column = artists(figure), steps / 1000

    clipped = drawn["clipped"]
    assert clipped.get_ydata().tolist() == norms[spikes].tolist()
    assert np.all(abs(clipped.get_xdata() - spikes) <= column)
    assert np.all(abs(drawn["non-finite"].get_xdata() - nans) <= column)
    assert np.all(abs(drawn["0 or below the axis"].get_xdata() - zeros) <= column)

    threshold = drawn["threshold"].get_ydata()
    assert set(threshold[~np.isnan(threshold)]) == {10.0}
    assert np.isnan(threshold).mean() == pytest.approx(1 / 20)

    for name in ("clipped", "threshold", "non-finite"):
        assert count_pixels(tmp_path / "run.png", drawn[name].get_color()) > 100, name


@pytest.mark.needs("plot")
def test_a_thousand_steps_are_drawn_without_thinning():
    log, norms, *_ = log_of_a_run(1000)
    line = artists(log.plot())["norm"]
    positive = norms > 0
    assert line.get_xdata().tolist() == list(range(1000))
    assert line.get_ydata()[positive].tolist() == norms[positive].tolist()


@pytest.mark.needs("plot")
def test_no_spike_is_lost_if_a_column_shows_many_steps():
    norms = np.ones(100_000)
    norms[54_321], norms[77_777] = 1e6, 1e-3
    log = log_of(norms.tolist(), threshold=INF)
    drawn = artists(log.plot())
    corners = drawn["norm, range of 100 steps"].get_paths()[0].vertices
    assert corners[:, 1].max() == 1e6
    assert corners[:, 1].min() == 1e-3
    assert abs(corners[corners[:, 1].argmax(), 0] - 54_321) <= 100
    assert set(drawn["median"].get_ydata()) == {1.0}


@pytest.mark.needs("plot")
def test_axes_and_title_have_labels():
    figure = log_of([4.0, *[1.0] * 9] * 20).plot()
    above, below = figure.axes
    assert "10 %" in above.get_title()
    assert "200 steps" in above.get_title()
    assert above.get_yscale() == "log"
    assert "norm" in above.get_ylabel()
    assert "step" in below.get_xlabel()
    assert "%" in below.get_ylabel()
    assert np.mean([bar.get_height() for bar in below.patches]) == pytest.approx(10)


@pytest.mark.needs("plot")
def test_the_labels_of_several_rows_say_so(tmp_path):
    log = ClipLog()
    log.record(rows([1.0, 1.0, 9.0], [2.0] * 3))
    log.record(rows([1.0, 9.0, 9.0], [2.0] * 3))
    figure = log.plot(tmp_path / "rows.svg")
    drawn = artists(figure)
    assert set(drawn) == {
        "norm (all rows)", "after clipping (all rows)", "half the rows clipped"
    }  # fmt: skip
    assert drawn["half the rows clipped"].get_xdata().tolist() == [1]
    after = drawn["after clipping (all rows)"].get_ydata()
    assert after == pytest.approx([math.hypot(1, 1, 2), math.hypot(1, 2, 2)])
    assert figure.axes[1].get_ylabel() == "rows clipped\n(%)"
    heights = [bar.get_height() for bar in figure.axes[1].patches]
    assert heights == pytest.approx([100 / 3, 200 / 3])
    assert "<svg" in (tmp_path / "rows.svg").read_text(encoding="utf-8")


@pytest.mark.needs("plot")
@pytest.mark.parametrize(
    "norms",
    [[], [1.0], [0.0] * 5, [NAN] * 5, [1e-300, 1.0, 1e300], [5e-324], [1.7e308] * 2],
    ids=["none", "one", "zeros", "nan", "wide", "tiny", "huge"],
)
@pytest.mark.parametrize("threshold", [0.0, 1.0, INF])
def test_unusual_series_can_be_drawn(tmp_path, norms, threshold):
    log = log_of(norms, threshold)
    log.plot(tmp_path / "odd.png")
    assert (tmp_path / "odd.png").stat().st_size > 5000
    assert str(log.summary())


@pytest.mark.needs("plot")
def test_plotting_does_not_import_pyplot():
    before = "matplotlib.pyplot" in sys.modules
    log_of([1.0]).plot()
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "autoclip-toolkit\[plot\]"'):
        log_of([1.0]).plot()


@pytest.mark.parametrize("steps", [3000, 600_000])
def test_a_falling_threshold_is_reported_in_long_runs_too(steps):
    def advice(thresholds):
        log = ClipLog()
        for threshold in thresholds:
            log.record(norm=1.5, threshold=threshold)
        return " ".join(log.summary().advice)

    thirds = [4.0] * (steps // 3) + [2.0] * (steps // 3) + [1.0] * (steps // 3)
    assert "From the first third" in advice(thirds)
    late = [4.0] * (steps - steps // 20) + [1.0] * (steps // 20)
    assert "From the first third" not in advice(late)


def test_metrics_of_updates_are_recorded_if_there_are_no_others():
    updates = {"clip/update_norm": 4.0, "clip/update_threshold": 1.0}
    updates |= {"clip/update_steps": 7, "clip/update_nonfinite_total": 2}
    log = ClipLog()
    log.record(updates)
    assert (log.steps[0], log.norms[0], log.scales[0]) == (6, 4.0, 0.25)
    assert log.summary().nonfinite == 2
    both = ClipLog()
    both.record({"clip/norm": 3.0, "clip/threshold": 3.0, "clip/steps": 9} | updates)
    assert (both.steps[0], both.norms[0], both.summary().nonfinite) == (8, 3.0, 0)


@pytest.mark.parametrize("policy", [Fixed(3.0), Drop(Fixed(3.0), action="skip")])
def test_the_metrics_of_rows_count_as_their_decisions_do(policy):
    """An idle row, a row that is not finite, and an update that is skipped."""
    generator = np.random.default_rng(0)
    names, state, tally = ["a", "b", "c"], policy.init(rows=3), empty_tally(3)
    decisions, metrics = ClipLog(names), ClipLog()
    for step in range(40):
        norms = generator.choice(
            [1.0, 2.0, 4.0, INF, NAN], 3, p=[0.4, 0.3, 0.2, 0.05, 0.05]
        )
        observed = np.array([True, step % 2 == 0, True])
        state, decision = decide(policy, state, norms, observed=observed)
        tally = count_step(tally, decision)
        decisions.record(decision)
        rows = compute_row_metrics(names, decision, tally)
        metrics.record(compute_metrics(decision, tally) | rows)
    assert metrics.names == names
    np.testing.assert_array_equal(metrics.row_clip_rates, decisions.row_clip_rates)
    assert 0 < metrics.row_clip_rates.min() < metrics.row_clip_rates.max() < 1
    assert metrics.summary().clip_rate == pytest.approx(decisions.summary().clip_rate)


def test_numbers_after_metrics_continue_the_step_count():
    log = ClipLog()
    log.record({"clip/norm": 1.0, "clip/threshold": 2.0, "clip/steps": 10})
    for _ in range(3):
        log.record(norm=1.0, threshold=2.0)
    assert log.steps.tolist() == [9, 10, 11, 12]


def test_an_integer_above_every_float_is_an_infinite_norm():
    log = ClipLog()
    log.record(norm=10**400, threshold=1.0)
    assert log.finite.tolist() == [False]


ROWS = {"names": ["a", "b"], "steps": 2, "width": 1}
ROWS |= {"clipped": [[1, 0], [1, 1]], "observed": [[1, 1], [1, 1]]}
PAST = {"stride": 2, "moved": 2, "highest": [[0, 3.0, 2.0, 0.5, 1.0, True, False]]}
COUNTS = {"steps": 1, "measured": 1, "armed": 1, "nonfinite": 0, "skipped": 0}
SUMS = {"norm": 1.0, "scale": 1.0, "clipped": 0.0, "armed_clipped": 0.0}
TOTALS = {"counts": COUNTS, "sums": SUMS, "largest": 1.0, "histogram": [[1], [1]]}


@pytest.mark.parametrize(
    "damage",
    [
        *([1], "text", None, {"rows": 3}, {"past": {}}, {"totals": []}),
        *({"settings": [1]}, {"told": 1}, {"told": {"steps": "x"}}),
        *({"told": {"steps": -1}}, {"rows": ROWS | {"width": 0}}),
        *({"rows": ROWS | {"steps": n}} for n in (-1, 3, 129, 10**30, None)),
        *({"rows": ROWS | {"clipped": [[n, 0], [0, 0]]}} for n in (10**30, -1, "x")),
        *({"rows": ROWS | {"observed": [[1]]}}, {"rows": ROWS | {"names": 3}}),
        *({"past": PAST | {"stride": n}} for n in (0, -1, 10**30, 0.5)),
        *({"past": PAST | {"moved": 10**30}}, {"past": PAST | {"highest": []}}),
        *({"past": PAST | {"highest": [[10**400] * 7]}}, {"past": PAST | {"a": 1}}),
        *({"totals": TOTALS | {"counts": {"steps": n}}} for n in (-1, 0.5)),
        *({"totals": TOTALS | {"histogram": [[n], [1]]}} for n in (10**9, "x")),
        {"totals": TOTALS | {"histogram": [[1], [10**30]]}},
    ],
    ids=lambda damage: str(damage)[:60],
)
def test_a_corrupt_header_line_is_an_error(damage, tmp_path):
    path = tmp_path / "run.jsonl"
    lines = [{"clip_log": damage}, {"norm": 1.0, "threshold": 2.0}]
    path.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match=r"clip_log must be .*as to_jsonl wrote it"):
        ClipLog.from_jsonl(path)


def test_the_header_lines_that_are_damaged_above_are_read_without_damage(tmp_path):
    path = tmp_path / "run.jsonl"
    lines = [{"clip_log": {"rows": ROWS, "past": PAST, "totals": TOTALS}}]
    lines += [{"norm": 1.0, "threshold": 2.0}]
    path.write_text("\n".join(map(json.dumps, lines)))
    assert ClipLog.from_jsonl(path).row_clip_rates.tolist() == [1.0, 0.5]


@pytest.mark.parametrize("step", [-1, 0.5, 1e300, math.inf])
def test_the_number_of_a_step_is_a_whole_number(step, tmp_path):
    path = tmp_path / "run.csv"
    path.write_text(f"step,norm,threshold\n{step},1,2\n")
    with pytest.raises(ValueError, match="step must be a whole number >= 0, got"):
        ClipLog.from_csv(path)


def test_a_csv_file_of_a_thinned_log_warns_that_totals_are_lost(tmp_path):
    log = ClipLog()
    for _ in range(300_000):
        log.record(norm=1.0, threshold=2.0)
    with pytest.warns(UserWarning, match=r"of 300000 steps.*to_jsonl"):
        log.to_csv(tmp_path / "run.csv")
