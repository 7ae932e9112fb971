"""The metrics of a step and of a run agree with float64 formulas, also in a jit."""

import math
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoclip_core import Decision
from autoclip_core.clipper.metrics import (
    Tally,
    compute_metrics,
    compute_row_metrics,
    count_step,
    empty_decision,
    empty_tally,
    name_update_metrics,
    was_observed,
)
from autoclip_core.clipper.metrics_checks import (
    CHANGES,
    READS,
    NonfiniteCheck,
    NoStepCheck,
)

from ..support.cases import log_normal

INF, NAN = float("inf"), float("nan")
NAMES = [
    "clip/norm",
    "clip/threshold",
    "clip/scale",
    "clip/norm_after",
    "clip/clipped",
    "clip/clip_rate",
    "clip/nonfinite_total",
    "clip/skipped_total",
    "clip/dropped_total",
    "clip/steps",
    "clip/rows",
]


def test_before_the_first_step_there_is_no_norm_and_no_threshold():
    norm, threshold, scale, clipped, finite, skipped, dropped = empty_decision(2)
    assert np.isnan(norm).all()
    assert threshold.tolist() == [INF, INF]
    assert scale.tolist() == [1, 1]
    assert clipped.tolist() == skipped.tolist() == dropped.tolist() == [False, False]
    assert finite.tolist() == [True, True]
    assert {part.dtype for part in (norm, threshold, scale)} == {np.dtype(np.float32)}


def decision_of(norms, thresholds, *, unobserved=(), nonfinite="zero"):
    """Return the decision on these norms by the documented numeric rules."""
    norms = np.float32(norms)
    thresholds = np.broadcast_to(np.float32(thresholds), norms.shape)
    observed = np.ones(norms.shape, bool)
    observed[list(unobserved)] = False
    finite = np.isfinite(norms) | ~observed
    clipped = observed & finite & (np.where(finite, norms, 0) > thresholds)
    scale = np.where(clipped, thresholds / np.where(clipped, norms, 1), 1)
    scale = np.where(finite, scale, 0 if nonfinite == "zero" else 1)
    skips = nonfinite == "skip" and not finite.all()
    if skips:
        scale = np.where(observed, 0, scale)
    return Decision(
        norm=np.where(observed, norms, np.float32(NAN)),
        threshold=thresholds.astype(np.float32),
        scale=scale.astype(np.float32),
        clipped=clipped,
        finite=finite,
        skipped=np.full(norms.shape, skips),
        dropped=np.zeros(norms.shape, bool),
    )


def expected_metrics(decisions):
    """Return the metrics after these steps, in float64, by their definitions."""
    last = decisions[-1]
    observed = ~(np.isnan(last.norm) & last.finite)
    known = observed & last.finite
    norms, scales = np.float64(last.norm[known]), np.float64(last.scale[known])
    before, after = (np.sqrt(np.sum(x**2)) for x in (norms, norms * scales))
    if not last.finite.all() and not known.any():
        before = after = NAN
    limits = np.float64(last.threshold[np.isfinite(last.threshold)])
    observed_rows = [(~(np.isnan(d.norm) & d.finite)).sum() for d in decisions]
    return {
        "clip/norm": before,
        "clip/threshold": np.median(limits) if len(limits) else INF,
        "clip/scale": after / before if before != 0 else 1.0,
        "clip/norm_after": after,
        "clip/clipped": last.clipped[observed].mean() if observed.any() else 0.0,
        "clip/clip_rate": sum(d.clipped.sum() for d in decisions)
        / max(sum(observed_rows), 1),
        "clip/nonfinite_total": sum(not d.finite.all() for d in decisions),
        "clip/skipped_total": sum(d.skipped.any() for d in decisions),
        "clip/dropped_total": sum(d.dropped.any() for d in decisions),
        "clip/steps": len(decisions),
        "clip/rows": last.norm.size,
    }


def in_numpy(decisions):
    tally = empty_tally(len(decisions[0].norm))
    for decision in decisions:
        tally = count_step(tally, decision)
    return compute_metrics(decisions[-1], tally)


@cache
def jitted():
    """Return the jitted functions; they compile once for each number of rows."""
    import jax
    import jax.numpy as jnp

    step = jax.jit(lambda tally, decision: count_step(tally, decision, jnp))
    return step, jax.jit(lambda decision, tally: compute_metrics(decision, tally, jnp))


def in_jax(decisions):
    import jax.numpy as jnp

    step, compute = jitted()
    tally = empty_tally(len(decisions[0].norm), jnp)
    for decision in decisions:
        decision = Decision(*map(jnp.asarray, decision))
        tally = step(tally, decision)
    return compute(decision, tally)


everywhere = pytest.mark.parametrize(
    "run",
    [
        pytest.param(in_numpy, id="numpy"),
        pytest.param(in_jax, id="jax-jit", marks=pytest.mark.needs("jax")),
    ],
)


def check(run, decisions, rtol=1e-6):
    metrics, expected = run(decisions), expected_metrics(decisions)
    # JAX sorts the keys of a dict.
    assert set(metrics) == set(NAMES)
    for name in NAMES:
        assert np.shape(metrics[name]) == ()
        np.testing.assert_allclose(
            np.asarray(metrics[name]),
            expected[name],
            rtol=rtol,
            atol=1.5e-45,  # one subnormal float32: a scale may be that small
            err_msg=name,
        )


STEPS = {
    "one row": decision_of([0.5], 1.0),
    "one row, clipped": decision_of([4.0], 1.0),
    "all rows": decision_of([0.5, 2.0, 3.0], [1.0, 1.0, 2.0]),
    "no threshold yet": decision_of([0.5, 2.0, 3.0], INF),
    "some have a threshold": decision_of([0.5, 2.0, 3.0], [INF, 1.0, 2.0]),
    "some are unobserved": decision_of([9.0, 2.0, 3.0], 1.0, unobserved=[0]),
    "nothing observed": decision_of([9.0, 9.0, 9.0], 1.0, unobserved=[0, 1, 2]),
    "zeros": decision_of([0.0, 0.0, 0.0], 1.0),
    "one NaN": decision_of([NAN, 2.0, 3.0], 1.0),
    "one infinity": decision_of([0.5, INF, 3.0], 1.0),
    "propagated": decision_of([0.5, INF, 3.0], 1.0, nonfinite="propagate"),
    "skipped": decision_of([0.5, NAN, 3.0], 1.0, nonfinite="skip"),
    "nothing is finite": decision_of([NAN, INF, NAN], 1.0),
    "not finite or unobserved": decision_of([NAN, 9.0, 9.0], 1.0, unobserved=[1, 2]),
    "even thresholds": decision_of([1.0, 2.0, 3.0, 4.0], [8.0, 0.5, 2.0, 1.0]),
    "dropped": decision_of([4.0, 0.5], 1.0)._replace(
        scale=np.float32([0, 1]), dropped=np.array([True, False])
    ),
    "huge": decision_of([1e30, 3e30, 2e30], 1e30),
    "almost infinite": decision_of([3e38, 1e38], [1e38, INF]),
    "huge and tiny": decision_of([1e30, 1e-30], 1e-3),
    "tiny": decision_of([1e-30, 3e-30, 2e-30], 1e-30),
}


@everywhere
@pytest.mark.parametrize("decision", STEPS.values(), ids=list(STEPS))
def test_the_metrics_of_one_step(run, decision):
    check(run, [decision])


@everywhere
def test_the_metrics_of_a_run(run):
    """Rates and totals cover all steps; the other metrics describe the last step."""
    steps = [d for d in STEPS.values() if len(d.norm) == 3]
    assert len(steps) > 10
    for stop in range(1, len(steps) + 1):
        check(run, steps[:stop])


@everywhere
def test_thousands_of_rows_of_every_size(run):
    """No square overflows or underflows, and every count is exact."""
    rng = np.random.default_rng(0)
    for size in (1.0, 1e30, 1e-30):
        norms = size * log_normal(rng, (3, 5001), 1.0)
        thresholds = size * log_normal(rng, (3, 5001), 0.5)
        norms[0, ::100], norms[1, ::50], norms[2, 7] = NAN, INF, 0
        steps = [
            decision_of(n, t, unobserved=rng.choice(5001, 300, replace=False))
            for n, t in zip(norms, thresholds, strict=True)
        ]
        check(run, steps, rtol=1e-5)


@everywhere
def test_a_thousand_rows_of_1e30_have_a_finite_norm(run):
    metrics = run([decision_of(np.full(1000, 1e30), 1e29)])
    np.testing.assert_allclose(metrics["clip/norm"], 1000**0.5 * 1e30, rtol=1e-5)
    np.testing.assert_allclose(metrics["clip/norm_after"], 1000**0.5 * 1e29, rtol=1e-5)
    np.testing.assert_allclose(metrics["clip/scale"], 0.1, rtol=1e-5)


norms = st.floats(2.0**-100, 2.0**100, width=32) | st.sampled_from([0.0, NAN, INF, 1.0])
limits = st.floats(2.0**-100, 2.0**100, width=32) | st.sampled_from([INF, 1.0])
rows = st.integers(1, 6)


@given(
    rows.flatmap(
        lambda rows: st.lists(
            st.builds(
                decision_of,
                st.lists(norms, min_size=rows, max_size=rows),
                st.lists(limits, min_size=rows, max_size=rows),
                unobserved=st.sets(st.integers(0, rows - 1)),
                nonfinite=st.sampled_from(["zero", "skip", "propagate"]),
            ),
            min_size=1,
            max_size=5,
        )
    )
)
def test_the_metrics_of_any_run(decisions):
    check(in_numpy, decisions, rtol=2e-6)
    metrics = in_numpy(decisions)
    assert 0 <= metrics["clip/scale"] <= 1 or np.isnan(metrics["clip/norm"])
    assert 0 <= metrics["clip/clip_rate"] <= 1


def test_the_tally_counts_rows_and_steps():
    """A step that is not skipped resets the count of skips in a row."""
    tally = empty_tally(2)
    assert isinstance(tally, Tally)
    skips = []
    for decision in (
        decision_of([4.0, 0.5], 1.0),
        decision_of([NAN, 4.0], 1.0, nonfinite="skip"),
        decision_of([INF, 4.0], 1.0, nonfinite="skip"),
        decision_of([9.0, 4.0], 1.0, unobserved=[0], nonfinite="skip"),
        decision_of([NAN, 9.0], 1.0, unobserved=[1], nonfinite="skip"),
    ):
        tally = count_step(tally, decision)
        skips.append(int(tally.skipped_in_a_row))
    assert skips == [0, 1, 2, 0, 1]
    assert tally.steps == 5
    assert tally.observed.tolist() == [4, 4]
    assert tally.clipped.tolist() == [1, 3]
    assert tally.nonfinite == 3
    assert tally.skipped == 3
    for count in tally:
        assert count.dtype == np.int32


def test_a_row_was_observed_unless_its_norm_is_nan_and_finite_is_true():
    """A NaN norm means a NaN gradient, or no gradient if `finite` is true."""
    decision = decision_of([1.0, NAN, 9.0, INF, 0.0], 1.0, unobserved=[2])
    assert was_observed(decision).tolist() == [True, True, False, True, True]


def test_metrics_are_defined_without_any_row():
    """The clipper of a model has no row if every parameter is excluded."""
    metrics = in_numpy([decision_of([], 1.0)] * 3)
    assert [metrics[name].tolist() for name in NAMES[:3]] == [0.0, INF, 1.0]
    assert [metrics[name].tolist() for name in NAMES[3:]] == [
        0.0,
        0.0,
        0.0,
        0,
        0,
        0,
        3,
        0,
    ]


def test_the_metrics_of_each_row():
    tally = empty_tally(3)
    for norms in ([4.0, 0.5, 9.0], [4.0, 4.0, 9.0], [0.5, 8.0, 9.0], [0.5, 2.0, 9.0]):
        decision = decision_of(norms, [2.0, 4.0, 1.0], unobserved=[2])
        tally = count_step(tally, decision)
    metrics = compute_row_metrics(["a", "b", "c"], decision, tally)
    assert math.isnan(metrics.pop("clip/norm/c"))
    assert metrics == {
        **{"clip/norm/a": 0.5, "clip/norm/b": 2.0},
        **{"clip/threshold/a": 2.0, "clip/threshold/b": 4.0, "clip/threshold/c": 1.0},
        **{"clip/scale/a": 1.0, "clip/scale/b": 1.0, "clip/scale/c": 1.0},
        **{"clip/clip_rate/a": 0.5, "clip/clip_rate/b": 0.25, "clip/clip_rate/c": 0.0},
    }
    decision = decision_of([4.0], 1.0)
    tally = count_step(empty_tally(1), decision)
    metrics = compute_row_metrics(["a"], decision, tally)
    assert metrics["clip/clip_rate/a"] == 1.0


def test_decision_and_tally_are_not_changed():
    decision = STEPS["all rows"]
    before = [field.copy() for field in decision]
    tally = empty_tally(3)
    compute_metrics(decision, count_step(tally, decision))
    for field, old in zip(decision, before, strict=True):
        np.testing.assert_array_equal(field, old)
    assert all((count == 0).all() for count in tally)


def test_an_update_clipper_has_metric_names_of_its_own():
    """The prefix changes once: a row may have "clip/" in its name."""
    metrics = {"clip/norm": 1.0, "clip/scale/clip/0": 2.0, "clip/steps": 3.0}
    assert name_update_metrics(metrics) == {
        "clip/update_norm": 1.0,
        "clip/update_scale/clip/0": 2.0,
        "clip/update_steps": 3.0,
    }


def read_often(steps, weights):
    """Return the texts of all reads."""
    check = NoStepCheck()
    return [
        check.check(count, lambda value=value: np.array([value, np.nan]), "call it")
        for count, value in zip(steps, weights, strict=False)
    ]


@pytest.mark.parametrize(
    ("per_update", "last", "seen"),
    [
        (1, CHANGES, "its weights change"),
        (4, 4 * CHANGES, "its weights change"),
        (10**6, READS - 1, "its metrics are read"),
    ],
)
def test_metrics_that_are_read_while_no_step_clips_warn_once(per_update, last, seen):
    weights = (read // per_update for read in range(3 * READS))
    texts = read_often([0.0] * (3 * READS), weights)
    assert [i for i, text in enumerate(texts) if text] == [last]
    assert f"{seen} again and again, so nothing is clipped; call it; " in texts[last]


@pytest.mark.parametrize("reads", [0, 1, CHANGES])
def test_after_a_step_no_read_warns(reads):
    """The counts may be set back to 0."""
    steps = [*[0.0] * reads, 1.0, *[0.0] * (2 * READS)]
    assert not any(read_often(steps, range(3 * READS)))


def tally_of(steps, nonfinite):
    return empty_tally(1)._replace(steps=np.int32(steps), nonfinite=np.int32(nonfinite))


@pytest.mark.parametrize(
    ("counts", "last"),
    [
        ([(n, n) for n in range(1, 30)], (10, 10)),
        ([(n, n // 5) for n in range(1, 99)], (50, 10)),
        ([(1000, 1000), (2000, 2000)], (1000, 1000)),  # read once per epoch
        ([(1000, 99), (2000, 99), (3000, 500)], (3000, 500)),
    ],
)
def test_many_steps_that_are_not_finite_are_reported_once(counts, last):
    check = NonfiniteCheck("updates")
    texts = {count: text for count in counts if (text := check.check(tally_of(*count)))}
    assert list(texts) == [last]
    assert "the updates of " in texts[last]


@pytest.mark.parametrize(
    "counts",
    [
        [(n, min(n, 9)) for n in range(1, 300)],
        [(n, n // 12) for n in range(1, 1000)],
        [(1000, 99), (2000, 198)],
    ],
)
def test_few_steps_that_are_not_finite_are_not_reported(counts):
    check = NonfiniteCheck()
    assert not any(check.check(tally_of(*count)) for count in counts)
