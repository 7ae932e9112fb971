"""Compare in a reduction how far the ranks are: a rank may have left out a step.

Each rank sends two numbers with what it reduces: the place of the reduction in its run,
and the number of steps that the optimizer has taken. A step has no further collective.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from autoclip_torch.optimizer_steps.update_counter import UpdateCounter

from .transfer import is_capturing, start_reading

_UPDATE = "optimizer.step() without clipper.step()"

REASONS = ("step", "threshold", "check_agreement", "change of parameters", _UPDATE)
"""The reasons of a reduction; `observe` reads the threshold, too. After a change of
rows, one more reduction precedes that of the first call."""


class Place(NamedTuple):
    """Where a rank is; 0 is unknown, because a compiled step cannot count."""

    call: int
    """The number of completed steps and the reason of the call, as one number."""
    updates: int
    """How many steps the optimizer has taken."""

    def __str__(self) -> str:
        """Return the words of the error message."""
        steps, reason = divmod(self.call - 1, len(REASONS))
        updates = f" and {self.updates} of the optimizer" if self.updates else ""
        return f"in {REASONS[reason]} after {steps} steps of the clipper{updates}"


class StepCounter(UpdateCounter):
    """The number of steps of a clipper, and of updates of its parameters.

    Ranks with different numbers are not in the same step. Under `fully_shard`, a rank
    that leaves out a step waits for the others in its next forward pass, and they wait
    for it in their step. So it reduces before its update, and joins their reduction. If
    all ranks leave out the step, all of them reduce and continue.
    """

    checks_updates = False
    """Whether a rank reduces before an update without a step, from the third step on.
    It needs shards: a rank may update parameters alone that no other rank has."""

    def __init__(self) -> None:
        """Start to count."""
        super().__init__()
        self._steps = 0
        self._read_last: Callable[[], list[Any]] | None = None
        self._last: tuple[Tensor, Sequence[Any], Any] | None = None
        self._averaged: Tensor | None = None
        self._has_updates = False

    @property
    def has_reduced(self) -> bool:
        """Whether a step was counted."""
        return self._steps > 0

    def reduce(
        self,
        vector: Tensor,
        groups: Sequence[Any],
        *,
        reason: str = "step",
        operation: Any = dist.ReduceOp.SUM,
    ) -> Tensor:
        """Return the vector, reduced over the groups, one after the other.

        Args:
          vector: not negative if `operation` takes the largest elements.
          groups: process groups; every rank of them must call this.
          reason: one of `REASONS`; a "step" is counted.
          operation: the sum or the maximum.

        Raises:
          RuntimeError: the ranks are not in the same step. On an accelerator the call
            after it raises, because a step does not wait for the device.
        """
        ranks = _list_ranks(groups)
        marks = vector.new_zeros(2, len(ranks))
        if not torch.compiler.is_compiling():
            call = self._steps * len(REASONS) + REASONS.index(reason) + 1
            place = Place(call, self.updates)
            for mark, number in zip(marks, place, strict=True):
                # The number goes to a device as an argument of a kernel, not as a copy.
                mark[ranks.index(dist.get_rank())].fill_(number)
        sent = torch.cat([vector, marks.reshape(-1)])
        try:
            for group in groups:
                dist.all_reduce(sent, operation, group=group)
        except RuntimeError as error:  # such as a timeout
            error.add_note(
                f"a rank did not join the reduction of the norms after {self._steps} "
                "steps of the clipper: it has left out a step, or it has failed; every "
                "rank must call clipper.step() before each update"
            )
            raise
        if torch.compiler.is_compiling():
            self._checks_next = False
        else:
            self._compare(sent[len(vector) :], ranks, groups)
            if reason == "step":
                self._steps += 1
                self._last = vector, groups, operation
                self._end_step(checks_next=self.checks_updates and self._has_updates)
        return sent[: len(vector)]

    def average(self, vector: Tensor, groups: Sequence[Any]) -> Tensor:
        """Return the mean of the vectors of all ranks, after a reduction for a step."""
        if not torch.compiler.is_compiling():
            self._averaged = vector
        for group in groups:
            vector = vector / dist.get_world_size(group)
            dist.all_reduce(vector, group=group)
        return vector

    def _compare(
        self, marks: Tensor, ranks: Sequence[int], groups: Sequence[Any]
    ) -> None:
        """Check the marks of all ranks, on an accelerator those of the last call."""
        if is_capturing(marks.device):
            return
        marks = marks.view(2, -1)
        if marks.device.type == "cpu":
            known: Any = marks.numpy()
        else:
            read, self._read_last = self._read_last, start_reading([marks])
            if read is None:
                return
            known = read()[0]
        _check_marks(ranks, known)
        # Every rank must count updates, and must know that all of them do.
        count = math.prod(map(dist.get_world_size, groups))
        self._has_updates = (known[1] > 0).sum() == count

    def _check_update(self) -> None:
        """Reduce what a step reduces, so that this ends if other ranks are in one."""
        if self._last is None or not dist.is_initialized():
            return
        vector, groups, operation = self._last
        if is_capturing(vector.device):
            return
        nothing = torch.zeros_like(vector)
        self.reduce(nothing, groups, reason=_UPDATE, operation=operation)
        if self._averaged is not None:
            self.average(torch.zeros_like(self._averaged), groups)


def _check_marks(ranks: Sequence[int], marks: Any) -> None:
    """Check the marks of all ranks, shape (2, ranks); equal ones need no loop."""
    if (marks != marks[:, :1]).any():
        check_places(ranks, marks.T.astype(int).tolist())


def check_places(ranks: Sequence[int], places: Sequence[Sequence[int]]) -> None:
    """Check that all ranks are in the same step.

    Raises:
      RuntimeError: they are not; the message names the ranks that differ.
    """
    pairs = [(r, Place(*p)) for r, p in zip(ranks, places, strict=True) if p[0]]
    for part in ("call", "updates"):
        known = [pair for pair in pairs if getattr(pair[1], part)]
        counts = Counter(getattr(place, part) for _, place in known)
        if len(counts) < 2:
            continue
        steps = (known[0][1].call - 1) // len(REASONS)
        raise RuntimeError(_explain(part, known, _find_usual(part, counts, steps)))


def _find_usual(part: str, counts: Counter[int], steps: int) -> int:
    """Return the number of most ranks. Of two ranks, the other one left out a step.

    The rank with more calls has left out a step. In the same call, the rank with fewer
    updates has left out one, unless the other has more updates than clipper steps.
    """
    if part == "call":
        return min(counts, key=lambda value: (-counts[value], value))
    return min(counts, key=lambda value: (-counts[value], value != steps, -value))


def _explain(part: str, known: Sequence[tuple[int, Place]], usual: int) -> str:
    """Return the message that names the ranks whose number is not the usual one."""
    others = [pair for pair in known if getattr(pair[1], part) != usual]
    place = next(place for _, place in known if getattr(place, part) == usual)
    differing = "; ".join(f"rank {rank} is {other}" for rank, other in others)
    owner = "clipper"
    way_out = "call clipper.step() on every rank, also on one without gradients"
    if part == "updates" and max(other.updates for _, other in others) < usual:
        owner = "optimizer"
        way_out = "call optimizer.step() after clipper.step() on every rank, or on none"
    return (
        f"every rank must take each step of the {owner}, but {differing}, while the "
        f"others are {place}; {way_out}"
    )


def _list_ranks(groups: Sequence[Any]) -> list[int]:
    """Return the ranks whose vectors are reduced, or all ranks with several groups."""
    if len(groups) > 1:
        return list(range(dist.get_world_size()))
    ranks: list[int] = dist.get_process_group_ranks(groups[0])
    return ranks
