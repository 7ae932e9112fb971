"""Another clip before the clipper is found in a series of norms, by one rule."""

import math

import numpy as np
import pytest

from autoclip_core import ClipLog
from autoclip_core.clipper.metrics_checks import (
    ClippedBeforeCheck,
    find_repeated_limit,
)

NAN, INF = math.nan, math.inf
NEAR = 0.25 * (1 + 9e-6)
LOW = 0.25 * (1 - 9e-6)


def places(*indices, near=(0.25, LOW, NEAR), size=40):
    """Return norms of which those at these indices lie next to 0.25."""
    norms = [0.301 + 0.0013 * index for index in range(size)]
    for number, index in enumerate(indices):
        norms[index] = near[number % len(near)]
    return norms


@pytest.mark.parametrize(
    ("norms", "limit"),
    [
        (places(0, 1, 2, 3, 4), 0.25),
        (places(0, 1, 2, 3), None),  # one more is needed
        (places(10, 15, 20, 28, 29), 0.25),
        (places(10, 15, 20, 28, 30), None),  # 5 of 21
        (places(0, 15, 20, 25, 30, 34), 0.25),
        (places(*range(9), near=[NEAR]), None),  # the gradient never changes
        (places(*range(9), near=[LOW, *[NEAR] * 7, LOW]), 0.25),
        (places(*range(9), near=[LOW, *[NEAR] * 8]), None),  # it rises
        (np.linspace(0.24, 0.26, 10**5), None),  # it changes slowly
        (np.linspace(0.26, 0.24, 10**5), None),
        (places(*range(8), near=[0.25, 0.25 * (1 + 1.005e-5)]), None),
        (places(*range(9), near=[0.251, 0.251 * 1.000001]), None),  # three digits
        (places(*range(8), near=[0.25, 0.26, NEAR, 0.26001]), None),
        ([0.0, -0.0] * 20, None),
        ([NAN, INF, 5e-324] * 20, None),
        ([NAN, 3e8, INF, 3e8 + 32, 0.0] * 3, 3e8),
        ([], None),
    ],
)
def test_5_of_20_norms_next_to_a_number_of_two_digits_are_the_limit(norms, limit):
    assert find_repeated_limit(norms) == limit
    assert find_repeated_limit(map(np.float64, norms)) == limit


def test_a_check_reports_the_limit_once():
    check = ClippedBeforeCheck()
    texts = [check.check(norm) for norm in places(10, 15, 20, 28, 29, 30, 31)]
    [text] = filter(None, texts)
    assert texts.index(text) == 29
    assert text.startswith("the clipper measures norms of 0.25 again and again")


def test_norms_by_chance_have_no_limit():
    rng = np.random.default_rng(0)
    for spread in (1.0, 0.1, 0.01):
        norms = np.exp(rng.normal(0, spread, 20_000)).astype(np.float32)
        assert find_repeated_limit(norms.tolist()) is None


NORMS = np.exp(np.random.default_rng(1).normal(0, 0.5, 400))


def cut(limit, share=1.0):
    """Return norms that another clip has cut off in this share of the steps."""
    rng = np.random.default_rng(2)
    noise = limit * (1 + rng.uniform(-2e-7, 2e-7, len(NORMS)))
    is_acting = (rng.random(len(NORMS)) < share) & (limit < NORMS)
    return np.where(is_acting, noise, NORMS)


def red_lights(norms, threshold=5.0, **settings):
    log = ClipLog(settings=settings)
    for norm in norms:
        log.record(norm=norm, threshold=threshold)
    return [text for text in log.summary().advice if text.startswith("Red light")]


@pytest.mark.parametrize(
    "norms",
    [cut(0.25, 0.5), cut(0.25)[:20], np.r_[NORMS[:350], cut(0.25)[350:]]],
    ids=["in half of the steps", "in a short run", "in the last steps"],
)
def test_a_limit_that_comes_again_and_again_is_a_red_light(norms):
    [light] = red_lights(norms)
    assert "before: some norms are 0.25 again and again. Remove the other" in light


def test_a_limit_stands_next_to_a_divergence():
    norms = np.r_[cut(0.25, 0.5), np.geomspace(2, 1e6, 100)]
    other_clip, divergence = red_lights(norms)
    assert "0.25 again and again" in other_clip
    assert "diverged at step" in divergence


def test_a_long_log_keeps_the_limit():
    """The steps of the past are thinned."""
    [light] = red_lights(np.r_[np.tile(cut(0.25, 0.9), 15), NORMS])
    assert "0.25 again and again" in light


@pytest.mark.parametrize(
    "norms",
    [NORMS, np.full(200, 0.37), np.full(200, 1.0), np.r_[np.full(90, 0.5), NORMS]],
    ids=["no clip", "a constant", "the constant 1", "a constant start"],
)
def test_other_norms_are_no_red_light(norms):
    assert red_lights(norms) == []
    assert red_lights(norms, threshold=1e-9) == []  # normalizes on purpose


@pytest.mark.parametrize("norms", [cut(0.25), cut(0.25, 0.5)])
def test_a_dry_run_may_measure_what_another_clip_left(norms):
    assert red_lights(norms, policy="Fixed(max_norm=5.0)", dry_run=True) == []


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_another_clipper_of_this_package_may_act_first(share, tmp_path):
    """The metrics say so; a decision does not, and the red light says what to do."""
    log, alone = ClipLog(), ClipLog()
    for norm in cut(0.25, share):
        metrics = {"clip/norm": norm, "clip/threshold": 5.0}
        alone.record(metrics)
        log.record(metrics | {"clip/other_clippers": 1})
    assert "Red light" not in " ".join(log.summary().advice)
    for form in ("csv", "jsonl"):
        getattr(log, f"to_{form}")(path := tmp_path / f"log.{form}")
        read = getattr(ClipLog, f"from_{form}")(path)
        assert read.summary().advice == log.summary().advice
    assert "of this package, too, record metrics" in " ".join(alone.summary().advice)
    for norm in np.geomspace(1e2, 1e9, 100):
        log.record({"clip/norm": norm, "clip/threshold": 5.0, "clip/other_clippers": 1})
    [light] = [text for text in log.summary().advice if text.startswith("Red light")]
    assert "diverged at step" in light


def test_an_update_may_be_normalized():
    log = ClipLog()
    for norm in cut(0.25, 0.5):
        log.record({"clip/update_norm": norm, "clip/update_threshold": 1.0})
    assert "Red light" not in " ".join(log.summary().advice)
