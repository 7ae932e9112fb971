"""Rows of norms in ascending order between -inf and +inf, and their quantiles."""

import numpy as np

from autoclip_core.scale import XP, Array

MAX_BYTES = 2**30


def check_size(rows: int, length: int | None, row_bytes: int) -> None:
    """Raise a ValueError if the rows exceed 1 GiB."""
    size = rows * row_bytes
    if size > MAX_BYTES:
        raise ValueError(
            f"history_length={length} for {rows} rows takes {size / 2**30:.1f} GiB, "
            "more than 1 GiB; shorten history_length, choose a coarser scope, or use "
            "StreamingQuantile, which needs one number per row"
        )


def make_ordered_rows(rows: int, length: int, xp: XP) -> Array:
    """Return empty rows of `length` slots between -inf and +inf."""
    lowest = xp.full((rows, 1), -float("inf"), dtype=xp.float32)
    slots = xp.full((rows, length + 1), float("inf"), dtype=xp.float32)
    return xp.concatenate([lowest, slots], axis=1)


def compute_ranks(n: Array, q: float) -> tuple[Array, Array]:
    """Return two places in an ordered row of n norms, and the weight w between them.

    The quantile is `below + (above - below) * w` for w >= 0, and
    `above + (above - below) * w` for w < 0.
    """
    last = np.maximum(n - 1, 0)
    rank = last * q
    lower = np.floor(rank)
    part = rank - lower
    weight = np.where(part < 0.5, part, part - 1)
    places = np.stack([lower, np.minimum(lower + 1, last)], axis=1) + 1
    return places.astype(np.int32), weight.astype(np.float32)


def interpolate(
    below: Array, above: Array, weight: Array, has_norms: Array, xp: XP = np
) -> Array:
    """Return the value between two neighbours of each row; +inf for an empty row.

    `compute_ranks` gives the weight.
    """
    below = xp.where(has_norms, below, 0.0)  # an empty row contains only +inf, and
    above = xp.where(has_norms, above, 0.0)  # inf - inf would warn
    # As in NumPy, the nearer end is the base: then the result is monotonic in q.
    base = xp.where(weight < 0, above, below)
    return xp.where(has_norms, base + (above - below) * weight, float("inf"))
