"""Finds out whether a log holds norms after clipping: many are equal to the largest."""

import numpy as np

from autoclip_core.record.step import Array

SHARE = 0.1
"""At least this share of the norms is at the ceiling, and at most this share above."""

CLOSE = 1e-3
"""Norms are equal if they differ by less, in proportion."""


def find_ceiling(logs: Array) -> float | None:
    """Return the norm that many norms are equal to and few exceed, or None.

    >>> find_ceiling(np.log([0.5, 0.7, 1.0, 1.0, 0.6, 1.0]))
    1.0
    """
    values, counts = np.unique(np.floor(logs / CLOSE), return_counts=True)
    is_next = np.diff(values) == 1
    pairs = np.append(counts[:-1] + counts[1:] * is_next, counts[-1:])
    most = int(pairs.argmax())
    larger = int(np.sum(logs >= (values[most] + 2) * CLOSE))
    if not max(2, SHARE * logs.size) <= pairs[most] or larger > SHARE * logs.size:
        return None
    return float(np.exp(np.median(logs[np.floor(logs / CLOSE) == values[most]])))


def has_norm_above(norms: Array, thresholds: Array) -> bool:
    """Return whether a norm exceeds its threshold, which no norm after clipping does.

    >>> has_norm_above(np.array([1.0, 3.0]), np.array([np.inf, 2.0]))
    True
    """
    is_above = norms / (1 + CLOSE) > thresholds
    return bool(np.any(is_above & np.isfinite(norms) & (thresholds > 0)))


def find_ceiling_of_thresholds(norms: Array, thresholds: Array) -> float | None:
    """Return the last threshold if many norms are equal to theirs and none exceeds it.

    >>> find_ceiling_of_thresholds(np.array([1.0, 2.0, 2.5]), np.array([1.0, 2.0, 3.0]))
    3.0
    """
    is_valid = np.isfinite(norms) & np.isfinite(thresholds) & (thresholds > 0)
    if not is_valid.any():
        return None
    ratio = norms[is_valid] / thresholds[is_valid]
    is_equal = abs(ratio - 1) <= CLOSE
    if is_equal.mean() < SHARE or ratio.max() > 1 + CLOSE:
        return None
    return float(thresholds[is_valid][-1])
