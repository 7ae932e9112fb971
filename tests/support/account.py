"""What must hold of a series of the fault battery, by an account of its own.

It knows plain lists of norms, `np.quantile` and `statistics`. A gradient within its
threshold keeps its bits, one above it is scaled to it, one that is not finite becomes
0, all that comes out is finite; the threshold is that of the finite, positive norms
seen before, and of nothing else; every step is counted as what it was.
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
"""Of thresholds, norms and scales: they are float32."""
ROUNDING = {"float16": 1e-3, "bfloat16": 2.0**-7, "float32": 2e-6, "float64": 2e-6}
"""Of an element that was scaled; in float16 it may be subnormal, too."""


def quantile_of(norms):
    """The threshold after these norms."""
    return float(np.quantile(norms[-HISTORY:], 0.75)) if norms else math.inf


def mean_std_of(norms):
    """The same of a mean and two deviations."""
    norms = norms[-HISTORY:]
    if len(norms) < 2:
        return math.inf
    largest = max(norms)  # whose square may be too large
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
"""From the number of parameters to the places of those in each row."""


class Seen(NamedTuple):
    """What a framework made of a step, in NumPy."""

    decision: Decision
    tally: Tally
    results: list
    """One gradient per parameter; None where there was none."""


class Expected(NamedTuple):
    """What comes into a step, and the account's norms and thresholds of its rows."""

    grads: list
    norms: list
    limits: list


@lru_cache(8)  # several ways to clip are compared with it
def account(case, policy, scope):
    """What to expect of each step."""
    _, threshold_of = POLICIES[policy]
    rows = SCOPES[scope](len(case.layout))
    past, steps = [[] for _ in rows], []
    for grads in case.series():
        norms = [norm_of([grads[place] for place in row]) for row in rows]
        steps.append(Expected(grads, norms, [threshold_of(row) for row in past]))
        for row, norm in zip(past, norms, strict=True):
            if 0 < norm < math.inf:
                row.append(norm)
    return steps


def norm_of(gradients):
    """The norm of a row in float64, as far as float32 has it: 0 below, infinite above.

    It is infinite if an element is not finite, and NaN of no gradient.
    """
    present = [gradient for gradient in gradients if gradient is not None]
    if not present:
        return math.nan
    if not all(np.isfinite(gradient).all() for gradient in present):
        return math.inf
    norm = math.hypot(*(np.linalg.norm(np.float64(g).ravel()) for g in present))
    return 0.0 if norm < SMALLEST_NORMAL else math.inf if norm > LARGEST else norm


def check(case, policy, seen, scope="parameter", *, kernel_scales=False):
    """Compare what a framework made of a series with the account.

    Args:
      case: the series.
      policy: a name of `POLICIES`.
      seen: one per step; None for a step in which the framework calls no clipper.
      scope: a name of `SCOPES`.
      kernel_scales: whether the optimizer's kernel scales what is one row: it cannot
        divide to 0, so a row that is not finite stays, and the update is cancelled.
    """
    rows = SCOPES[scope](len(case.layout))
    counts = Counts(len(rows))
    for step, (expected, found) in enumerate(
        zip(account(case, policy, scope), seen, strict=True)
    ):
        if found is None:
            assert all(grad is None for grad in expected.grads)
            continue
        for row, members in enumerate(rows):
            norm, limit = expected.norms[row], expected.limits[row]
            where = f"step {step}, row {row}: norm {norm}, threshold {limit}"
            decision = Decision(*(field[row].item() for field in found.decision))
            check_decision(decision, norm, limit, case.exact, where)
            for place in members:
                check_gradient(
                    expected.grads[place],
                    found.results[place],
                    decision,
                    ROUNDING[case.layout[place][1]],
                    kernel_scales,
                    where,
                )
        counts.add(expected.norms, found.decision.clipped)
        counts.check(found.tally, step)


def check_decision(decision, norm, limit, exact, where):
    """A row's numbers follow from its norm and its threshold."""
    assert near(decision.threshold, limit), where
    assert decision.finite == (norm != math.inf), where
    assert not decision.skipped, where
    if not math.isfinite(norm):
        told = (
            math.isnan if math.isnan(norm) else lambda found: not math.isfinite(found)
        )
        assert told(decision.norm), where
        assert not decision.clipped, where
        assert decision.scale == (1 if math.isnan(norm) else 0), where
        return
    assert near(decision.norm, norm), where
    # Else either may be said to be larger.
    if not near(norm, limit) or (exact and norm == limit):
        assert decision.clipped == (norm > limit), where
    scale = limit / norm if decision.clipped else 1
    assert near(decision.scale, scale, 2 * RTOL if decision.clipped else 0), where


def check_gradient(before, after, decision, rtol, kernel_scales, where):
    """A gradient becomes what was decided."""
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
    elif decision.scale == 0:
        assert not after.any(), where
    else:
        wanted = np.float64(before) * float(decision.scale)
        # What is subnormal may be flushed; float16 has steps of 6e-8 there.
        least = 6e-8 if before.dtype == np.float16 else SMALLEST_NORMAL
        assert np.allclose(np.float64(after), wanted, rtol, least), where


class Counts:
    """What a run has counted."""

    def __init__(self, rows):
        self.steps = self.nonfinite = 0
        self.observed, self.clipped = np.zeros(rows), np.zeros(rows)

    def add(self, norms, clipped):
        self.steps += 1
        self.nonfinite += math.inf in norms
        self.observed += ~np.isnan(norms)
        self.clipped += clipped

    def check(self, tally, step):
        wanted = self.steps, self.nonfinite, 0, 0
        found = tally.steps, tally.nonfinite, tally.skipped, tally.skipped_in_a_row
        assert found == wanted, f"step {step}: {found}, not {wanted}"
        for name in ("observed", "clipped"):
            found, wanted = getattr(tally, name), getattr(self, name)
            assert np.array_equal(found, wanted), f"step {step}: {name} {found}"


def near(a, b, rtol=RTOL):
    """Whether two numbers agree; infinities do."""
    return a == b or abs(a - b) <= rtol * abs(b) < math.inf
