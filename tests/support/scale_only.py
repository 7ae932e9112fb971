"""Cases for `scale_only` in every framework, and what the rules say, in float64."""

import numpy as np

from autoclip_core import Drop, Fixed

from .account import norm_of

INF, NAN = float("inf"), float("nan")
SHAPES = {"w": (3, 4), "v": (3,), "u": (2, 3)}
SCALED = ["w", "u"]

# The row of each element. A unit is an index of the first axis in torch, and of the
# last axis in Keras and JAX.
ROWS = {
    "global": {name: np.zeros(shape, int) for name, shape in SHAPES.items()},
    "group": {name: np.full(shape, name == "u", int) for name, shape in SHAPES.items()},
    "parameter": {name: np.full(SHAPES[name], i) for i, name in enumerate(SHAPES)},
    "unit": {
        "w": np.broadcast_to(np.arange(3)[:, None], (3, 4)),
        "v": np.full(3, 3),
        "u": np.broadcast_to(4 + np.arange(2)[:, None], (2, 3)),
    },
    "unit of the last axis": {
        "w": np.broadcast_to(np.arange(4), (3, 4)),
        "v": np.full(3, 4),
        "u": np.broadcast_to(5 + np.arange(3), (2, 3)),
    },
}

# The policy, its threshold T and its drop level D.
POLICIES = {
    "clip": (Fixed(1.0), 1.0, INF),
    "drop": (Drop(Fixed(2.0)), INF, 2.0),
    "clip and drop": (Drop(Fixed(3.0), clip=Fixed(1.0)), 1.0, 3.0),
    "clip and skip": (Drop(Fixed(3.0), clip=Fixed(1.0), action="skip"), 1.0, 3.0),
}


NORMS = {"clip": "rms", "drop": "max", "clip and drop": "l2", "clip and skip": "rms"}
"""The norm with which each policy is tested."""


def make_series():
    """Return gradients: small, large, not finite, missing, and of very large norm."""
    rng = np.random.default_rng(0)
    series = []
    for step, size in enumerate([0.1, 0.5, 1, 2, 8, 1, 1, 1, 1e30]):
        grads = {n: np.float32(size * rng.normal(size=s)) for n, s in SHAPES.items()}
        if step == 5:
            grads["v"][0] = NAN
        if step == 6:
            grads["w"][1, 1] = INF
        if step == 7:
            grads["v"] = None
        series.append(grads)
    return series


def expect(grads, rows, policy, nonfinite="zero", kind="l2"):
    """Return the gradients after a step, and the norms before and after, by the rules.

    The gradients are None if the update is skipped. The norms leave out the rows that
    are not finite, and are NaN if there are no others.

    Args:
      grads: the gradients by name, as in `make_series`.
      rows: a value of `ROWS`.
      policy: a value of `POLICIES`.
      nonfinite: as in `Clipper`.
      kind: the norm.
    """
    _, threshold, drop = policy
    given = {name: np.float64(g) for name, g in grads.items() if g is not None}
    after = {name: grad.copy() for name, grad in given.items()}
    before, remaining, is_skipped = [], [], False
    for row in sorted({row for name in given for row in rows[name].flat}):
        inside = {name: rows[name] == row for name in given}
        members = [given[name][inside[name]] for name in given]
        norm = norm_of(members, kind)
        finite = np.isfinite(norm)
        is_removed = norm > drop if finite else nonfinite in ("zero", "skip")
        skips = "skip" in (str(policy[0]) if finite else nonfinite)
        is_skipped |= bool(is_removed and skips)
        for name, grad in after.items():
            if is_removed:
                grad[inside[name]] = 0
            elif finite and norm > threshold and name in SCALED:
                grad[inside[name]] *= threshold / norm
        if finite:
            before += members
            remaining += [after[name][inside[name]] for name in after]
    if not before:
        return (None if is_skipped else after), NAN, NAN
    norm, norm_after = norm_of(before, kind), norm_of(remaining, kind)
    return (None, norm, 0.0) if is_skipped else (after, norm, norm_after)
