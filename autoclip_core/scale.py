"""Compute a scale from a norm and a limit: the rules for zero, infinity and NaN.

| case                     | scale                                            |
|--------------------------|--------------------------------------------------|
| n <= T                   | exactly 1                                        |
| n > T                    | R / n, with nothing added to the divisor         |
| n = 0                    | 1                                                |
| T = +inf (no threshold)  | 1                                                |
| n is NaN or infinite     | 0 ("zero"), 1 ("propagate"), all rows 0 ("skip") |
| row not observed         | 1                                                |

These rules are the same in every framework. `scale_rows` gets finite norms only:
`decide` applies the two rules for NaN, for infinity and for rows that are not observed.
This file imports no other file of the package, so it can serve alone as the reference
for an adapter.
"""

from contextlib import nullcontext
from typing import Any

import numpy as np

Array = Any

XP = Any
"""The module of array functions to compute with: NumPy, `jax.numpy` and others."""

NONFINITE = ("zero", "skip", "raise", "propagate")
"""The choices for a row whose norm is NaN or infinite."""

SMALLEST_NORMAL = 1.1754943508222875e-38
"""Norms below the smallest normal float32 count as 0: XLA and TensorFlow flush them."""


def as_norms(norms: Array, xp: XP = np) -> Array:
    """Return the norms as float32: subnormal as 0, above the float32 range as inf."""
    with np.errstate(over="ignore") if xp is np else nullcontext():
        norms = xp.asarray(norms, dtype=xp.float32)
    return xp.where(norms < SMALLEST_NORMAL, 0.0, norms)


def scale_rows(
    norms: Array, threshold: Array, target: Array, xp: XP = np
) -> tuple[Array, Array]:
    """Scale each row that exceeds its threshold to its target: s = R/n where n > T.

    Args:
      norms: finite norms, shape (rows,); 0 for a row without a gradient.
      threshold: T, shape (rows,); +inf for a row without a threshold.
      target: R, shape (rows,), at most T.
      xp: the array namespace.

    Returns:
      The scale, exactly 1 if n <= T, and whether the row is clipped.

    >>> scale, clipped = scale_rows(
    ...     np.float32([1, 4]), np.float32([2, 2]), np.float32([2, 2]))
    >>> scale.tolist(), clipped.tolist()
    ([1.0, 0.5], [False, True])
    """
    clipped = norms > threshold
    # NumPy would warn about a division by 0, even if `where` discards its result.
    divisor = xp.where(clipped, norms, 1.0)
    return xp.where(clipped, target / divisor, 1.0), clipped
