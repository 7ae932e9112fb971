"""All norms of each row: any quantile of them, at a cost that hardly grows.

A row is kept in two ordered parts. A step inserts its norm into the short one, which it
copies; the long one is shared by all states and never written:

    settled   [-inf, s_1 ... s_n, +inf]      all older norms
    recent    [-inf, r_1 ... r_k, +inf ...]  the newest, k < RECENT

When a short part is full, both are merged into a new long one: once in `RECENT` steps.
The k-th smallest of both is found by bisection. The shape grows, so a history lives on
the host, in NumPy, only. As in a window, the norms are finite and positive.
"""

from bisect import bisect_left
from typing import Any, NamedTuple

import numpy as np

from .scale import Array
from .window import check_size, interpolated, ordered_rows, ranks

RECENT = 1024
"""Norms between two merges: a step copies as many, a merge moves all the others."""


class History(NamedTuple):
    """All norms of each row, for the host only."""

    settled: Array
    """Shape (rows, any): older norms, ascending between -inf and +inf."""
    recent: Array
    """Shape (rows, RECENT + 2): the newest ones, ascending between -inf and +inf."""
    count: Array
    """Shape (rows,): norms recorded, in both."""

    def fault(self) -> str:
        """Return what is wrong with a history that was read from somewhere, or ""."""
        settled, recent, count = self
        if not (_in_order(settled) and _in_order(recent)):
            return "holds norms that are not in ascending order between -inf and inf"
        slots = np.concatenate([settled, recent], axis=1)
        held = (slots < np.inf).sum(axis=1) - 2
        if not np.array_equal(held, count):
            return f"counts {count.tolist()} norms, and holds {held.tolist()}"
        has_room = np.isposinf(recent[:, -2]).all()
        return "" if has_room else "has no room for another norm"


def empty(rows: int, length: None = None, xp: Any = np) -> History:
    """Return a history without a norm.

    Raises:
      ValueError: it would be off the host, or exceed 1 GiB from the start.
    """
    check_on_host(xp)
    check_size(rows, length, 4 * (RECENT + 4))
    settled, recent = ordered_rows(rows, 0, np), ordered_rows(rows, RECENT, np)
    return History(settled, recent, np.zeros((rows,), np.int32))


def push(history: History, norms: Array, xp: Any = np) -> History:
    """Return the history after one more norm in each row; 0 leaves a row as it is."""
    settled, recent, count = history
    learns = norms > 0
    new = np.where(learns, norms, np.float32(np.inf))[:, None]  # inf changes no row
    inserted = recent.copy()
    # The middle one of three: what was there, what was before it, and the new norm.
    np.minimum(np.maximum(recent[:, :-1], new), recent[:, 1:], out=inserted[:, 1:])
    after = History(settled, inserted, count + learns)
    full = (inserted[:, -2] < np.inf).any()
    return _merge(after) if full else after


def quantile(history: History, q: float, xp: Any = np) -> Array:
    """Return the linear q-quantile of each row, as `np.quantile`; +inf where empty."""
    settled, recent, count = history
    places, weight = ranks(count, q)
    pairs = [
        _pick(*row, *wanted) if n else (0.0, 0.0)
        for *row, wanted, n in zip(
            settled, recent, places.tolist(), count.tolist(), strict=True
        )
    ]
    below, above = np.array(pairs, np.float32).reshape(-1, 2).T
    return interpolated(below, above, weight, count > 0)


def widened(array: Array, like: Array) -> Array:
    """Return rows as wide as those of another array; new slots are empty."""
    if array.shape[1:] == like.shape[1:]:
        return array
    slots = (len(array), like.shape[1] - array.shape[1])
    return np.concatenate([array, np.full(slots, np.inf, array.dtype)], axis=1)


def check_on_host(xp: Any) -> None:
    """Refuse to remember all norms where shapes are static."""
    if xp is not np:
        raise ValueError(
            "history_length must be a number where shapes are static (JAX, graphs, "
            "accelerators, sharded parameters), got None; set history_length=1000, or "
            "use StreamingQuantile, which remembers all norms in one number"
        )


def _in_order(part: Array) -> bool:
    """Tell whether rows hold norms in order between their sentinels, and no NaN."""
    ends = part.shape[1] >= 2 and (part[:, [0, -1]] == [-np.inf, np.inf]).all()
    return bool(
        ends and (part[:, 1:] > 0).all() and (part[:, :-1] <= part[:, 1:]).all()
    )


def _merge(history: History) -> History:
    """Settle the recent norms of all rows."""
    settled, recent, count = history
    both = np.concatenate([settled, recent[:, 1:]], axis=1)
    both.sort(axis=1, kind="stable")  # which merges runs that are in order already
    width = int(count.max()) + 2
    nothing = ordered_rows(len(recent), recent.shape[1] - 2, np)
    return History(both[:, :width].copy(), nothing, count)


def _pick(settled: Array, recent: Array, lower: int, upper: int) -> tuple[Any, Any]:
    """Return the norms at two neighbouring places of both rows together."""
    # The first `lower` of both are the first ones of each: `taken` recent ones, and as
    # many settled ones as are missing.
    least = max(0, lower - len(settled) + 2)
    candidates = range(least, min(lower, len(recent) - 2))
    old, new = memoryview(settled), memoryview(recent)
    taken = least + bisect_left(
        candidates, True, key=lambda taken: old[lower - taken] <= new[taken + 1]
    )
    rest = lower - taken
    below = max(old[rest], new[taken])
    above = below if upper == lower else min(old[rest + 1], new[taken + 1])
    return below, above
