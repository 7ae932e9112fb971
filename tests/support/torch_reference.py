"""A clipper in plain Python and NumPy, the reference for the torch tests.

It cuts the rows as the documentation says, computes norms in float64, and takes the
limits from the oracle in `golden/`. It uses nothing from the library.
"""

import math
from typing import NamedTuple

import numpy as np

from .traces import oracle


class Expected(NamedTuple):
    """The expected result of a step: one entry per row, and the gradients after it."""

    norm: np.ndarray
    threshold: np.ndarray
    scale: np.ndarray
    clipped: np.ndarray
    finite: np.ndarray
    skipped: np.ndarray
    dropped: np.ndarray
    gradients: list


class Reference:
    """A clipper over lists: rows, one policy per row, and `step()`.

    Args:
      shapes: the parameters' shapes.
      code: the policy, or a list of one policy per group.
      scope: as for a clipper.
      groups: the indices of each group's parameters; None is one group of all.
      nonfinite: "zero", "skip" or "propagate".
    """

    def __init__(self, shapes, code, scope, groups=None, nonfinite="zero"):
        groups = groups or [range(len(shapes))]
        codes = code if isinstance(code, list) else [code] * len(groups)
        self.shapes, self.nonfinite = shapes, nonfinite
        self.rows, self.policies, self.cancels = [], [], []
        # The rows of one policy are consecutive, in the order of their groups.
        for policy in dict.fromkeys(codes):
            pairs = zip(groups, codes, strict=True)
            rows = cut(shapes, scope, [group for group, of in pairs if of == policy])
            self.rows += rows
            self.policies += [oracle().evaluate(policy) for _ in rows]
            self.cancels += ["skip" in policy] * len(rows)

    def step(self, gradients, parameters):
        """Take arrays, or None for no gradient; return the expected result."""
        by_row = [values_of(row, gradients) for row in self.rows]
        weights = [values_of(row, parameters) for row in self.rows]
        observed = [values is not None for values in by_row]
        norms = [norm_of(values) if values is not None else 0.0 for values in by_row]
        finite = [math.isfinite(norm) for norm in norms]
        known = [norm if ok else 0.0 for norm, ok in zip(norms, finite, strict=True)]
        inputs = list(zip(known, map(norm_of, weights), strict=True))
        pairs = list(zip(self.policies, inputs, strict=True))
        limits = [policy.limit(*given) for policy, given in pairs]
        drops = [policy.drop_level(*given) for policy, given in pairs]
        levels = [min(t, d) for (t, _), d in zip(limits, drops, strict=True)]
        clipped = [n > level for n, level in zip(known, levels, strict=True)]
        dropped = [n > drop for n, drop in zip(known, drops, strict=True)]
        bad = self.nonfinite == "skip" and not all(finite)
        over = any(d and k for d, k in zip(dropped, self.cancels, strict=True))
        scales = []
        for row, policy in enumerate(self.policies):
            if (bad or over) and observed[row]:
                scale = 0.0
            elif not finite[row]:
                scale = 1.0 if self.nonfinite == "propagate" else 0.0
            elif dropped[row]:
                scale = 0.0
            else:
                scale = limits[row][1] / norms[row] if clipped[row] else 1.0
            scales.append(scale)
            if observed[row] and finite[row] and norms[row] > 0 and not bad:
                policy.learn(norms[row])
        return Expected(
            np.where(observed, norms, np.nan),
            np.array(levels),
            np.array(scales),
            np.array(clipped),
            np.array(finite),
            np.full(len(observed), bad or over),
            np.array(dropped),
            self._scaled(gradients, scales, bad or over),
        )

    def _scaled(self, gradients, scales, skipped):
        after = [None if g is None or skipped else g.astype(float) for g in gradients]
        for row, scale in zip(self.rows, scales, strict=True):
            for place, index in row:
                if after[place] is not None and scale != 1:
                    after[place][index] = scale * after[place][index] if scale else 0.0
        return after


def cut(shapes, scope, groups):
    """Return the rows: lists of (number of the parameter, index into its axis 0)."""
    if scope == "global":
        return [[(place, ...) for group in groups for place in group]]
    if scope == "group":
        return [[(place, ...) for place in group] for group in groups]
    places = [place for group in groups for place in group]
    if scope == "parameter":
        return [[(place, ...)] for place in places]
    return [
        [(place, index)]
        for place in places
        for index in (range(shapes[place][0]) if len(shapes[place]) > 1 else [...])
    ]


def values_of(row, arrays):
    """Return all elements of a row in one vector; None if the row has no gradient."""
    parts = [
        arrays[place][index].ravel()
        for place, index in row
        if arrays[place] is not None
    ]
    return np.concatenate(parts) if parts else None


def norm_of(values):
    """Return the norm, summed in float64 and rounded to float32."""
    return float(np.float32(np.sqrt(np.sum(np.square(values, dtype=np.float64)))))


def arrays(tensors):
    """Return copies as NumPy arrays; None stays None."""
    return [None if t is None else t.detach().float().numpy().copy() for t in tensors]


def check_close(actual, expected, rtol):
    """Do as `assert_allclose`, which takes four times as long and gives the message."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    if actual.shape == expected.shape:
        with np.errstate(invalid="ignore"):  # the difference of two infinities
            deviation = np.abs(actual - expected)
        is_close = (deviation <= rtol * np.abs(expected)) & (deviation < np.inf)
        is_same = (actual == expected) | (np.isnan(actual) & np.isnan(expected))
        if (is_close | is_same).all():
            return
    np.testing.assert_allclose(actual, expected, rtol=rtol)


def check_decision(decision, expected, rtol=1e-5):
    """Check a decision against the reference."""
    check_close(decision.norm, expected.norm, rtol=2e-6)
    check_close(decision.threshold, expected.threshold, rtol=rtol)
    check_close(decision.scale, expected.scale, rtol=rtol)
    for name in ("clipped", "finite", "skipped", "dropped"):
        assert np.array_equal(getattr(decision, name), getattr(expected, name)), name


def check_gradients(parameters, expected, rtol=1e-5):
    """Check the gradients after a step against the reference."""
    for parameter, gradient in zip(parameters, expected.gradients, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        if gradient is not None:
            check_close(parameter.grad, gradient, rtol=rtol)
