"""The two parts of a row with `scale_only`: what clipping scales, and the rest.

A vector over the parts has 2 * rows entries: the scaled part of each row, then the rest
of each row. A part without a gradient has the norm 0. The adapter measures the parts,
joins them, decides on the rows, and gives each part its scale. Without `scale_only`, a
row is not divided, and nothing here is called.
"""

import numpy as np

from autoclip_core.decision import Decision
from autoclip_core.scale import XP, Array

from .norms import combine_norms


def join_norms(
    norms: Array, norm: str = "l2", *, sizes: Array = None, xp: XP = np
) -> Array:
    """Return the norm of each row from the norms of its parts.

    Args:
      norms: the norms of the parts, shape (2 * rows,).
      norm: the norm, as in `combine_norms`.
      sizes: with "rms", the number of elements of each part; 0 for an absent part.
      xp: the array namespace; it must also have `max`.

    >>> join_norms(np.array([3.0, 0.0, 4.0, 2.0])).tolist()
    [5.0, 2.0]
    """
    pair = _stack(norms, xp)
    pair_sizes = None if sizes is None else _stack(sizes, xp)
    return combine_norms(pair, norm, sizes=pair_sizes, xp=xp)


def join_observed(observed: Array) -> Array:
    """Return which rows have a gradient from which of their parts have one.

    >>> join_observed(np.array([True, False, False, False])).tolist()
    [True, False]
    """
    rows = observed.shape[0] // 2
    return observed[:rows] | observed[rows:]


def get_part_scales(decision: Decision, xp: XP = np) -> Array:
    """Return the scale of each part, shape (2 * rows,).

    The rest of a row has scale 1, unless the row is removed as a whole: then both parts
    have the scale of the row.

    >>> from autoclip_core import Fixed, decide
    >>> _, decision = decide(Fixed(1.0), (), [4.0, float("nan")])
    >>> get_part_scales(decision).tolist()
    [0.25, 0.0, 1.0, 0.0]
    """
    is_whole = decision.dropped | decision.skipped | ~decision.finite
    rest = xp.where(is_whole, decision.scale, 1.0)
    return xp.concatenate([decision.scale, rest], axis=0)


def measure_scale(
    decision: Decision,
    part_norms: Array,
    norm: str = "l2",
    *,
    sizes: Array = None,
    xp: XP = np,
) -> Decision:
    """Return the decision with the norm after scaling / the norm before as its scale.

    Args:
      decision: a decision whose scale is the factor of the scaled part.
      part_norms: the norms of the parts, shape (2 * rows,), that led to it.
      norm, sizes: as in `join_norms`.
      xp: the array namespace.

    >>> from autoclip_core import Fixed, decide
    >>> _, decision = decide(Fixed(1.0), (), [5.0])
    >>> measured = measure_scale(decision, np.array([3.0, 4.0]))
    >>> f"{decision.scale[0]:.4f} {measured.scale[0]:.4f}"
    '0.2000 0.8089'
    """
    scales = get_part_scales(decision, xp)
    is_clipped = decision.clipped & ~decision.dropped & ~decision.skipped
    norms = xp.where(xp.concatenate([is_clipped, is_clipped]), part_norms, 1.0)
    before = xp.where(is_clipped, join_norms(norms, norm, sizes=sizes, xp=xp), 1.0)
    after = join_norms(norms * scales, norm, sizes=sizes, xp=xp)
    ratio = xp.asarray(after / before, dtype=xp.float32)
    return decision._replace(scale=xp.where(is_clipped, ratio, decision.scale))


def _stack(parts: Array, xp: XP) -> Array:
    """Return a vector over the parts as an array of shape (2, rows)."""
    rows = parts.shape[0] // 2
    return xp.concatenate([parts[None, :rows], parts[None, rows:]], axis=0)
