"""Check the results of a fault series by an independent calculation, the account.

The account uses plain lists of norms, `np.quantile` and `statistics`. It checks:
- A gradient within its threshold is unchanged bit for bit.
- A gradient above the threshold is scaled to it.
- A gradient that is not finite becomes 0, and all results are finite.
- The threshold follows only from the finite, positive norms of earlier steps.
- The tally counts every step correctly.
"""

import math
import statistics
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from autoclip_core import Decision, MeanStd, Quantile
from autoclip_core.clipper.metrics import Tally

HISTORY = 8
SMALLEST_NORMAL, LARGEST = 2.0**-126, float(np.finfo(np.float32).max)
RTOL = 1e-6
"""The tolerance of thresholds, norms and scales, which are float32."""
ROUNDING = {"float16": 1e-3, "bfloat16": 2.0**-7, "float32": 2e-6, "float64": 2e-6}
"""The tolerance of a scaled element; in float16 it may also be subnormal."""


def quantile_of(norms):
    """Return the quantile threshold after these norms."""
    return float(np.quantile(norms[-HISTORY:], 0.75)) if norms else math.inf


def mean_std_of(norms):
    """Return the threshold of mean plus two deviations after these norms."""
    norms = norms[-HISTORY:]
    if len(norms) < 2:
        return math.inf
    largest = max(norms)  # its square may overflow
    unit = [norm / largest for norm in norms]
    return largest * (statistics.fmean(unit) + 2 * statistics.stdev(unit))


POLICIES = {
    "quantile": (Quantile(0.75, history_length=HISTORY), quantile_of),
    "mean_std": (MeanStd(2.0, history_length=HISTORY), mean_std_of),
}
SCOPES = {
    "parameter": lambda parameters: [[place] for place in range(parameters)],
    "global": lambda parameters: [[*range(parameters)]],
}
"""A function of the number of parameters; it returns the parameters of each row."""


NORMS = {
    ("quantile", "parameter"): "l2",
    ("quantile", "global"): "rms",
    ("mean_std", "parameter"): "max",
    ("mean_std", "global"): "l2",
}
"""The norm that belongs to a policy and a scope, so that the battery covers all."""


class StepResult(NamedTuple):
    """The result of a framework for one step, in NumPy."""

    decision: Decision
    tally: Tally
    gradients: list
    """One gradient per parameter, or None."""


class Expected(NamedTuple):
    """The gradients of a step, and the norms and thresholds of the account."""

    grads: list
    norms: list
    limits: list


@lru_cache(8)  # several ways to clip are compared with one account
def account(case, policy, scope):
    """Return the expected results of each step."""
    _, threshold_of = POLICIES[policy]
    rows = SCOPES[scope](len(case.layout))
    past, steps = [[] for _ in rows], []
    for grads in case.series():
        kind = NORMS[policy, scope]
        norms = [norm_of([grads[place] for place in row], kind) for row in rows]
        steps.append(Expected(grads, norms, [threshold_of(row) for row in past]))
        for row, norm in zip(past, norms, strict=True):
            if 0 < norm < math.inf:
                row.append(norm)
    return steps


def norm_of(gradients, kind="l2"):
    """Return the norm of a row in float64; 0 below and infinity above float32's range.

    The norm is infinite if an element is not finite, and NaN without a gradient.
    """
    present = [gradient for gradient in gradients if gradient is not None]
    if not present:
        return math.nan
    if not all(np.isfinite(gradient).all() for gradient in present):
        return math.inf
    elements = np.concatenate([np.float64(gradient).ravel() for gradient in present])
    norm = np.abs(elements).max(initial=0.0) if kind == "max" else math.hypot(*elements)
    if kind == "rms":
        norm /= math.sqrt(max(len(elements), 1))
    return 0.0 if norm < SMALLEST_NORMAL else math.inf if norm > LARGEST else norm


def check(case, policy, results, scope="parameter", *, kernel_scales=False):
    """Compare the results of a framework for a series with the account.

    Args:
      case: the series.
      policy: a name of `POLICIES`.
      results: a `StepResult` per step; None if the framework calls no clipper.
      scope: a name of `SCOPES`.
      kernel_scales: whether the optimizer's kernel scales a single row. It cannot
        scale to 0, so a row that is not finite stays, and the update is skipped.
    """
    rows = SCOPES[scope](len(case.layout))
    counts = Counts(len(rows))
    for step, (expected, result) in enumerate(
        zip(account(case, policy, scope), results, strict=True)
    ):
        if result is None:
            assert all(grad is None for grad in expected.grads)
            continue
        for row, members in enumerate(rows):
            norm, limit = expected.norms[row], expected.limits[row]
            where = f"step {step}, row {row}: norm {norm}, threshold {limit}"
            decision = Decision(*(field[row].item() for field in result.decision))
            check_decision(decision, norm, limit, case.exact, where)
            for place in members:
                check_gradient(
                    expected.grads[place],
                    result.gradients[place],
                    decision,
                    ROUNDING[case.layout[place][1]],
                    kernel_scales,
                    where,
                )
        counts.add(expected.norms, result.decision.clipped)
        counts.check(result.tally, step)


def check_decision(decision, norm, limit, exact, where):
    """Check that the decision follows from the norm and the threshold."""
    assert near(decision.threshold, limit), where
    assert decision.finite == (norm != math.inf), where
    assert not decision.skipped, where
    if not math.isfinite(norm):
        is_same = math.isnan if math.isnan(norm) else lambda n: not math.isfinite(n)
        assert is_same(decision.norm), where
        assert not decision.clipped, where
        assert decision.scale == (1 if math.isnan(norm) else 0), where
        return
    assert near(decision.norm, norm), where
    # If they are almost equal, either may count as larger.
    if not near(norm, limit) or (exact and norm == limit):
        assert decision.clipped == (norm > limit), where
    scale = limit / norm if decision.clipped else 1
    if scale < SMALLEST_NORMAL and decision.scale == 0:  # XLA flushes such a scale
        return
    assert near(decision.scale, scale, 2 * RTOL if decision.clipped else 0), where


def check_gradient(before, after, decision, rtol, kernel_scales, where):
    """Check that a gradient is scaled as the decision says."""
    if before is None:
        assert after is None, where
        return
    if not decision.finite and kernel_scales:
        assert np.array_equal(after, before, equal_nan=True), where
        return
    assert after.dtype == before.dtype, where
    assert after.shape == before.shape, where
    if decision.scale == 1:
        assert np.array_equal(after, before), where
    elif decision.scale == 0 or (kernel_scales and decision.scale < 1 / LARGEST):
        assert not after.any(), where  # the kernel divides by 1 / scale
    else:
        expected = np.float64(before) * float(decision.scale)
        # Subnormal values may be flushed to 0; those of float16 are 6e-8 apart.
        atol = 6e-8 if before.dtype == np.float16 else SMALLEST_NORMAL
        deviation = abs(np.float64(after) - expected)
        assert (deviation <= atol + rtol * abs(expected)).all(), where


class Counts:
    """The counts of a run."""

    def __init__(self, rows):
        self.steps = self.nonfinite = 0
        self.observed, self.clipped = np.zeros(rows), np.zeros(rows)

    def add(self, norms, clipped):
        self.steps += 1
        self.nonfinite += math.inf in norms
        self.observed += ~np.isnan(norms)
        self.clipped += clipped

    def check(self, tally, step):
        expected = self.steps, self.nonfinite, 0, 0
        actual = tally.steps, tally.nonfinite, tally.skipped, tally.skipped_in_a_row
        assert actual == expected, f"step {step}: {actual}, not {expected}"
        for name in ("observed", "clipped"):
            actual, expected = getattr(tally, name), getattr(self, name)
            assert np.array_equal(actual, expected), f"step {step}: {name} {actual}"


def near(a, b, rtol=RTOL):
    """Return whether two numbers agree; equal infinities do."""
    return a == b or abs(a - b) <= rtol * abs(b) < math.inf
