"""Compare in a reduction how far the ranks are: a rank may have left out a step.

Each rank sends two numbers with what it reduces: the place of the reduction in its run,
and the number of steps that the optimizer has taken. No collective is added.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from autoclip_torch.optimizer_steps.weak_hook import WeakHook

from .transfer import is_capturing, start_reading

REASONS = ("step", "threshold", "check_agreement", "change of parameters")
"""The calls that reduce; `observe` reads the threshold, too. After a change of rows,
the first call is preceded by one more reduction, for the last reason."""


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


class StepCounter:
    """The number of steps of a clipper, and of the optimizer of its parameters.

    An optimizer counts if it steps all parameters that are trained. So a rank that left
    out a step of the clipper, but not of the optimizer, differs from the others.
    """

    def __init__(self) -> None:
        """Start to count the steps of optimizers."""
        self.parameters: Sequence[Tensor] = ()
        self._steps, self._updates = 0, 0
        self._read_last: Callable[[], list[Any]] | None = None
        self._holds: weakref.WeakKeyDictionary[Optimizer, tuple[int, bool]]
        self._holds = weakref.WeakKeyDictionary()
        WeakHook(register_optimizer_step_post_hook, self._count_update)

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
            place = Place(call, self._updates)
            for mark, number in zip(marks, place, strict=True):
                # The number goes to a device as an argument of a kernel, not as a copy.
                mark[ranks.index(dist.get_rank())].fill_(number)
        sent = torch.cat([vector, marks.reshape(-1)])
        for group in groups:
            dist.all_reduce(sent, operation, group=group)
        if not torch.compiler.is_compiling():
            self._compare(sent[len(vector) :], ranks)
            self._steps += reason == "step"
        return sent[: len(vector)]

    def _compare(self, marks: Tensor, ranks: Sequence[int]) -> None:
        """Check the marks of all ranks, on an accelerator those of the last call."""
        if is_capturing(marks.device):
            return
        marks = marks.view(2, -1)
        if marks.device.type == "cpu":
            _check_marks(ranks, marks.numpy())
            return
        read, self._read_last = self._read_last, start_reading([marks])
        if read is not None:
            _check_marks(ranks, read()[0])

    def _count_update(self, optimizer: Optimizer, *_: Any) -> None:
        """Count a step of an optimizer that steps all trained parameters."""
        groups = [group["params"] for group in optimizer.param_groups]
        count = sum(map(len, groups))
        known = self._holds.get(optimizer)
        if known is None or known[0] != count:
            stepped = {id(parameter) for group in groups for parameter in group}
            trained = [id(p) for p in self.parameters if p.requires_grad]
            known = count, bool(trained) and stepped.issuperset(trained)
            self._holds[optimizer] = known
        self._updates += known[1]


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
        # Of two ranks, the one that is further has left out a step.
        usual = min(counts, key=lambda value: (-counts[value], value))
        others = [p for p in known if getattr(p[1], part) != usual]
        place = next(p for _, p in known if getattr(p, part) == usual)
        differing = "; ".join(f"rank {rank} is {p}" for rank, p in others)
        raise RuntimeError(
            f"every rank must take each step of the clipper, but {differing}, while "
            f"the others are {place}; call clipper.step() on every rank, also on one "
            "without gradients"
        )


def _list_ranks(groups: Sequence[Any]) -> list[int]:
    """Return the ranks whose vectors are reduced, or all ranks with several groups."""
    if len(groups) > 1:
        return list(range(dist.get_world_size()))
    ranks: list[int] = dist.get_process_group_ranks(groups[0])
    return ranks
