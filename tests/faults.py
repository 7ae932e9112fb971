"""The fault battery: what a training run can do to a clipper, and what must hold then.

Each case is a series of steps; a step is one gradient per parameter, or None. It goes
through each framework under two policies, and `check` compares what came out with an
account of its own: plain lists of norms, `np.quantile` and `statistics`.

What must hold in every case: a gradient within its threshold keeps its bits, one above
it is scaled to it, one that is not finite becomes 0, all that comes out is finite; the
threshold is that of the finite, positive norms seen before, and of nothing else.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from autoclip_core import MeanStd, Quantile

NAN, INF = math.nan, math.inf
SHAPES = [(4, 3), (5,), (2, 2, 2), (0, 3)]
HISTORY = 8
SMALLEST_NORMAL, LARGEST = 2.0**-126, float(np.finfo(np.float32).max)


def quantile_of(norms):
    """The threshold after these norms."""
    return float(np.quantile(norms[-HISTORY:], 0.75)) if norms else INF


def mean_std_of(norms):
    """The same of a mean and two deviations."""
    norms = norms[-HISTORY:]
    if len(norms) < 2:
        return INF
    largest = max(norms)  # whose square may be too large
    unit = [norm / largest for norm in norms]
    return largest * (statistics.fmean(unit) + 2 * statistics.stdev(unit))


POLICIES = {
    "quantile": (Quantile(0.75, history_length=HISTORY), quantile_of),
    "mean_std": (MeanStd(2.0, history_length=HISTORY), mean_std_of),
}


@dataclass(frozen=True)
class Case:
    """A series of gradients."""

    steps: int
    fault: Callable[[int, list], list | None]
    """From the number of a step and sound gradients to what arrives in that step."""
    dtype: type = np.float32
    sizes: Callable[[int], float] = lambda step: 1.0
    """The level of the gradients at a step."""
    spread: float = 0.4
    """The deviation of the logarithm of a gradient's size."""

    def series(self):
        """Yield the gradients of each step."""
        rng = np.random.default_rng(0)
        for step in range(self.steps):
            grads = []
            for shape in SHAPES:
                direction = rng.standard_normal(shape)
                size = self.sizes(step) * np.exp(self.spread * rng.standard_normal())
                size /= np.linalg.norm(direction) or 1.0
                grads.append((size * direction).astype(self.dtype))
            yield self.fault(step, grads)


def at(steps, change):
    """A fault at these steps, and sound gradients at the others."""
    return lambda step, grads: change(grads) if step in steps else grads


def element(value, tensor=0):
    """One element of one tensor is `value`."""

    def change(grads):
        grads[tensor].flat[1] = value
        return grads

    return change


def tensor(value, which=1):
    """One tensor holds nothing else."""

    def change(grads):
        grads[which][...] = value
        return grads

    return change


def everything(value):
    """All tensors hold nothing else."""
    return lambda grads: [np.full_like(grad, value) for grad in grads]


def absent(*which):
    """These parameters have no gradient."""
    return lambda grads: [None if i in which else g for i, g in enumerate(grads)]


def signs(grads):
    grads[0].flat[:2] = INF, -INF
    grads[2].flat[:2] = NAN, INF
    return grads


def nan_then_absent(step, grads):
    if step in range(5, 10):
        return element(NAN)(grads)
    return absent(0)(grads) if step in range(10, 15) else grads


def times(factor):
    return lambda grads: [grad * grad.dtype.type(factor) for grad in grads]


def sound(step, grads):
    return grads


CASES = {
    f"{name} in {where}, {when}": Case(30, at(steps, change(value)))
    for value, name in [(NAN, "nan"), (INF, "inf"), (-INF, "-inf")]
    for where, change in [
        ("one element", element),
        ("one tensor", tensor),
        ("all", everything),
    ]
    for when, steps in [
        ("first", [0]),
        ("while the window fills", [2, 3]),
        ("in the middle", [15, 20]),
    ]
} | {
    "nothing": Case(30, sound),
    "100 steps of nan in a row": Case(125, at(range(12, 112), everything(NAN))),
    "100 steps of inf in one tensor": Case(125, at(range(12, 112), element(INF))),
    "an fp16 run that starts with overflows": Case(
        30, at([0, 1, 4], everything(INF)), np.float16
    ),
    "inf, -inf and nan at once": Case(20, at([9], signs)),
    "nan in all but one": Case(20, at([9], lambda g: [g[0], *everything(NAN)(g[1:])])),
    "squares that overflow": Case(24, at([7, 15], times(1e30))),
    "squares that underflow": Case(24, at([7, 15], times(1e-30))),
    "subnormal elements": Case(24, at([7, 15], times(1e-39))),
    "zero in one tensor": Case(24, at([0, 7, 8], tensor(0.0))),
    "all zero": Case(24, at([0, 7, 8], everything(0.0))),
    "zeros below 0": Case(24, at([7, 8], everything(-0.0))),
    "no gradient at all": Case(24, at([0, 7, 8], absent(*range(len(SHAPES))))),
    "a parameter that appears": Case(24, at(range(10), absent(1))),
    "a parameter that vanishes": Case(24, at(range(10, 24), absent(2))),
    "a parameter that comes and goes": Case(30, at(range(0, 30, 3), absent(0))),
    "nan, then absent, then back": Case(24, nan_then_absent),
    "a level ten times as high": Case(
        40, sound, sizes=lambda s: 10.0 if s > 15 else 1.0
    ),
    "a level of a tenth": Case(40, sound, sizes=lambda s: 0.1 if s > 15 else 1.0),
    "a drift by a factor of 1000": Case(60, sound, sizes=lambda s: 10 ** (s / 20)),
    "one spike": Case(30, at([12], times(1e6))),
    "every other step a spike": Case(30, at(range(1, 30, 2), times(50.0))),
    "two levels": Case(30, at(range(15, 30), times(0.5)), spread=0.0),
    "a huge learning signal": Case(24, sound, sizes=lambda s: 1e25),
    "a tiny learning signal": Case(24, sound, sizes=lambda s: 1e-25),
    "both by turns": Case(24, sound, sizes=lambda s: [1e15, 1e-15][s % 2]),
    "a norm above every float32": Case(24, at([7, 15], everything(3e38))),
    "float16": Case(24, at([9], element(INF)), np.float16),
    "a float16 norm above its largest": Case(
        24, at([9, 10], everything(6e4)), np.float16
    ),
}


KINDS = {
    "sound": lambda grad: grad,
    "absent": lambda grad: None,
    "nan": lambda grad: np.full_like(grad, NAN),
    "an inf": lambda grad: np.where(grad == grad[:1], -INF, grad),
    "zero": np.zeros_like,
    "large": lambda grad: grad * grad.dtype.type(1e3),
    "small": lambda grad: grad * grad.dtype.type(1e-2),
}


@st.composite
def drawn(draw):
    """Any case: each parameter at each step may be anything."""
    kind = st.sampled_from([*KINDS, *["sound"] * len(KINDS)])
    step = st.tuples(*(kind for _ in SHAPES))
    kinds = draw(st.lists(step, min_size=2, max_size=15))
    level = draw(st.sampled_from([1e-20, 1e-3, 1.0, 1e10]))
    dtype = draw(st.sampled_from([np.float32, np.float16]))

    def fault(step, grads):
        pairs = zip(kinds[step], grads, strict=True)
        return [
            KINDS[kind](grad).astype(dtype) if kind != "absent" else None
            for kind, grad in pairs
        ]

    size = 1.0 if dtype is np.float16 else level
    return Case(len(kinds), fault, dtype, lambda step: size)


def norm_of(gradient):
    """The norm in float64, as far as float32 has it: 0 below, infinite above."""
    if not np.isfinite(gradient).all():
        return NAN
    norm = float(np.linalg.norm(np.float64(gradient)))
    return 0.0 if norm < SMALLEST_NORMAL else INF if norm > LARGEST else norm


def check(case, threshold_of, thresholds, results, rtol=2e-6):
    """Compare what a framework made of a series with the account of plain lists.

    Args:
      case: the series.
      threshold_of: from the norms so far to the threshold.
      thresholds: one per step and parameter.
      results: gradients per step and parameter; None where there was none.
      rtol: of thresholds and of clipped float32 gradients.
    """
    past = [[] for _ in SHAPES]
    for step, grads in enumerate(case.series()):
        for row, grad in enumerate(grads):
            where = f"step {step}, parameter {row}"
            limit = threshold_of(past[row])
            np.testing.assert_allclose(
                thresholds[step][row], limit, rtol, err_msg=where
            )
            result = results[step][row]
            if grad is None:
                assert result is None, where
                continue
            norm, result = norm_of(grad), np.asarray(result)
            assert result.dtype == grad.dtype, where
            assert np.isfinite(result).all(), where
            if not math.isfinite(norm):
                assert not result.any(), where
                continue
            if norm > 0:
                past[row].append(norm)
            if limit < INF and abs(norm - limit) <= rtol * limit:
                continue  # either may be said to be larger
            if norm < limit:
                np.testing.assert_array_equal(result, grad, err_msg=where, strict=True)
                continue
            wanted = np.float64(grad) * (limit / norm)
            half = grad.dtype == np.float16
            close = {"rtol": 1e-3, "atol": 6e-8} if half else {"rtol": rtol}
            # What is subnormal may be flushed.
            close["atol"] = max(close.get("atol", 0), SMALLEST_NORMAL)
            np.testing.assert_allclose(result, wanted, **close, err_msg=where)
