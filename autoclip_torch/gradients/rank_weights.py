"""Find ranks that hold different parameters, and each clip by the norm of their own.

The ranks exchange numbers through the store of `torch.distributed`. A collective would
wait for ranks that have no clipper. A step still waits here while another thread of its
process waits on the same store.
"""

import json
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from autoclip_torch.rows.rows import Rows

from .device import choose_device, combine_norms, get_wide_type, measure_whole
from .layout import as_real
from .ranks import has_other_ranks
from .transfer import is_capturing, start_reading

_READ, _COMPARE = 2, 5
"""The steps in which the numbers of the first step are read and compared. They are
written in the step after they are read."""

_MOST = 4
"""A rank with more clippers clips its parameters in parts. So does one with a clipper
for each parameter. Neither is compared."""


class Weights(NamedTuple):
    """What is compared of the parameters of one clipper, before their first update."""

    elements: int
    total: float
    norm: float

    def is_same(self, other: "Weights") -> bool:
        """Return whether these may be copies. Norms of large random tensors are close.

        Weights that are not finite cannot be compared.
        """
        if not all(map(math.isfinite, self + other)):
            return True
        small = 1e-3 * self.norm
        return (
            self.elements == other.elements
            and math.isclose(self.norm, other.norm, rel_tol=1e-3)
            and math.isclose(self.total, other.total, rel_tol=1e-5, abs_tol=small)
        )

    def describe(self) -> str:
        """Return the numbers for a message."""
        return f"{self.elements} elements of norm {self.norm:.4g}"


class RankWeightsCheck:
    """Compares the weights of one clipper with those of the next rank, once.

    Each rank writes what it holds in the first step, and looks in a later step at what
    the next rank has written, without waiting until it is there. If one of them is
    several steps ahead of the other, they do not train one model together.

    Args:
      has_ended: whether there is nothing left to compare.
    """

    def __init__(self, has_ended: bool = False) -> None:
        self._has_ended = has_ended
        self._steps = self._number = self._elements = 0
        self._measured: list[Tensor] = []
        self._read: Callable[[], list[Any]] | None = None
        self._weights: Weights | None = None

    def check(self, rows: Rows, *, dry_run: bool) -> str | None:
        """Return the text of a warning, if the ranks hold different parameters.

        Call it in each step, before anything changes the weights.
        """
        if self._has_ended or is_capturing(choose_device(rows.parameters)):
            return None
        self._steps += 1
        store = _find_store() if rows.scope == "global" and has_other_ranks() else None
        if store is None:
            self.end()
            return None
        try:
            if self._steps == _COMPARE:
                self.end()
                return None if dry_run else self._compare(store, rows)
            if not self._exchange(store, rows):
                self.end()
        except dist.DistError:  # the store is closed, or its process has ended
            self.end()
        return None

    def _exchange(self, store: Any, rows: Rows) -> bool:
        """Return whether the check continues in the next step."""
        if self._steps == 1:
            rank, other = _get_pair()
            self._number = store.add(_count_key(rank), 1)
            is_ahead = store.check([_key(other, self._number)])
            if is_ahead or self._number > _MOST:
                return False
            self._elements = sum(parameter.numel() for parameter in rows.parameters)
            self._measured = _measure(rows.parameters)
            return bool(self._measured)
        if self._steps == _READ:
            self._read, self._measured = start_reading(self._measured), []
        elif self._read is not None:
            total, norm = map(float, self._read())
            self._weights, self._read = Weights(self._elements, total, norm), None
            store.set(_key(_get_pair()[0], self._number), json.dumps(self._weights))
        return True

    def _compare(self, store: Any, rows: Rows) -> str | None:
        """Compare with all clippers of the next rank, if it has equally many."""
        rank, other = _get_pair()
        count = store.add(_count_key(rank), 0)
        is_part = count > _MOST or (count > 1 and len(rows.parameters) == 1)
        if is_part or count != store.add(_count_key(other), 0):
            return None
        mine, theirs = self._weights, _get(store, other, self._number)
        # After a second `init_process_group`, the store has other entries.
        if mine is None or theirs is None or mine != _get(store, rank, self._number):
            return None
        written = [_get(store, other, number + 1) for number in range(count)]
        if any(each is not None and mine.is_same(each) for each in written):
            return None
        return (
            f"rank {rank} and rank {other} hold different parameters "
            f"({mine.describe()}; {theirs.describe()}), and each clips by the norm of "
            "its own; if these are parts of one model, such as pipeline stages, shards "
            "or experts, pass process_group with the ranks that hold the parts, and in "
            "replicated the parameters that all of these ranks hold; in place of "
            'TrustClip, attach QuantileClip(model, 0.9, scope="global", '
            "process_group=group); if each rank trains a model of its own, or a copy "
            "that is averaged later, change nothing"
        )

    def end(self) -> None:
        """Compare nothing more."""
        self._has_ended = True

    def __reduce__(self) -> Any:
        """Copy this object as one that starts, or as one that has ended."""
        return type(self), (self._has_ended or self._steps > 0,)


def _find_store() -> Any:
    """Return the store in which the ranks have met, or None if it is no `TCPStore`.

    Other stores may wait when a key is checked. There is no public way to ask. An
    object that keeps the store keeps its port in use.
    """
    distributed: Any = dist
    store = innermost = distributed.distributed_c10d._get_default_store()
    while isinstance(innermost, distributed.PrefixStore):
        innermost = innermost.underlying_store
    return store if isinstance(innermost, distributed.TCPStore) else None


def _get_pair() -> tuple[int, int]:
    """Return this rank and the next one."""
    rank: int = dist.get_rank()
    return rank, (rank + 1) % dist.get_world_size()


def _count_key(rank: int) -> str:
    return f"autoclip/clippers/{rank}"


def _key(rank: int, number: int) -> str:
    return f"autoclip/weights/{rank}/{number}"


def _get(store: Any, rank: int, number: int) -> Weights | None:
    """Return what a rank has written for one of its clippers, or None."""
    key = _key(rank, number)
    return Weights(*json.loads(store.get(key))) if store.check([key]) else None


def _measure(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return the sum and the norm of the weights; nothing if none can be measured."""
    weights = [as_real(p.detach()) for p in parameters if _is_measurable(p)]
    if not weights:
        return []
    device = choose_device(weights) or torch.device("cpu")
    wide = get_wide_type(device)
    sums = [w.sum(dtype=torch.promote_types(w.dtype, torch.float32)) for w in weights]
    norms = measure_whole(weights, wide)
    total = torch.stack([each.to(device, wide, non_blocking=True) for each in sums])
    moved = [each.to(device, wide, non_blocking=True) for each in norms]
    return [total.sum(), combine_norms(moved, 2)]


def _is_measurable(parameter: Tensor) -> bool:
    is_plain = type(parameter) in (Tensor, Parameter) and parameter.dtype.itemsize > 1
    return is_plain and (parameter.is_floating_point() or parameter.is_complex())
