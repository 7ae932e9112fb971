"""After each step of any optimizer: was what it stepped clipped by its clipper?"""

import weakref
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from autoclip_torch.step.unwrap import stepped_parameter_ids, stepped_parameters
from autoclip_torch.step.warn import warn

from .clipper_record import ClipperRecord
from .open_steps import is_in_step, is_outermost_step
from .optimizer_record import OptimizerRecord


class CoverageCheck:
    """All clippers that act, and all optimizers that step.

    torch calls this object after every step of every optimizer. In most steps it counts
    only. In every eighth step, or fewer, it compares the parameters.
    """

    def __init__(self) -> None:
        """Start without a clipper."""
        self._by_hand: weakref.WeakKeyDictionary[Any, ClipperRecord]
        self._by_hand = weakref.WeakKeyDictionary()
        self._inside: set[ClipperRecord] = set()
        self._optimizers: weakref.WeakKeyDictionary[Optimizer, OptimizerRecord]
        self._optimizers = weakref.WeakKeyDictionary()
        self._version = 0
        self._has_hook = False

    def add_by_hand(self, clipper: ClipperRecord, holder: Any) -> None:
        """Check a clipper whose `step` is called, as long as its holder exists."""
        self._register(clipper)
        self._by_hand[holder] = clipper

    def add(
        self, clipper: ClipperRecord, optimizer: Optimizer, *, is_wrapped: bool = False
    ) -> None:
        """Check a clipper that acts in the step of an optimizer."""
        self._register(clipper)
        clipper.owner, clipper.is_wrapped = weakref.ref(optimizer), is_wrapped
        ids = set(map(id, clipper.parameters))
        self._inside = {
            each for each in list(self._inside) if not each.is_replaced_by(ids)
        }
        self._inside.add(clipper)
        self._find(optimizer).inside.append(clipper)

    def _register(self, clipper: ClipperRecord) -> None:
        if not self._has_hook:
            register_optimizer_step_post_hook(self)
            self._has_hook = True
        self.discard(clipper)
        clipper.is_registered = True
        self._version += 1

    def discard(self, clipper: ClipperRecord) -> None:
        """End the check of a clipper."""
        if not clipper.is_registered:
            return
        owner = None if clipper.owner is None else clipper.owner()
        if owner is not None:
            self._find(owner).inside.remove(clipper)
        self._inside.discard(clipper)
        for holder in [h for h, each in self._by_hand.items() if each is clipper]:
            del self._by_hand[holder]
        clipper.is_registered, clipper.owner = False, None
        self._version += 1
        for record in list(self._optimizers.values()):
            record.was_covered = None

    def accept_left_out(self, optimizer: Optimizer) -> None:
        """Do not warn of parameters that no clipper has: a warning has named them."""
        self._find(optimizer).was_covered = False

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Count the step of an optimizer, and warn if it breaks the rule."""
        if torch.compiler.is_compiling() or not (self._inside or self._by_hand):
            return
        record = self._find(optimizer)
        is_due = record.is_due(optimizer, self._version)
        if is_due:
            self._find_clippers(optimizer, record)
        acted = record.count_step(optimizer)
        if is_due and record.clippers:
            record.check_left_out(optimizer, acted)
            self._check_measured(optimizer, record)
        if record.clippers != record.inside or any(c.is_wrapped for c in record.inside):
            self._check_clipped(optimizer, record, acted)

    def _find(self, optimizer: Optimizer) -> OptimizerRecord:
        if (record := self._optimizers.get(optimizer)) is None:
            record = self._optimizers[optimizer] = OptimizerRecord()
        return record

    def _find_clippers(self, optimizer: Optimizer, record: OptimizerRecord) -> None:
        """Find the clippers of what the optimizer steps.

        A clipper inside another optimizer counts only if none is inside this one.
        """
        stepped = stepped_parameters(optimizer)
        ids, shapes = set(map(id, stepped)), {parameter.shape for parameter in stepped}
        by_hand = list(self._by_hand.values())
        others = [] if record.inside else self._list_inside()
        sharing = [each for each in (*by_hand, *others) if each.shares(ids)]
        record.clippers = [*record.inside, *sharing]
        record.similar = [
            each for each in by_hand if not record.clippers and each.shapes <= shapes
        ]
        record.complete = {each for each in record.clippers if each.is_in(ids)}
        for each in sharing:
            owner = None if each.owner is None else each.owner()
            if owner is not None and stepped_parameter_ids(owner) == ids:
                record.twins.setdefault(each, -1)
            else:
                record.twins.pop(each, None)

    def _list_inside(self) -> list[ClipperRecord]:
        """Return the clippers inside optimizers, as long as their parameters exist."""
        self._inside = {each for each in list(self._inside) if each.parameters}
        return list(self._inside)

    def _check_measured(self, optimizer: Optimizer, record: OptimizerRecord) -> None:
        """Warn if a clipper measures parameters that no optimizer steps."""
        ids = stepped_parameter_ids(optimizer)
        for clipper in record.clippers:
            if not clipper.acts_in(optimizer):
                continue
            unstepped = clipper.find_unstepped(ids)
            for other in list(self._optimizers) if unstepped else []:
                others = stepped_parameter_ids(other)
                unstepped = [p for p in unstepped if id(p) not in others]
            clipper.check_unstepped(unstepped)

    def _check_clipped(
        self, optimizer: Optimizer, record: OptimizerRecord, acted: set[ClipperRecord]
    ) -> None:
        """Warn if clippers in other optimizers, or in a wrapper, did not act.

        If all of them still exist, the second such step in a row warns.
        """
        missing = [c for c in record.clippers if self._has_missed(c, optimizer, acted)]
        if any(each.acts_in(optimizer) for each in acted) or not missing:
            # Of its first step it is not known whether a clipper acted for it.
            is_first = record.steps == 1 and not record.inside
            record.unclipped = int(is_first and is_outermost_step(optimizer))
            return
        if not is_outermost_step(optimizer):
            return
        record.unclipped += 1
        is_gone = any(c.owner is not None and c.owner() is None for c in missing)
        if record.unclipped < 2 and not is_gone:
            return
        for each in missing:
            self.discard(each)
        _warn_of_missing(optimizer, missing[0])

    def _has_missed(
        self, clipper: ClipperRecord, optimizer: Optimizer, acted: set[ClipperRecord]
    ) -> bool:
        """Return whether a clipper inside an optimizer has not clipped this step."""
        if clipper.owner is None:
            return False
        owner = clipper.owner()
        if owner is None:
            return True
        if owner is optimizer:
            return clipper.is_wrapped and clipper not in acted
        record = self._find(optimizer)
        if clipper not in acted:
            return clipper in record.complete and not is_in_step(owner)
        # By turns: the owner has stepped, and another backward pass followed.
        twins = record.twins
        if clipper not in twins:
            return False
        steps, twins[clipper] = twins[clipper], self._find(owner).steps
        has_stepped = steps not in (-1, twins[clipper])
        is_new = has_stepped and not clipper.has_same_gradient()
        return is_new and not is_in_step(owner)


def _warn_of_missing(optimizer: Optimizer, clipper: ClipperRecord) -> None:
    """Warn that an optimizer steps what a clipper was to clip."""
    kind = type(optimizer).__name__
    if not clipper.is_wrapped:
        warn(
            f"{kind} stepped parameters of a clipper, such as {clipper.label}, but the "
            "clipper is attached to another optimizer and did not act; call "
            "clipper.detach() and clipper.attach(optimizer)"
        )
        return
    warn(
        f"{kind} stepped parameters, such as {clipper.label}, that the optimizer of "
        "as_optimizer() clips, but that one did not step; step it, or wrap the new "
        "optimizer by as_optimizer(), too; to end the clipping, call "
        "optimizer.clipper.detach()"
    )


COVERAGE = CoverageCheck()
