"""The last H norms of each row: quantile, mean and deviation without sorting.

A window keeps each row twice: in arrival order (a ring) and in ascending order between
sentinels, `[-inf, s_1 ... s_H, +inf]`, where empty slots are +inf. A new norm replaces
the oldest one in the ordered row by two elementwise lines; nothing is ever sorted:

    inserted = min(max(ordered[:-1], new), ordered[1:])             H + 1 ascending
    replaced = inserted[:-1] where it is below the oldest, else inserted[1:]

so the same lines compile under XLA and cost H operations a row. The norms are finite
and positive: `decide` lets nothing else in, which the +inf padding relies on.
"""

from typing import Any, NamedTuple

import numpy as np

from autoclip_core.scale import Array

from .lookup import get_tables, look_up_constants

MAX_BYTES = 2**30


class Window(NamedTuple):
    """The last H norms of each row."""

    ring: Array
    """Shape (rows, H): in arrival order, +inf where still empty."""
    ordered: Array
    """Shape (rows, H + 2): the same, ascending between -inf and +inf."""
    count: Array
    """Shape (rows,): norms recorded, kept in [0, 2H) so that it never overflows."""

    def find_problem(self) -> str:
        """Return what is wrong with a window that was read from somewhere, or ""."""
        ring, ordered, count = self
        length = ring.shape[1]
        most = 2 * length - 1  # it turns around there
        wrong = count[(count < 0) | (count > most)].tolist()
        if wrong:
            return f"counts {wrong[0]} norms, and must count 0 to {most}"
        here = np.arange(length) < filled(self)[:, None]
        if not ((ring > 0).all() and np.array_equal(ring < np.inf, here)):
            return "holds other norms in the order of arrival than it counts"
        ends = (ordered[:, [0, -1]] == [-np.inf, np.inf]).all()
        if not (ends and np.array_equal(ordered[:, 1:-1], np.sort(ring, axis=1))):
            return "holds other norms in ascending order than in the order of arrival"
        return ""


def empty(rows: int, length: int, xp: Any = np) -> Window:
    """Return a window of `length` norms per row.

    Raises:
      ValueError: the window would exceed 1 GiB.
    """
    check_size(rows, length, 4 * (2 * length + 3))
    ring = xp.full((rows, length), float("inf"), dtype=xp.float32)
    return Window(
        ring, ordered_rows(rows, length, xp), xp.zeros((rows,), dtype=xp.int32)
    )


def check_size(rows: int, length: int | None, row_bytes: int) -> None:
    """Refuse what would exceed 1 GiB."""
    size = rows * row_bytes
    if size > MAX_BYTES:
        raise ValueError(
            f"history_length={length} for {rows} rows takes {size / 2**30:.1f} GiB, "
            "more than 1 GiB; shorten history_length, choose a coarser scope, or use "
            "StreamingQuantile, which keeps one number per row"
        )


def push(window: Window, norms: Array, xp: Any = np) -> Window:
    """Return the window after one more norm in each row; the oldest one leaves."""
    if xp is np:
        one = len(norms) == 1
        return _replace(window, norms[0]) if one else _sort(window, norms)
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


def filled(window: Window, xp: Any = np) -> Array:
    """Return how many norms each row holds, shape (rows,)."""
    length = window.ring.shape[1]
    return xp.where(window.count < length, window.count, length)


def quantile(window: Window, q: float, xp: Any = np) -> Array:
    """Return the linear q-quantile of each row, as `np.quantile`; +inf where empty.

    Rank and weight come from float64 tables: `(n - 1) * q` in float32 is off by up to
    194 units in the last place, and JAX has no float64 by default.
    """
    if xp is np and len(window.count) == 1:
        return _quantile_of_one(window, q)
    n = filled(window, xp)
    places, weight = look_up_constants(ranks, window.ring.shape[1], q, n=n, xp=xp)
    pair = _pick(window.ordered, places, xp)
    return interpolated(pair[:, 0], pair[:, 1], weight, n > 0, xp)


def interpolated(
    below: Array, above: Array, weight: Array, some: Array, xp: Any = np
) -> Array:
    """Return what lies between two neighbours of each row, by `ranks`; else +inf."""
    below = xp.where(some, below, 0.0)  # an empty row is +inf throughout, and
    above = xp.where(some, above, 0.0)  # inf - inf would warn
    # As NumPy does: from the nearer end, so that the result is monotonic in q.
    base = xp.where(weight < 0, above, below)
    return xp.where(some, base + (above - below) * weight, float("inf"))


def mean_std(
    window: Window, *, log: bool, ddof: int, xp: Any = np
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
    half = (n[:, None] + 1) // 2
    places = xp.concatenate([n[:, None], half], axis=1)
    ends = _pick(window.ordered, places, xp)
    some = n > 0
    largest = xp.where(some, ends[:, 0], 1.0)[:, None]
    middle = xp.where(some, ends[:, 1], 1.0)[:, None]
    divisor, freedom = look_up_constants(_divisors, values.shape[1], ddof, n=n, xp=xp)
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


def ranks(n: Array, q: float) -> tuple[Array, Array]:
    """Return the two places in an ordered row of n norms and the weight between them.

    The quantile is `below + (above - below) * w` for w >= 0, and from above for w < 0.
    """
    last = np.maximum(n - 1, 0)
    rank = last * q
    lower = np.floor(rank)
    part = rank - lower
    weight = np.where(part < 0.5, part, part - 1)
    places = np.stack([lower, np.minimum(lower + 1, last)], axis=1) + 1
    return places.astype(np.int32), weight.astype(np.float32)


def ordered_rows(rows: int, length: int, xp: Any) -> Array:
    """Return empty rows of `length` slots between -inf and +inf."""
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


def _sort(window: Window, norms: Array) -> Window:
    """Do as `push` on the host, whose sort in vector registers beats H selects."""
    ring, ordered, count = (array.copy() for array in window)
    length = ring.shape[1]
    ring[np.arange(len(ring)), np.where(count < length, count, count - length)] = norms
    ordered[:, 1:-1] = ring
    ordered[:, 1:-1].sort(axis=1)
    more = np.where(count + 1 < 2 * length, count + 1, length).astype(count.dtype)
    return Window(ring, ordered, more)


def _quantile_of_one(window: Window, q: float) -> Array:
    """Do as `quantile` for a single row on the host, in float32 scalars."""
    length = window.ring.shape[1]
    n = min(int(window.count[0]), length)
    if not n:
        return np.full(1, np.inf, np.float32)
    places, weights = get_tables(ranks, length, q)
    row, (lower, upper), weight = window.ordered[0], places[n], weights[n]
    below, above = row[lower], row[upper]
    base = above if weight < 0 else below
    return np.array([base + (above - below) * weight])


def _pick(ordered: Array, places: Array, xp: Any) -> Array:
    """Return `take_along_axis` of the rows; NumPy's own takes ten times the time."""
    if xp is np:
        return ordered[np.arange(len(ordered))[:, None], places]
    return xp.take_along_axis(ordered, places, axis=1)


def _divisors(n: Array, ddof: int) -> tuple[Array, Array]:
    """Return n and n - ddof, at least 1, as float32."""
    freedom = np.maximum(n - ddof, 1)
    return np.maximum(n, 1).astype(np.float32), freedom.astype(np.float32)
