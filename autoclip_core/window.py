"""The last H norms of each row: quantile, mean and deviation without sorting.

A window keeps each row twice: in arrival order (a ring) and in ascending order between
sentinels, `[-inf, s_1 ... s_H, +inf]`, where empty slots are +inf. A new norm replaces
the oldest one in the ordered row by two elementwise lines; nothing is ever sorted:

    inserted = min(max(ordered[:-1], new), ordered[1:])             H + 1 ascending
    replaced = inserted[:-1] where it is below the oldest, else inserted[1:]

so the same lines compile under XLA and cost H operations a row. The norms are finite
and positive: `decide` lets nothing else in, which the +inf padding relies on.

`History` keeps all norms. Its shape grows, so it lives on the host, in NumPy, only.
"""

from typing import Any, NamedTuple

import numpy as np

from .scale import Array
from .tables import look_up, tables

MOST_BYTES = 2**30


class Window(NamedTuple):
    """The last H norms of each row."""

    ring: Array
    """Shape (rows, H): in arrival order, +inf where still empty."""
    ordered: Array
    """Shape (rows, H + 2): the same, ascending between -inf and +inf."""
    count: Array
    """Shape (rows,): norms recorded, kept in [0, 2H) so that it never overflows."""


class History(NamedTuple):
    """All norms of each row, for the host only."""

    ordered: Array
    """Shape (rows, capacity + 2): ascending between -inf and +inf."""
    count: Array
    """Shape (rows,): norms recorded."""


def empty(rows: int, length: int | None, xp: Any = np) -> Window | History:
    """Return a window of `length` norms per row, or with None one that keeps them all.

    Raises:
      ValueError: the window would exceed 1 GiB, or keeps all norms off the host.
    """
    if length is None:
        if xp is not np:
            raise ValueError(
                "history_length must be a number where shapes are static (JAX, graphs, "
                "accelerators), got None; set history_length=1000, or use "
                "StreamingQuantile, which remembers all norms in one number"
            )
        return History(_ordered(rows, 64, np), np.zeros((rows,), np.int32))
    size = 4 * rows * (2 * length + 3)
    if size > MOST_BYTES:
        raise ValueError(
            f"history_length={length} for {rows} rows takes {size / 2**30:.1f} GiB, "
            "more than 1 GiB; shorten history_length, choose a coarser scope, or use "
            "StreamingQuantile, which keeps one number per row"
        )
    ring = xp.full((rows, length), float("inf"), dtype=xp.float32)
    return Window(ring, _ordered(rows, length, xp), xp.zeros((rows,), dtype=xp.int32))


def push(window: Any, norms: Array, xp: Any = np) -> Any:
    """Return the window after one more norm in each row; the oldest one leaves."""
    if isinstance(window, History):
        return _insert(window, norms)
    if xp is np and len(norms) == 1:
        return _replace(window, norms[0])
    ring, ordered, count = window
    length = ring.shape[1]
    new = norms[:, None]
    slot = xp.where(count < length, count, count - length)
    at_slot = xp.arange(length, dtype=xp.int32)[None, :] == slot[:, None]
    oldest = xp.sum(xp.where(at_slot, ring, 0.0), axis=1)[:, None]
    inserted = xp.minimum(xp.maximum(ordered[:, :-1], new), ordered[:, 1:])
    below = inserted[:, :-1]
    replaced = xp.where(below < oldest, below, inserted[:, 1:])
    return Window(
        xp.where(at_slot, new, ring),
        xp.concatenate([ordered[:, :1], replaced, ordered[:, -1:]], axis=1),
        xp.where(count + 1 < 2 * length, count + 1, length),
    )


def filled(window: Any, xp: Any = np) -> Array:
    """Return how many norms each row holds, shape (rows,)."""
    if isinstance(window, History):
        return window.count
    length = window.ring.shape[1]
    return xp.where(window.count < length, window.count, length)


def quantile(window: Any, q: float, xp: Any = np) -> Array:
    """Return the linear q-quantile of each row, as `np.quantile`; +inf where empty.

    Rank and weight come from float64 tables: `(n - 1) * q` in float32 is off by up to
    194 units in the last place, and JAX has no float64 by default.
    """
    if xp is np and isinstance(window, Window) and len(window.count) == 1:
        return _quantile_of_one(window, q)
    n = filled(window, xp)
    places, weight = _look_up(window, n, _ranks, q, xp)
    pair = _pick(window.ordered, places, xp)
    some = n > 0  # an empty row is +inf throughout, and inf - inf would warn
    below = xp.where(some, pair[:, 0], 0.0)
    above = xp.where(some, pair[:, 1], 0.0)
    # As NumPy does: from the nearer end, so that the result is monotonic in q.
    base = xp.where(weight < 0, above, below)
    return xp.where(some, base + (above - below) * weight, float("inf"))


def mean_std(
    window: Any, *, log: bool, ddof: int, xp: Any = np
) -> tuple[Array, Array, Array]:
    """Return for each row a middle norm, and mean and deviation measured from there.

    With norms x_i and their median m, these are the mean and the standard deviation of
    x_i - m, or with `log` of ln(x_i / m). Equal norms have exactly the mean 0, which a
    plain mean does not grant. No raw norm is squared: that of 3e30 would be infinite.
    Rows with fewer than max(2, ddof + 1) norms have no deviation: theirs is +inf.
    """
    n = filled(window, xp)
    values = window.ordered[:, 1:-1]
    valid = xp.arange(values.shape[1], dtype=xp.int32)[None, :] < n[:, None]
    places = xp.concatenate([n[:, None], (n[:, None] + 1) // 2], axis=1)
    ends = _pick(window.ordered, places, xp)
    some = n > 0
    largest = xp.where(some, ends[:, 0], 1.0)[:, None]
    middle = xp.where(some, ends[:, 1], 1.0)[:, None]
    divisor, freedom = _look_up(window, n, _divisors, ddof, xp)
    if log:
        # A ratio to the median could underflow; to the middle of the range it cannot.
        smallest = xp.where(some, values[:, 0], 1.0)[:, None]
        centre = xp.sqrt(largest) * xp.sqrt(smallest)
        logs = xp.log(xp.where(valid, values, centre) / centre)
        apart = logs - xp.log(middle / centre)
        unit = divisor / divisor
    else:
        apart = xp.where(valid, values, middle) - middle
        unit = largest[:, 0]
    mean = xp.sum(xp.where(valid, apart / divisor[:, None], 0.0), axis=1)
    around = xp.where(valid, apart - mean[:, None], 0.0) / unit[:, None]
    std = unit * xp.sqrt(xp.sum(around * around, axis=1) / freedom)
    enough = n >= max(2, ddof + 1)
    return middle[:, 0], mean, xp.where(enough, std, float("inf"))


def _ordered(rows: int, length: int, xp: Any) -> Array:
    lowest = xp.full((rows, 1), -float("inf"), dtype=xp.float32)
    slots = xp.full((rows, length + 1), float("inf"), dtype=xp.float32)
    return xp.concatenate([lowest, slots], axis=1)


def _replace(window: Window, norm: Array) -> Window:
    """Do as `push` in a single row on the host, where to move a few beats H selects."""
    ring, ordered, count = (array.copy() for array in window)
    length, seen = ring.shape[1], int(count[0])
    slot = seen if seen < length else seen - length
    row = ordered[0]
    out, into = row.searchsorted(ring[0, slot]), row.searchsorted(norm)
    if into > out:
        row[out : into - 1] = row[out + 1 : into]
        row[into - 1] = norm
    else:
        row[into + 1 : out + 1] = row[into:out]
        row[into] = norm
    ring[0, slot] = norm
    count[0] = seen + 1 if seen + 1 < 2 * length else length
    return Window(ring, ordered, count)


def _quantile_of_one(window: Window, q: float) -> Array:
    """Do as `quantile` for a single row on the host, in float32 scalars."""
    length = window.ring.shape[1]
    n = min(int(window.count[0]), length)
    if not n:
        return np.full(1, np.inf, np.float32)
    places, weights = tables(_ranks, length, q)
    row, (lower, upper), weight = window.ordered[0], places[n], weights[n]
    below, above = row[lower], row[upper]
    base = above if weight < 0 else below
    return np.array([base + (above - below) * weight])


def _pick(ordered: Array, places: Array, xp: Any) -> Array:
    """Return `take_along_axis` of the rows; NumPy's own takes ten times the time."""
    if xp is np:
        return ordered[np.arange(len(ordered))[:, None], places]
    return xp.take_along_axis(ordered, places, axis=1)


def _insert(history: History, norms: Array) -> History:
    """Insert each norm into its ordered row; double the row when it is full."""
    ordered, count = history
    capacity = ordered.shape[1] - 2
    if count.max(initial=0) == capacity:
        more = np.full((len(ordered), capacity), np.inf, np.float32)
        ordered = np.concatenate([ordered, more], axis=1)
    else:
        ordered = ordered.copy()
    for row, (n, norm) in enumerate(zip(count.tolist(), norms, strict=True)):
        place = np.searchsorted(ordered[row, : n + 1], norm)
        ordered[row, place + 1 : n + 2] = ordered[row, place : n + 1]
        ordered[row, place] = norm
    return History(ordered, count + np.int32(1))


def _look_up(
    window: Any, n: Array, function: Any, argument: float, xp: Any
) -> list[Array]:
    """Return `function(n, argument)`, for a window out of tables made once."""
    if isinstance(window, History):
        return list(function(n, argument))
    found: list[Array] = look_up(function, window.ring.shape[1], argument, n=n, xp=xp)
    return found


def _ranks(n: Array, q: float) -> tuple[Array, Array]:
    """Return the two places in an ordered row of n norms and the weight between them.

    The quantile is `below + (above - below) * w` for w >= 0, and from above for w < 0.
    """
    last = np.maximum(n - 1, 0)
    rank = last * q
    lower = np.floor(rank)
    part = rank - lower
    weight = np.where(part < 0.5, part, part - 1)
    places = np.stack([lower, np.minimum(lower + 1, last)], axis=-1) + 1
    return places.astype(np.int32), weight.astype(np.float32)


def _divisors(n: Array, ddof: int) -> tuple[Array, Array]:
    """Return n and n - ddof, at least 1, as float32."""
    freedom = np.maximum(n - ddof, 1)
    return np.maximum(n, 1).astype(np.float32), freedom.astype(np.float32)
