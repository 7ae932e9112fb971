"""Compare the policies with independent code: NumPy, `statistics` and smartclip.

Each test states how the settings map. smartclip 0.1.1 records a norm before it limits
it. The tests use its rolling window and its moving moments, which are correct. They do
not use its P2 median and its EMA quantile, which are not a median and a quantile.
"""

import math
import statistics

import numpy as np
import pytest

from autoclip_core import MeanStd, Quantile, ZScore

from ..support.cases import log_normal, run, series_of


@pytest.fixture(scope="module")
def norms():
    """Return finite norms with spikes and a change of level, exact in float32."""
    rng = np.random.default_rng(4)
    norms = log_normal(rng, 250, 0.5)
    norms[rng.random(250) < 0.04] *= 30
    norms[120:] *= 5
    return np.float32(norms)


def histories(norms, length, current=False):
    """Yield the last norms of each step, as Python floats."""
    for step in range(len(norms)):
        end = step + current
        start = 0 if length is None else max(end - length, 0)
        yield norms[start:end].tolist()


def thresholds(policy, norms):
    _, decision = run(policy, series_of(norms))
    return decision.threshold[:, 0]


def check(policy, norms, expected, rtol):
    """Compare all thresholds, also the +inf before the first threshold."""
    actual = thresholds(policy, norms)
    assert (norms > actual).any()
    np.testing.assert_allclose(actual, np.array(list(expected)), rtol=rtol)


every_window = pytest.mark.parametrize(
    ("length", "current"), [(1, False), (7, False), (40, True), (None, True)]
)


@every_window
@pytest.mark.parametrize("q", [0.0, 0.1, 0.5, 0.87, 0.99])
def test_a_quantile_is_that_of_numpy(norms, q, length, current):
    policy = Quantile(q, history_length=length, include_current=current)
    windows = histories(norms, length, current)
    expected = (np.quantile(w, q) if w else math.inf for w in windows)
    check(policy, norms, expected, 3e-7)


@every_window
@pytest.mark.parametrize("tenths", range(1, 10))
def test_a_quantile_is_that_of_statistics(norms, tenths, length, current):
    """The method "inclusive" is linear; the fifth tenth is also the median."""
    policy = Quantile(tenths / 10, history_length=length, include_current=current)
    windows = histories(norms, length, current)
    check(policy, norms, (tenth(w, tenths) for w in windows), 1e-6)


def tenth(values, tenths):
    if len(values) < 2:  # `statistics` needs two values before Python 3.13
        return values[0] if values else math.inf
    cut = statistics.quantiles(values, n=10, method="inclusive")[tenths - 1]
    if tenths == 5:
        assert cut == pytest.approx(statistics.median(values))
    return cut


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(("ddof", "deviation"), [(0, "pstdev"), (1, "stdev")])
@pytest.mark.parametrize(("length", "current"), [(7, False), (40, True), (None, False)])
def test_mean_and_deviation_are_those_of_statistics(
    norms, length, current, ddof, deviation, log
):
    policy = MeanStd(
        1.5, history_length=length, ddof=ddof, log=log, include_current=current
    )

    def limit(values):
        if len(values) < 2:
            return math.inf
        values = list(map(math.log, values)) if log else values
        level = statistics.fmean(values)
        level += 1.5 * getattr(statistics, deviation)(values)
        return math.exp(level) if log else level

    check(policy, norms, map(limit, histories(norms, length, current)), 2e-6)


def test_the_warm_up_of_the_z_score_is_that_of_statistics(norms):
    """The moments are the mean and the population deviation, for every length."""
    for steps in (1, 2, 25, 100):
        first = norms[:steps].tolist()
        expected = statistics.fmean(first) + 2.0 * statistics.pstdev(first)
        actual = thresholds(ZScore(2.0, warmup_steps=steps), norms[: steps + 1])
        assert np.isposinf(actual[:steps]).all()
        assert actual[steps] == pytest.approx(expected, rel=1e-6)


@pytest.mark.needs("peers")
@pytest.mark.parametrize("percentile", [5.0, 50.0, 95.0])
def test_a_window_is_that_of_smartclip(norms, percentile):
    """percentile = 100 q, window_size = history_length; it includes the current norm.

    The gates of smartclip (warmup_steps, min_history) are in its adapters only.
    """
    from smartclip import AutoClip

    peer = AutoClip(
        mode="percentile", history="window", percentile=percentile, window_size=30
    )

    def limit(norm):
        peer.observe(float(norm))
        return peer.threshold()

    policy = Quantile(percentile / 100, history_length=30, include_current=True)
    actual = thresholds(policy, norms)
    np.testing.assert_allclose(actual, list(map(limit, norms)), rtol=3e-7)


@pytest.mark.needs("peers")
@pytest.mark.parametrize("alpha", [0.5, 0.9, 0.99])
def test_moving_moments_are_those_of_smartclip(norms, alpha):
    """ema_decay = alpha, zmax = z sqrt(alpha), and its threshold is one step ahead.

    smartclip computes E[x^2] - E[x]^2, which grows by alpha (1 - alpha) d^2 for a norm
    at distance d from the mean. ZClip squares the distance to the new mean, alpha d. So
    the sigma of ZClip is sqrt(alpha) times smaller, if the first norm has no deviation.
    """
    from smartclip import ZScoreClip

    peer = ZScoreClip(zmax=2.0 * math.sqrt(alpha), ema_decay=alpha)
    policy = ZScore(2.0, alpha=alpha, warmup_steps=1, record="raw")
    actual = thresholds(policy, norms)
    assert np.isposinf(actual[0])
    for norm, following in zip(norms, actual[1:], strict=False):
        peer.observe(float(norm))
        assert following == pytest.approx(peer.threshold(), rel=1e-5)
