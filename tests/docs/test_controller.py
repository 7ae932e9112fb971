"""The controller benchmark computes what its page and the theory say.

Each expected figure is a closed formula of log-normal norms, or a published one.
"""

import importlib.util
import math
import re
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


def load(path):
    """Return a script as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bench = load(ROOT / "benchmarks" / "controller.py")


@pytest.fixture(scope="module")
def series():
    return bench.make_series()


@pytest.fixture(scope="module")
def runs(series):
    """Run every policy of the page on every series, once: it takes 15 seconds."""
    return {code: bench.run(bench.policy_of(code), series) for code in bench.POLICIES}


# The page.


NUMBER = r"\d+(?:\.\d+)?"


def words(text):
    return re.sub(NUMBER, "0", text)


def agree(made, page):
    """Return whether all numbers agree, up to the last digit or 2 % of a count.

    The exp of another platform may change that much, for example the number of steps
    until a first crossing.
    """
    pairs = zip(re.findall(NUMBER, made), re.findall(NUMBER, page), strict=True)
    for one, other in pairs:
        _, point, decimals = other.partition(".")
        most = 1.01 * 10.0 ** -len(decimals) + (0 if point else 0.02 * int(other))
        if abs(float(one) - float(other)) > most:
            return False
    return True


def table_of_page(runs):
    return bench.make_table({code: runs[code] for code in bench.SHOWN})


def test_the_page_holds_what_the_code_computes(runs):
    page = bench.PAGE.read_text(encoding="utf-8")
    made = bench.put_between_marks(page, table_of_page(runs))
    assert words(made) == words(page)
    assert agree(made, page)


def test_a_stale_page_is_noticed(runs):
    page = bench.PAGE.read_text(encoding="utf-8")
    table = table_of_page(runs | {"StreamingQuantile(0.9)": runs["Quantile(0.9)"]})
    stale = bench.put_between_marks(page, table)
    assert words(stale) == words(page)
    assert not agree(stale, page)
    changed = re.sub(r"\b1\.(?=\d \|)", "2.", page)
    assert changed != page
    assert not agree(changed, page)


# Norms that do not change.


def tail(threshold, s):
    """P(n > T) of log-normal norms of mean 1."""
    return 1 - NormalDist(-s * s / 2, s).cdf(math.log(threshold))


def part_below(threshold, s):
    """E[n; n <= T]: the tilted law is log-normal again, with a mean s^2 larger."""
    return NormalDist(s * s / 2, s).cdf(math.log(threshold))


every_spread = pytest.mark.parametrize("s", bench.LOG_STDS)


def rate_of(runs, code, s):
    return bench.clip_rate(runs[code][f"log-std {s}"])


@every_spread
@pytest.mark.parametrize("max_norm", [1.0, 5.0])
def test_a_constant_clips_the_tail(runs, max_norm, s):
    rate = rate_of(runs, f"Fixed({max_norm})", s)
    assert rate == pytest.approx(tail(max_norm, s), abs=0.008)
    assert runs[f"Fixed({max_norm})"][f"log-std {s}"].scales.mean() == pytest.approx(
        # E[min(1, T/n)]: 1/n is log-normal too, its mean is exp(s^2).
        1
        - tail(max_norm, s)
        + max_norm * math.exp(s * s) * tail(max_norm * math.exp(s * s), s),
        abs=0.005,
    )


@every_spread
@pytest.mark.parametrize("q", [0.9, 0.5])
def test_a_full_window_clips_what_its_order_statistics_say(runs, q, s):
    """(1 - q) + (2q - 1)/(H + 1), for independent norms of any law."""
    expected = (1 - q) + (2 * q - 1) / 1001
    assert rate_of(runs, f"Quantile({q})", s) == pytest.approx(expected, abs=0.004)


@every_spread
def test_a_short_window_clips_a_little_more(runs, s):
    """0.9/129 more, which is 0.7 of the 5 percent; the benchmark can resolve it."""
    rate = rate_of(runs, "Quantile(0.95, history_length=128)", s)
    assert rate == pytest.approx(0.05 + 0.9 / 129, abs=0.003)


@every_spread
def test_a_norm_in_its_own_window_is_one_rank_of_a_hundred(runs, s):
    """The rank 0.05 * 99 = 4.95 has the 95 norms from the sixth on above it."""
    code = "Quantile(0.05, history_length=100, include_current=True)"
    assert rate_of(runs, code, s) == pytest.approx(0.95, abs=0.003)


@every_spread
def test_deviations_of_logarithms_clip_the_same_at_every_spread(runs, s):
    """Beyond two deviations lie 2.3 percent, and none of 30,000 norms beyond five."""
    rate = rate_of(runs, "MeanStd(2.0, log=True, history_length=200)", s)
    assert rate == pytest.approx(1 - NormalDist().cdf(2), abs=0.003)
    taken = runs["MeanStd(4.0, log=True, history_length=200)"][f"log-std {s}"]
    assert bench.largest(taken) < math.exp(5 * s - s * s / 2)


@pytest.mark.parametrize("code", ["StreamingQuantile(0.9)", "StreamingQuantile(0.5)"])
def test_the_tracked_quantile_keeps_its_account(runs, code):
    """Rate = (1 - q) + ln(C_T / C_0) / (rate T), on every series and in every row."""
    q = bench.policy_of(code).quantile
    for name, taken in runs[code].items():
        if name != "NaN, Inf":  # where not every step is one
            moved = np.log(taken.thresholds[-1] / np.float64(taken.thresholds[1]))
            expected = 1 - q + moved / (0.05 * (bench.STEPS - 2))
            actual = taken.clipped[1:-1].mean(axis=0)
            np.testing.assert_allclose(actual, expected, atol=2e-5, err_msg=name)


def fixed_point(ratio, s):
    """gamma with E[min(n, ratio * gamma)] = gamma, by bisection."""
    low, high = 1e-4, 1.0
    for _ in range(60):
        gamma = (low + high) / 2
        most = ratio * gamma
        recorded = part_below(most, s) + most * tail(most, s)
        low, high = (gamma, high) if recorded > gamma else (low, gamma)
    return gamma


@pytest.mark.parametrize(
    ("ratio", "s", "published"),
    [
        (1.05, 0.1, 0.42),
        (1.05, 0.3, 0.71),
        (1.05, 0.5, 0.79),
        (2.0, 0.5, 0.06),
        (2.0, 1.0, 0.19),
    ],
)
def test_the_average_of_adagc_settles_at_the_mean_it_records(runs, ratio, s, published):
    """At log-std 1.0 and ratio 1.05 it still rises, by 0.1 percent a step."""
    code = "EmaRatio()" if ratio == 1.05 else f"EmaRatio({ratio})"
    expected = tail(ratio * fixed_point(ratio, s), s)
    assert expected == pytest.approx(published, abs=0.005)
    assert rate_of(runs, code, s) == pytest.approx(expected, abs=0.02)


PUBLISHED = {
    "Quantile(0.1, history_length=None, include_current=True)": (90, 0.69, 0.7),
    "ZScore(record='applied')": (4.1, 0.99, 1.9),
    "EmaRatio()": (71, 0.82, 0.9),
    "EmaRatio(2.0)": (1.2, 0.99, 2.3),
    "StreamingQuantile(0.9)": (10, 0.98, 1.9),
    "Fixed(5.0)": (0.5, 1.0, 5.0),
    "MeanStd()": (0.5, 1.0, 15.5),
}
"""Clip rate in percent, mean scale and largest norm, from another simulation: 256 rows
of 4000 steps of log-std 0.3, one norm in 200 fifty times as large."""


@pytest.mark.parametrize("code", PUBLISHED)
def test_another_simulation_of_spikes_agrees(runs, code):
    taken = runs[code]["spikes"]
    rate, scale, largest = PUBLISHED[code]
    assert 100 * bench.clip_rate(taken) == pytest.approx(rate, abs=0.3)
    mean_scale = taken.scales[bench.SETTLED :].mean(dtype=np.float64)
    assert mean_scale == pytest.approx(scale, abs=0.012)
    assert bench.largest(taken) == pytest.approx(largest, rel=0.25)


@pytest.mark.parametrize(
    ("code", "rate", "scale"),
    [
        ("EmaRatio()", 0.87, 0.43),
        ("ZScore(target='mean', record='applied')", 0.959, 0.23),
    ],
)
def test_another_simulation_of_wild_norms_agrees_late_in_the_run(
    runs, code, rate, scale
):
    """Both still change at step 1000."""
    taken = runs[code]["log-std 1.0"]
    assert bench.clip_rate(taken, 3000) == pytest.approx(rate, abs=0.03)
    assert taken.scales[3000:].mean() == pytest.approx(scale, abs=0.03)
    assert abs(bench.clip_rate(taken) - rate) > 0.02


# Norms that change.


PUBLISHED_CHANGES = {
    "Quantile(0.9)": (0.008, 0.20, 165),
    "Quantile(0.95, history_length=128)": (0.042, 0.061, 3),
    "ZScore(record='applied')": (0.029, 0.040, None),
    "EmaRatio()": (0.59, 0.78, 2226),
    "EmaRatio(2.0)": (0.005, 0.008, 62),
    "StreamingQuantile(0.9)": (0.089, 0.106, 31),
}
"""From that simulation: clip rates while norms fall a hundredfold and grow tenfold in
8000 steps, and the steps to recover from a tenfold rise."""


@pytest.mark.parametrize("code", PUBLISHED_CHANGES)
def test_another_simulation_of_changes_agrees(series, runs, code):
    """At its slope: half of the logarithm of the factor, in half the steps."""
    steady, time = series["log-std 0.3"], np.arange(bench.STEPS)[:, None] / bench.STEPS
    drifts = {
        "fall": steady * np.float32(100 ** (-time / 2)),
        "grow": steady * np.float32(10 ** (time / 2)),
    }
    taken = bench.run(bench.policy_of(code), drifts)
    fall, grow, rise = PUBLISHED_CHANGES[code]
    assert bench.clip_rate(taken["fall"]) == pytest.approx(fall, abs=0.01)
    assert bench.clip_rate(taken["grow"]) == pytest.approx(grow, abs=0.01)
    crossing, _ = times(runs, code)  # the first crossing of a mean over rows
    assert (crossing is None) == (rise is None)
    assert rise is None or crossing == pytest.approx(rise, rel=0.45, abs=8)


def test_an_unbounded_history_does_not_keep_the_promised_rate(runs):
    """It clips 15 percent instead of 90 while the norms fall."""
    code = "Quantile(0.1, history_length=None, include_current=True)"
    rate = bench.clip_rate(runs[code]["drift ÷100"], bench.STEPS // 2)
    assert rate == pytest.approx(0.15, abs=0.01)


@pytest.mark.parametrize("q", [0.9, 0.5])
def test_the_drift_is_paid_by_the_tracked_quantile(runs, q):
    """The threshold moves as the norms do: the logarithm over (rate T) of the rate."""
    for name, factor in [("drift ÷100", 0.01), ("drift ×10", 10)]:
        rate = bench.clip_rate(runs[f"StreamingQuantile({q})"][name], 2000)
        expected = 1 - q + math.log(factor) / (0.05 * bench.STEPS)
        assert rate == pytest.approx(expected, abs=0.005)


def times(runs, code):
    """Return the steps to recover from a rise and to settle after a fall."""
    done = runs[code]
    steady = done["log-std 0.3"]
    rise = bench.recovery(done["shift ×10"], steady)
    return rise, bench.settling(done["shift ÷10"], steady, 0.1)


DEAD_LOCKS = [
    "Fixed(1.0)",
    "Fixed(5.0)",
    "ParamRatio(0.01)",
    "Quantile(0.1, history_length=None, include_current=True)",
    "ZScore(record='applied')",
    "ZScore(target='mean', record='applied')",
    "Cap(StreamingQuantile(0.9), max_norm=1.0)",
]


def test_who_never_recovers_from_a_tenfold_rise(runs):
    assert [code for code in runs if times(runs, code)[0] is None] == DEAD_LOCKS


@pytest.mark.parametrize("q", [0.9, 0.5])
def test_the_tracked_quantile_walks_at_its_own_speed(runs, q):
    """ln 10 / (rate q) steps up and ln 10 / (rate (1 - q)) down, at most about."""
    rise, fall = times(runs, f"StreamingQuantile({q})")
    assert rise == pytest.approx(math.log(10) / (0.05 * q), rel=0.15)
    assert fall == pytest.approx(math.log(10) / (0.05 * (1 - q)), rel=0.15)


def test_adagc_rises_a_thousandth_a_step(runs):
    rise, _ = times(runs, "EmaRatio()")
    assert rise == pytest.approx(math.log(10) / math.log1p(0.02 * 0.05), rel=0.1)


@pytest.mark.parametrize(
    ("code", "length", "q"),
    [
        ("Quantile(0.9)", 1000, 0.9),
        ("Quantile(0.5)", 1000, 0.5),
        ("Quantile(0.95, history_length=128)", 128, 0.95),
    ],
)
def test_a_window_turns_when_its_quantile_is_of_the_new_level(runs, code, length, q):
    """It turns when a share 1 - q of the norms is new on a rise, and q on a fall."""
    rise, fall = times(runs, code)
    assert (1 - q) * length <= rise <= 0.25 * length + (1 - q) * length
    assert q * length <= fall <= length


def test_a_factor_of_the_loss_changes_what_holds_a_constant(runs):
    """Deviations of logarithms change by rounding; the others are equal bit for bit."""
    constants = "Fixed ParamRatio EmaRatio Warmup Cap Floor".split()
    for code, done in runs.items():
        scaled = np.stack([done[name].scales for name in ("loss ×2^k", "loss ÷2^k")])
        changed = abs(scaled - np.float64(done["log-std 0.3"].scales)).max()
        if any(name in code for name in constants):
            assert changed > 1e-4, code
        else:
            assert changed <= (1e-4 if "log=True" in code else 0), code


# The measures themselves, on runs that they must distinguish.


def constant(threshold, scale, norm=1.0):
    shape = bench.STEPS, 1
    fields = (np.full(shape, value, np.float32) for value in (norm, threshold, scale))
    return bench.Taken(*fields, np.full(shape, scale < 1))


def records_gaps(gaps, steady):
    """Return whether a threshold differs from that of the finite norms alone."""
    known = gaps.thresholds[bench.known_steps()]
    return not np.array_equal(known, steady.thresholds[: len(known)])


def test_a_norm_that_was_recorded_in_a_gap_is_noticed(runs):
    done = runs["StreamingQuantile(0.9)"]
    gaps, steady = done["NaN, Inf"], done["log-std 0.3"]
    for run in runs.values():
        assert not records_gaps(run["NaN, Inf"], run["log-std 0.3"])
    thresholds = gaps.thresholds.copy()
    thresholds[-2:] *= np.float32(1.0001)
    assert records_gaps(gaps._replace(thresholds=thresholds), steady)


def test_the_measures_of_a_run_by_hand():
    steady, halved = constant(2.0, 1.0), constant(1.0, 0.5)
    assert (bench.clip_rate(steady), bench.clip_rate(halved)) == (0, 1)
    assert bench.largest(halved) == 0.5
    assert bench.recovery(halved, steady) is None
    halved.scales[bench.SHIFT + 7 :] = 0.95
    assert bench.recovery(halved, steady) == 7
    assert bench.settling(constant(2.3, 1.0), steady, 1.0) is None
    assert bench.settling(constant(2.1, 1.0), steady, 1.0) == 0


def test_the_series_are_what_they_are_called(series):
    assert {name: norms.dtype for name, norms in series.items()} == dict.fromkeys(
        series, np.float32
    )
    for s in bench.LOG_STDS:
        logs = np.log(np.float64(series[f"log-std {s}"]))
        assert logs.std() == pytest.approx(s, rel=0.01)
        assert logs.mean() == pytest.approx(-s * s / 2, abs=0.02 * s)
    steady = series["log-std 0.3"]
    assert set((series["spikes"] / steady).round(3).ravel().tolist()) == {1, 50}
    assert (series["spikes"] > steady).mean() == pytest.approx(0.005, abs=0.001)
    gaps = series["NaN, Inf"]
    assert np.isnan(gaps[0]).all()
    assert np.isposinf(gaps[1]).all()
    assert np.isfinite(gaps).mean() == pytest.approx(0.95, abs=0.01)
    assert (series["shift ×10"] / steady)[[1499, 1500], 0].round(4).tolist() == [1, 10]
    ratio = series["drift ÷100"][-1] / steady[-1]
    assert ratio == pytest.approx(np.full(bench.ROWS, 0.01), rel=0.002)
    ratio = series["drift ×10"][-1] / steady[-1]
    assert ratio == pytest.approx(np.full(bench.ROWS, 10), rel=0.002)
