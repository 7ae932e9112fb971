"""All norms of each row: any quantile of them, at a cost that hardly grows.

A row is kept in three ordered parts. A step inserts its norm into the short one, which
it copies; the others are shared by all states and never written:

    recent    [-inf, r_1 ... r_k, +inf ...]  the newest, k < RECENT
    settled   [-inf, s_1 ... s_m, +inf ...]  older ones, m < RECENT ** 2
    old       [-inf, o_1 ... o_n, +inf ...]  all others

A part that is full is merged into the next one, in all rows at once. So a merge comes
after as many steps as the newer part holds norms, and moves at most RECENT times as
many: a constant number per step and part. (A fourth part would pay from RECENT ** 3
norms on, 4 GiB a row.) The k-th smallest of all is found by bisection. The shape grows,
so a history lives on the host, in NumPy, only. As in a window, the norms are finite and
positive.
"""

from bisect import bisect_left, bisect_right
from typing import Any, NamedTuple

import numpy as np

from autoclip_core.scale import Array

from .window import check_size, interpolated, ordered_rows, ranks

RECENT = 1024
"""Norms between two merges, and their factor: a step copies as many."""


class History(NamedTuple):
    """All norms of each row, for the host only."""

    old: Array
    """Shape (rows, any): the oldest norms, ascending between -inf and +inf."""
    settled: Array
    """Shape (rows, at most RECENT ** 2 + 1): newer ones, in the same order."""
    recent: Array
    """Shape (rows, RECENT + 2): the newest ones, in the same order."""
    count: Array
    """Shape (rows,): norms recorded, in all three."""

    def find_problem(self) -> str:
        """Return what is wrong with a history that was read from somewhere, or ""."""
        *parts, count = self
        if not all(map(_in_order, parts)):
            return "holds norms that are not in ascending order between -inf and inf"
        held = sum((part < np.inf).sum(axis=1) - 1 for part in parts)
        if not np.array_equal(held, count):
            return f"counts {count.tolist()} norms, and holds {held.tolist()}"
        has_room = np.isposinf(self.recent[:, -2]).all() and not _is_full(self)
        return "" if has_room else "has no room for another norm"


def empty(rows: int, length: None = None, xp: Any = np) -> History:
    """Return a history without a norm.

    Raises:
      ValueError: it would be off the host, or exceed 1 GiB from the start.
    """
    check_on_host(xp)
    check_size(rows, length, 4 * (RECENT + 6))
    nothing, recent = ordered_rows(rows, 0, np), ordered_rows(rows, RECENT, np)
    return History(nothing, nothing, recent, np.zeros((rows,), np.int32))


def push(history: History, norms: Array, xp: Any = np) -> History:
    """Return the history after one more norm in each row; 0 leaves a row as it is."""
    old, settled, recent, count = history
    learns = norms > 0
    new = np.where(learns, norms, np.float32(np.inf))[:, None]  # inf changes no row
    inserted = recent.copy()
    # The middle one of three: what was there, what was before it, and the new norm.
    np.minimum(np.maximum(recent[:, :-1], new), recent[:, 1:], out=inserted[:, 1:])
    after = History(old, settled, inserted, count + learns)
    full = (inserted[:, -2] < np.inf).any()
    return _settle(after) if full else after


def quantile(history: History, q: float, xp: Any = np) -> Array:
    """Return the linear q-quantile of each row, as `np.quantile`; +inf where empty."""
    old, settled, recent, count = history
    parts = (recent, settled, old) if old.shape[1] > 2 else (recent, settled)
    places, weight = ranks(count, q)
    rows = zip(*parts, places.tolist(), strict=True)
    pairs = [_pick(row, *wanted) for *row, wanted in rows]
    below, above = np.array(pairs, np.float32).reshape(len(count), 2).T
    return interpolated(below, above, weight, count > 0)


def widen(array: Array, like: Array) -> Array:
    """Return rows at least as wide as those of another array; new slots are empty."""
    if len(array.shape) < 2 or array.shape[1] >= like.shape[1]:
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


def _is_full(history: History) -> bool:
    """Tell whether the settled norms have to move on."""
    _, settled, recent, _ = history
    return bool(settled.shape[1] - 2 >= (recent.shape[1] - 2) ** 2)


def _settle(history: History) -> History:
    """Merge the recent norms of all rows into the settled ones, and those if full."""
    rows, slots = history.recent.shape
    settled = _merged(history.settled, history.recent)
    nothing, recent = (ordered_rows(rows, length, np) for length in (0, slots - 2))
    after = history._replace(settled=settled, recent=recent)
    if not _is_full(after):
        return after
    return after._replace(old=_merged(history.old, settled), settled=nothing)


def _merged(older: Array, newer: Array) -> Array:
    """Return the norms of two parts in one, as wide as its fullest row needs."""
    both = np.concatenate([older[:, :-1], newer[:, 1:]], axis=1)
    both.sort(axis=1, kind="stable")  # which merges runs that are in order already
    slots = range(both.shape[1])
    end = bisect_left(slots, np.inf, key=lambda slot: both[:, slot].min())
    return np.ascontiguousarray(both[:, : end + 1])


def _pick(parts: list[Array], lower: int, upper: int) -> tuple[Any, Any]:
    """Return the norms at two neighbouring places of all parts, the shortest first."""
    # The first `lower` of all are the first ones of each part.
    views: list[Any] = [memoryview(part) for part in parts]
    *shorter, longest = views
    rest, below, above = lower, -np.inf, np.inf
    while shorter:
        part = shorter.pop(0)
        taken = _share(rest, part, shorter, longest)
        below, above = max(below, part[taken]), min(above, part[taken + 1])
        rest -= taken
    below = max(below, longest[rest])
    return below, below if upper == lower else min(above, longest[rest + 1])


def _share(first: int, part: Any, between: list[Any], longest: Any) -> int:
    """Return how many of the first norms of all these parts are those of one.

    It is the least number with which the others hold the rest up to its next norm.
    """
    last = len(longest) - 1
    least = 0 if between else max(0, first + 1 - last)
    most = min(first, len(part) - 2)
    while least < most:  # spelled out, as `bisect_left` with a key takes longer
        taken = (least + most) // 2
        norm, rest = part[taken + 1], first - taken
        for other in between:  # one at most
            rest = min(max(0, rest + 1 - bisect_right(other, norm)), last)
        if longest[rest] <= norm:
            most = taken
        else:
            least = taken + 1
    return least
