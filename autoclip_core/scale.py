"""Compute a scale from a norm and a limit: the rules for zero, infinity and NaN.

| case                     | scale                                            |
|--------------------------|--------------------------------------------------|
| n > D                    | 0: the row is dropped, also if n <= T            |
| n <= T                   | exactly 1                                        |
| n > T                    | R / n, with nothing added to the divisor         |
| n > T, R / n rounds to 0 | 0, and the row counts as dropped                 |
| n = 0                    | 1                                                |
| T = D = +inf (no limit)  | 1                                                |
| n is NaN or infinite     | 0 ("zero"), 1 ("propagate"), all rows 0 ("skip") |
| row not observed         | 1                                                |

These rules are the same in every framework. `scale_rows` gets finite norms only:
`decide` applies the two rules for NaN, for infinity and for rows that are not observed.
This file imports no other file of the package, so it can serve alone as the reference
for an adapter.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np

Array = Any

XP = Any
"""The module of array functions to compute with: NumPy, `jax.numpy` and others."""

NONFINITE = ("zero", "skip", "raise", "propagate")
"""The choices for a row whose norm is NaN or infinite."""

SMALLEST_NORMAL = 1.1754943508222875e-38
"""Norms below the smallest normal float32 count as 0: XLA and TensorFlow flush them."""


class Limit(NamedTuple):
    """The limit of each row: the first that holds decides what happens to a norm n.

    | n > D     | the row is dropped: its gradient becomes 0 |
    | n > T     | the row is scaled to the norm R            |
    | otherwise | the gradient is unchanged                  |
    """

    threshold: Array
    """T, shape (rows,): norms up to T are not clipped; +inf without a threshold."""
    target: Array
    """R <= T, shape (rows,): the norm of a clipped row after scaling. A target of 0
    makes T a drop level."""
    inner: "Limit | tuple[Limit, ...] | None" = None
    """The limits of the inner policies of a combinator; each policy records against its
    own."""
    cancels: bool = False
    """Whether a dropped row cancels the whole update."""
    drop: Array = float("inf")
    """D, shape (rows,) or one number for all rows; +inf drops nothing."""


LARGEST_DIVISOR = 8.507059173023462e37
"""2**126: XLA multiplies by 1 / divisor, and flushes it if the divisor is larger."""


def ignore_overflow(xp: XP) -> AbstractContextManager[Any]:
    """Return a context in which NumPy does not warn that a number exceeds float32.

    The number becomes infinite. In another namespace the context does nothing.
    """
    is_numpy = xp.float32 is np.float32
    return np.errstate(over="ignore") if is_numpy else nullcontext()


def as_norms(norms: Array, xp: XP = np) -> Array:
    """Return the norms as float32: subnormal as 0, above the float32 range as inf."""
    with ignore_overflow(xp):
        norms = xp.asarray(norms, dtype=xp.float32)
    return xp.where(norms < SMALLEST_NORMAL, 0.0, norms)


def as_divisor(magnitudes: Array, xp: XP = np) -> Array:
    """Return magnitudes to divide by: 1 in place of 0, and at most LARGEST_DIVISOR.

    >>> as_divisor(np.float32([0, 0.5, 3e38])).tolist()
    [1.0, 0.5, 8.507059173023462e+37]
    """
    divisor = xp.where(magnitudes > 0, magnitudes, 1.0)
    return xp.where(divisor < LARGEST_DIVISOR, divisor, LARGEST_DIVISOR)


def square_root(values: Array, xp: XP = np) -> Array:
    """Return the square roots of values >= 0, with the derivative 0 at 0.

    The derivative of a plain root is infinite at 0. Times 0 it is NaN, also if `where`
    discards that root. So a gradient through a clipper would be NaN.

    >>> square_root(np.float32([0, 4])).tolist()
    [0.0, 2.0]
    """
    if xp is np:
        return np.sqrt(values)
    is_zero = values == 0
    return xp.where(is_zero, 0.0, xp.sqrt(xp.where(is_zero, 1.0, values)))


def divide(values: Array, divisors: Array, xp: XP = np) -> Array:
    """Return values / divisors, by the function `divide_smoothly` of xp if it has one.

    The usual derivative of a quotient contains 1 / divisor**2, which is infinite in
    float32 for norms below 1e-19.
    """
    # NumPy takes 50 times as long to say that it has no attribute.
    divide_smoothly = None if xp is np else getattr(xp, "divide_smoothly", None)
    if divide_smoothly is None:
        return values / divisors
    return divide_smoothly(values, divisors)


def scale_rows(
    norms: Array, threshold: Array, target: Array, drop: Array, xp: XP = np
) -> tuple[Array, Array, Array]:
    """Scale each row by its limit: s = 0 where n > D, else R/n where n > T, else 1.

    Args:
      norms: finite norms, shape (rows,); 0 for a row without a gradient.
      threshold: T, shape (rows,); +inf for a row without a threshold.
      target: R, shape (rows,), at most T.
      drop: D, shape (rows,) or one number; +inf drops nothing.
      xp: the array namespace.

    Returns:
      The scale, whether the row is clipped (n > T or n > D), and whether it is dropped.

    >>> twos = np.float32([2, 2, 2])
    >>> scale, clipped, dropped = scale_rows(np.float32([1, 4, 9]), twos, twos, 8.0)
    >>> scale.tolist(), clipped.tolist(), dropped.tolist()
    ([1.0, 0.5, 0.0], [False, True, True], [False, False, True])
    """
    is_above, dropped = norms > threshold, norms > drop
    # NumPy would warn about a division by 0, even if `where` discards its result.
    divisor = xp.where(is_above, norms, 1.0)
    scale = xp.where(is_above, divide(target, divisor, xp), 1.0)
    # A quotient that rounds to 0 removes the row, and must not do so in silence.
    dropped = dropped | (scale == 0)
    return xp.where(dropped, 0.0, scale), is_above | dropped, dropped


def refine_scale(scale: Array, target: Array, norms: Array, xp: XP = np) -> Array:
    """Return the scale as R / n in the type of the norms, where it is not 0 or 1.

    >>> refine_scale(np.float32([1, 1 / 3]), np.float32([2, 1]), np.array([1.0, 3.0]))
    array([1.        , 0.33333333])
    """
    is_between = (scale > 0) & (scale < 1)
    divisor = xp.where(is_between, norms, 1.0)
    scale, target = (xp.asarray(x, dtype=norms.dtype) for x in (scale, target))
    return xp.where(is_between, divide(target, divisor, xp), scale)


def complete_limit(limit: Limit, xp: XP = np) -> Limit:
    """Return the limit with one D per row; where R is 0, D is min(T, D) and T is +inf.

    >>> limit = complete_limit(Limit(np.float32([2, 2]), np.float32([0, 1])))
    >>> limit.drop.tolist(), limit.threshold.tolist()
    ([2.0, inf], [inf, 2.0])
    """
    threshold, target, inner, cancels, drop = limit
    drop = xp.where(threshold > 0, drop, threshold)
    if target is threshold:
        return Limit(threshold, target, inner, cancels, drop)
    is_drop = (threshold > 0) & (target <= 0)
    drop = xp.where(is_drop & (threshold < drop), threshold, drop)
    threshold = xp.where(is_drop, float("inf"), threshold)
    target = xp.where(is_drop, threshold, target)
    return Limit(threshold, target, inner, cancels, drop)


def find_level(limit: Limit, xp: XP = np) -> Array:
    """Return min(T, D): the norm above which a row is clipped or dropped."""
    return xp.where(limit.threshold > limit.drop, limit.drop, limit.threshold)
