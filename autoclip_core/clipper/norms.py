"""What the norm of a row is, and how the norms of its parts combine.

| norm  | of elements x         | of parts with norms n and sizes k |
|-------|-----------------------|-----------------------------------|
| "l2"  | `sqrt(sum(abs(x)^2))`  | `sqrt(sum(n^2))`                  |
| "rms" | `sqrt(mean(abs(x)^2))` | `sqrt(sum(k n^2) / sum(k))`       |
| "max" | `max(abs(x))`         | `max(n)`                          |

A size is a number of elements; a complex element counts once. A sparse or sharded
parameter counts whole. A parameter without a gradient is not part of its row. A row
without elements has the norm 0.
"""

import numpy as np

from autoclip_core.checks import check_choice
from autoclip_core.scale import XP, Array, as_divisor, divide, square_root

NORMS = ("l2", "rms", "max")
"""The choices for the `norm` of a clipper."""


def check_norm(norm: object) -> str:
    """Return the norm if it is one of `NORMS`."""
    way_out = 'torch\'s norm_type=2 is "l2", and norm_type=inf is "max"'
    return check_choice("norm", norm, NORMS, way_out)


def to_rms(l2_norms: Array, sizes: Array, xp: XP = np) -> Array:
    """Return the rms norms of rows from their l2 norms and sizes, shape (rows,).

    >>> to_rms(np.array([6.0, 0.0]), np.array([4.0, 0.0])).tolist()
    [3.0, 0.0]
    """
    return l2_norms / xp.sqrt(xp.where(sizes > 1, sizes, 1.0))


def combine_norms(
    norms: Array, norm: str = "l2", *, sizes: Array = None, xp: XP = np
) -> Array:
    """Return the norm of a whole from the norms of its parts; no square overflows.

    A part that is not finite makes the result not finite.

    Args:
      norms: the norms of the parts along the first axis; 0 for an absent part.
      norm: one of `NORMS`.
      sizes: the number of elements of each part, in the shape of `norms`; 0 for an
        absent part. Only "rms" uses them.
      xp: the array namespace; it must also have `max`.

    Returns:
      The norms of the wholes, in the shape of `norms` without the first axis.

    >>> parts = np.array([3.0, 4.0])
    >>> [float(combine_norms(parts, norm)) for norm in ("l2", "max")]
    [5.0, 4.0]
    >>> float(combine_norms(parts, "rms", sizes=np.array([7.0, 0.0])))
    3.0
    """
    if norms.shape[0] == 0:
        return xp.sum(norms, axis=0)
    largest = xp.max(norms, axis=0)
    if norm == "max":
        return largest
    unit = as_divisor(largest, xp)
    squares = divide(norms, unit, xp) ** 2
    if norm == "l2":
        return unit * square_root(xp.sum(squares, axis=0), xp)
    l2_norms = square_root(xp.sum(sizes * squares, axis=0), xp)
    return unit * to_rms(l2_norms, xp.sum(sizes, axis=0), xp)
