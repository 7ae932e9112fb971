"""The last H norms of each row: quantile, mean and deviation without sorting.

A window stores each row twice: in arrival order (a ring) and in ascending order between
sentinels, `[-inf, s_1 ... s_H, +inf]`. Empty slots are +inf. Two elementwise lines
replace the oldest norm in the ordered row by a new norm; nothing is sorted:

    inserted = min(max(ordered[:-1], new), ordered[1:])             H + 1 ascending
    replaced = inserted[:-1] if it is below the oldest norm, else inserted[1:]

The same lines compile under XLA and cost H operations per row. The +inf padding
requires finite values. `decide` records finite, positive norms, and `decide_loss`
records finite losses of any sign.
"""

from typing import NamedTuple

import numpy as np

from autoclip_core.scale import XP, Array, as_divisor, divide, square_root

from .lookup import get_tables, look_up_constants
from .ranks import check_size, compute_ranks, interpolate, make_ordered_rows


class Window(NamedTuple):
    """The last H norms of each row."""

    ring: Array
    """Shape (rows, H): norms in arrival order; empty slots are +inf."""
    ordered: Array
    """Shape (rows, H + 2): the same norms, ascending between -inf and +inf."""
    count: Array
    """Shape (rows,): norms recorded, wrapped into [0, 2H) so it never overflows."""

    def find_problem(self, lowest: float = 0.0) -> str:
        """Return why a loaded window is invalid, or ""; norms are above `lowest`."""
        ring, ordered, count = self
        length = ring.shape[1]
        most = 2 * length - 1  # the count wraps around there
        invalid = count[(count < 0) | (count > most)].tolist()
        if invalid:
            return f"counts {invalid[0]} norms, and must count 0 to {most}"
        is_filled = np.arange(length) < count_norms(self)[:, None]
        if not ((ring > lowest).all() and np.array_equal(ring < np.inf, is_filled)):
            return "holds other norms in the order of arrival than it counts"
        has_ends = (ordered[:, [0, -1]] == [-np.inf, np.inf]).all()
        if not (has_ends and np.array_equal(ordered[:, 1:-1], np.sort(ring, axis=1))):
            return "holds other norms in ascending order than in the order of arrival"
        return ""

    def find_signed_problem(self) -> str:
        """Return why a loaded window of losses is invalid, or ""."""
        return self.find_problem(lowest=-np.inf)


def empty(rows: int, length: int, xp: XP = np) -> Window:
    """Return a window of `length` norms per row.

    Raises:
      ValueError: the window would exceed 1 GiB.
    """
    check_size(rows, length, 4 * (2 * length + 3))
    ring = xp.full((rows, length), float("inf"), dtype=xp.float32)
    ordered = make_ordered_rows(rows, length, xp)
    return Window(ring, ordered, xp.zeros((rows,), dtype=xp.int32))


def push(window: Window, norms: Array, xp: XP = np) -> Window:
    """Return the window with one more norm in each row; the oldest norm leaves."""
    if xp is np:
        is_single = len(norms) == 1
        return _push_one(window, norms[0]) if is_single else _push_sorted(window, norms)
    ring, ordered, count = window
    length = ring.shape[1]
    new = norms[:, None]
    slot = xp.where(count < length, count, count - length)
    at_slot = xp.arange(length, dtype=xp.int32)[None, :] == slot[:, None]
    oldest = xp.take_along_axis(ring, slot[:, None], axis=1)
    inserted = xp.minimum(xp.maximum(ordered[:, :-1], new), ordered[:, 1:])
    below = inserted[:, :-1]
    replaced = xp.where(below < oldest, below, inserted[:, 1:])
    return Window(
        xp.where(at_slot, new, ring),
        xp.concatenate([ordered[:, :1], replaced, ordered[:, -1:]], axis=1),
        xp.where(count + 1 < 2 * length, count + 1, length),
    )


def count_norms(window: Window, xp: XP = np) -> Array:
    """Return the number of norms in each row, shape (rows,)."""
    length = window.ring.shape[1]
    return xp.where(window.count < length, window.count, length)


def quantile(window: Window, q: float, xp: XP = np) -> Array:
    """Return the linear q-quantile of each row, as `np.quantile`; +inf if empty.

    Rank and weight come from the float64 tables of `lookup.py`.
    """
    if xp is np and len(window.count) == 1:
        return _quantile_of_one(window, q)
    n = count_norms(window, xp)
    length = window.ring.shape[1]
    places, weight = look_up_constants(compute_ranks, length, q, n=n, xp=xp)
    pair = _take_places(window.ordered, places, xp)
    return interpolate(pair[:, 0], pair[:, 1], weight, n > 0, xp)


def mean_std(
    window: Window, *, log: bool, ddof: int, xp: XP = np
) -> tuple[Array, Array, Array]:
    """Return a middle norm of each row, and the mean and deviation relative to it.

    With norms x_i and their median m, these are the mean and the standard deviation of
    x_i - m, or with `log` of ln(x_i / m). Equal norms have exactly the mean 0; a plain
    mean does not guarantee this. No norm is squared: the square of 3e30 is infinite.
    The deviation of a row with fewer than max(2, ddof + 1) norms is +inf.
    """
    n = count_norms(window, xp)
    values = window.ordered[:, 1:-1]
    is_filled = xp.arange(values.shape[1], dtype=xp.int32)[None, :] < n[:, None]
    half = (n[:, None] + 1) // 2
    places = xp.concatenate([n[:, None], half], axis=1)
    picked = _take_places(window.ordered, places, xp)
    has_norms = n > 0
    largest = xp.where(has_norms, picked[:, 0], 1.0)[:, None]
    middle = xp.where(has_norms, picked[:, 1], 1.0)[:, None]
    divisor, freedom = look_up_constants(_divisors, values.shape[1], ddof, n=n, xp=xp)
    if log:
        # A ratio to the median could underflow; a ratio to the centre of the range
        # cannot.
        smallest = xp.where(has_norms, values[:, 0], 1.0)[:, None]
        centre = xp.sqrt(largest) * xp.sqrt(smallest)
        logs = xp.log(divide(xp.where(is_filled, values, centre), centre, xp))
        offsets = logs - xp.log(divide(middle, centre, xp))
        unit = divisor / divisor
    else:
        offsets = xp.where(is_filled, values, middle) - middle
        lowest = xp.where(has_norms, values[:, 0], 1.0)
        # Losses may be negative: then the lowest has the largest magnitude.
        unit = as_divisor(xp.maximum(largest[:, 0], 0.0 - lowest), xp)
    mean = xp.sum(xp.where(is_filled, offsets / divisor[:, None], 0.0), axis=1)
    residuals = xp.where(is_filled, offsets - mean[:, None], 0.0)
    residuals = divide(residuals, unit[:, None], xp)
    std = unit * square_root(xp.sum(residuals * residuals, axis=1) / freedom, xp)
    has_std = n >= max(2, ddof + 1)
    return middle[:, 0], mean, xp.where(has_std, std, float("inf"))


def _push_one(window: Window, norm: Array) -> Window:
    """Compute `push` for a single row in NumPy; moving beats H selects in speed."""
    ring, ordered, count = (array.copy() for array in window)
    length, recorded = ring.shape[1], int(count[0])
    slot = recorded if recorded < length else recorded - length
    row = ordered[0]
    old_place, new_place = row.searchsorted(ring[0, slot]), row.searchsorted(norm)
    if new_place > old_place:
        row[old_place : new_place - 1] = row[old_place + 1 : new_place]
        row[new_place - 1] = norm
    else:
        row[new_place + 1 : old_place + 1] = row[new_place:old_place]
        row[new_place] = norm
    ring[0, slot] = norm
    count[0] = recorded + 1 if recorded + 1 < 2 * length else length
    return Window(ring, ordered, count)


def _push_sorted(window: Window, norms: Array) -> Window:
    """Compute `push` in NumPy: the new norm replaces the oldest, then rows are sorted.

    Only one norm of a row is out of order. A stable sort makes use of that, and it is
    faster than H selects.
    """
    ring, ordered, count = (array.copy() for array in window)
    length, rows = ring.shape[1], np.arange(len(ring))
    slots = np.where(count < length, count, count - length)
    places = (ordered == ring[rows, slots][:, None]).argmax(axis=1)
    ring[rows, slots] = ordered[rows, places] = norms
    ordered[:, 1:-1].sort(axis=1, kind="stable")
    next_count = np.where(count + 1 < 2 * length, count + 1, length)
    return Window(ring, ordered, next_count.astype(count.dtype))


def _quantile_of_one(window: Window, q: float) -> Array:
    """Compute `quantile` for a single row in NumPy, with float32 scalars."""
    length = window.ring.shape[1]
    n = min(int(window.count[0]), length)
    if not n:
        return np.full(1, np.inf, np.float32)
    places, weights = get_tables(compute_ranks, length, q)
    row, (lower, upper), weight = window.ordered[0], places[n], weights[n]
    below, above = row[lower], row[upper]
    base = above if weight < 0 else below
    return np.array([base + (above - below) * weight])


def _take_places(ordered: Array, places: Array, xp: XP) -> Array:
    """Return `take_along_axis` of the rows; in NumPy, indexing is ten times faster."""
    if xp is np:
        return ordered[np.arange(len(ordered))[:, None], places]
    return xp.take_along_axis(ordered, places, axis=1)


def _divisors(n: Array, ddof: int) -> tuple[Array, Array]:
    """Return n and n - ddof, at least 1, as float32."""
    freedom = np.maximum(n - ddof, 1)
    return np.maximum(n, 1).astype(np.float32), freedom.astype(np.float32)
