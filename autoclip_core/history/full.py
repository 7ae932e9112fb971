"""All norms of each row: any quantile of them, at a cost per step that hardly grows.

A row consists of three ordered parts. A step copies the shortest part and inserts its
norm there. States share the other parts, which are never written:

    recent    [-inf, r_1 ... r_k, +inf ...]  the newest norms, k < RECENT
    settled   [-inf, s_1 ... s_m, +inf ...]  older norms, m < RECENT ** 2
    old       [-inf, o_1 ... o_n, +inf ...]  all other norms

A full part is merged into the next one, in all rows at once. A merge happens after as
many steps as the newer part holds norms, and it moves at most RECENT times as many
norms. That is a constant number per step and part. (A fourth part would pay from
RECENT ** 3 norms on, 4 GiB per row.) Bisection finds the k-th smallest norm of all
parts. The shapes grow, so a history exists only in NumPy. As in a window, the norms are
finite and positive.
"""

from bisect import bisect_left, bisect_right
from typing import Any, NamedTuple

import numpy as np

from autoclip_core.scale import XP, Array

from .ranks import check_size, compute_ranks, interpolate, make_ordered_rows

RECENT = 1024
"""The number of recent norms, and the factor between the lengths of two parts."""


class History(NamedTuple):
    """All norms of each row, in NumPy only."""

    old: Array
    """Shape (rows, any): the oldest norms, ascending between -inf and +inf."""
    settled: Array
    """Shape (rows, at most RECENT ** 2 + 1): newer norms, in the same order."""
    recent: Array
    """Shape (rows, RECENT + 2): the newest norms, in the same order."""
    count: Array
    """Shape (rows,): the number of norms in all three parts."""

    def find_problem(self) -> str:
        """Return why a loaded history is invalid, or ""."""
        *parts, count = self
        if not all(map(_is_ordered, parts)):
            return "holds norms that are not in ascending order between -inf and inf"
        stored = sum((part < np.inf).sum(axis=1) - 1 for part in parts)
        if not np.array_equal(stored, count):
            return f"counts {count.tolist()} norms, but holds {stored.tolist()}"
        has_room = np.isposinf(self.recent[:, -2]).all() and not _is_full(self)
        return "" if has_room else "has no room for another norm"

    def select_rows(self, rows: Array, old: "History") -> "History":
        """Return this history in the given rows, an older one in all other rows.

        A merge changes the parts of all rows. So a row without a new norm takes the new
        parts as well: it holds the same norms there.
        """
        rows = rows | (self.count == old.count)
        if rows.all():
            return self
        mask = rows[:, None]
        parts = [
            new if new is old else np.where(mask, widen(new, old), widen(old, new))
            for new, old in zip(self[:3], old[:3], strict=True)
        ]
        return History._make([*parts, np.where(rows, self.count, old.count)])


def empty(rows: int, length: None = None, xp: XP = np) -> History:
    """Return a history without a norm.

    Raises:
      ValueError: the arrays are not NumPy arrays, or exceed 1 GiB from the start.
    """
    check_is_numpy(xp)
    check_size(rows, length, 4 * (RECENT + 6))
    no_norms = make_ordered_rows(rows, 0, np)
    recent = make_ordered_rows(rows, RECENT, np)
    return History(no_norms, no_norms, recent, np.zeros((rows,), np.int32))


def push(history: History, norms: Array, xp: XP = np) -> History:
    """Return the history with one more norm in each row; 0 adds nothing to a row."""
    old, settled, recent, count = history
    has_norm = norms > 0
    new = np.where(has_norm, norms, np.float32(np.inf))[:, None]  # inf changes no row
    inserted = recent.copy()
    # Each place gets the middle of three: its norm, the norm before it, the new norm.
    np.minimum(np.maximum(recent[:, :-1], new), recent[:, 1:], out=inserted[:, 1:])
    updated = History(old, settled, inserted, count + has_norm)
    is_full = (inserted[:, -2] < np.inf).any()
    return _settle(updated) if is_full else updated


def quantile(history: History, q: float, xp: XP = np) -> Array:
    """Return the linear q-quantile of each row, as `np.quantile`; +inf if empty."""
    old, settled, recent, count = history
    parts = (recent, settled, old) if old.shape[1] > 2 else (recent, settled)
    places, weight = compute_ranks(count, q)
    rows = zip(*parts, places.tolist(), strict=True)
    pairs = [_find_neighbours(row, *pair) for *row, pair in rows]
    below, above = np.array(pairs, np.float32).reshape(len(count), 2).T
    return interpolate(below, above, weight, count > 0)


def widen(array: Array, like: Array) -> Array:
    """Return the rows, at least as wide as those of `like`; new slots are +inf."""
    if len(array.shape) < 2 or array.shape[1] >= like.shape[1]:
        return array
    slots = (len(array), like.shape[1] - array.shape[1])
    return np.concatenate([array, np.full(slots, np.inf, array.dtype)], axis=1)


def check_is_numpy(xp: XP) -> None:
    """Raise a ValueError unless the namespace is NumPy: the state has to grow."""
    if xp is not np:
        raise ValueError(
            "history_length must be a number if shapes are static (JAX, graphs, "
            "accelerators, sharded parameters), got None; set history_length=1000, or "
            "use StreamingQuantile, which summarises all norms in one number"
        )


def _is_ordered(part: Array) -> bool:
    """Return whether all rows ascend from -inf to +inf, without a NaN."""
    has_ends = part.shape[1] >= 2 and (part[:, [0, -1]] == [-np.inf, np.inf]).all()
    return bool(
        has_ends and (part[:, 1:] > 0).all() and (part[:, :-1] <= part[:, 1:]).all()
    )


def _is_full(history: History) -> bool:
    """Return whether the settled norms must be merged into the old norms."""
    _, settled, recent, _ = history
    return bool(settled.shape[1] - 2 >= (recent.shape[1] - 2) ** 2)


def _settle(history: History) -> History:
    """Merge the recent norms of all rows into the settled norms, and those if full."""
    rows, slots = history.recent.shape
    settled = _merge(history.settled, history.recent)
    recent = make_ordered_rows(rows, slots - 2, np)
    merged = history._replace(settled=settled, recent=recent)
    if not _is_full(merged):
        return merged
    old = _merge(history.old, settled)
    return merged._replace(old=old, settled=make_ordered_rows(rows, 0, np))


def _merge(older: Array, newer: Array) -> Array:
    """Return one part with the norms of two, as wide as its fullest row needs."""
    both = np.concatenate([older[:, :-1], newer[:, 1:]], axis=1)
    both.sort(axis=1, kind="stable")  # a stable sort merges ordered runs quickly
    slots = range(both.shape[1])
    end = bisect_left(slots, np.inf, key=lambda slot: both[:, slot].min())
    return np.ascontiguousarray(both[:, : end + 1])


def _find_neighbours(parts: list[Array], lower: int, upper: int) -> tuple[Any, Any]:
    """Return the norms at two neighbouring places in the order of all parts.

    The parts come in order of length, the shortest first.
    """
    # The `lower` smallest norms of all parts are the smallest norms of each part.
    views: list[Any] = [memoryview(part) for part in parts]
    *shorter, longest = views
    rest, below, above = lower, -np.inf, np.inf
    while shorter:
        part = shorter.pop(0)
        taken = _count_smallest(rest, part, shorter, longest)
        below, above = max(below, part[taken]), min(above, part[taken + 1])
        rest -= taken
    below = max(below, longest[rest])
    return below, below if upper == lower else min(above, longest[rest + 1])


def _count_smallest(first: int, part: Any, between: list[Any], longest: Any) -> int:
    """Return how many of the `first` smallest norms of all parts are in one part.

    It is the smallest count for which the other parts hold the remaining norms below
    the next norm of the part.
    """
    last = len(longest) - 1
    least = 0 if between else max(0, first + 1 - last)
    most = min(first, len(part) - 2)
    while least < most:  # `bisect_left` with a key takes longer
        taken = (least + most) // 2
        norm, rest = part[taken + 1], first - taken
        for other in between:  # at most one
            rest = min(max(0, rest + 1 - bisect_right(other, norm)), last)
        if longest[rest] <= norm:
            most = taken
        else:
            least = taken + 1
    return least
