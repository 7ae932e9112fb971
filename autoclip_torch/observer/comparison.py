"""Compare the parameters of a clipper with those that exist now, before each step."""

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from autoclip_torch.gradients.dtensor import is_sharded
from autoclip_torch.rows.groups import Group, NamedParameter
from autoclip_torch.rows.members import Members, find_places
from autoclip_torch.rows.predecessors import Present, find_present
from autoclip_torch.rows.read import read_again, read_optimizer_groups

_MEMBERS_PER_STEP = 512
"""On average, at most so many members of modules are compared in a step."""


class Comparison:
    """What an optimizer stepped, and what the modules held, at the last comparison.

    Members are compared by identity.

    Args:
      optimizer: the optimizer whose groups were the first argument of the clipper.
    """

    def __init__(self, optimizer: Optimizer | None = None) -> None:
        self._optimizer = None if optimizer is None else weakref.ref(optimizer)
        self._stepped: Members | None = None
        self._containers: Sequence[Any] = ()
        self._members: Members | None = None
        self._steps, self._interval = 0, 1
        self.removed: list[Tensor] = []
        """Parameters that the clipper gave up, while others hold them."""

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer that was the first argument, if it still exists."""
        return None if self._optimizer is None else self._optimizer()

    def adopt(self, optimizer: Optimizer) -> None:
        """Compare with an optimizer from now on."""
        self._optimizer = weakref.ref(optimizer)
        self.accept_optimizers([optimizer])

    def accept_optimizers(self, optimizers: Sequence[Optimizer]) -> None:
        """Compare later with the parameters that the optimizers step now."""
        self._stepped = Members(_list_stepped(optimizers))

    def accept_known(self, optimizer: Optimizer, known: Iterable[Tensor]) -> None:
        """Compare later with the known parameters that the optimizer steps now.

        Its other parameters then count as new.
        """
        ids = set(map(id, known))
        stepped = _list_stepped([optimizer])
        self._stepped = Members([[p for p in each if id(p) in ids] for each in stepped])

    def accept_modules(self, groups: Sequence[Group]) -> None:
        """Compare later with the members that the modules of the groups have now.

        These are all modules and parameters in them. To compare them takes less time
        than to list the parameters.
        """
        roots = [group.module for group in groups if _follows_module(group)]
        self._containers = [
            members.values()
            for root in roots
            if root is not None
            for module in root.modules()
            for members in (module._modules, module._parameters)
        ]
        self._members = Members(self._containers)
        self._interval = 1 + self._members.count // _MEMBERS_PER_STEP

    def leave_out(self, parameters: Iterable[Tensor]) -> None:
        """Leave out parameters that the clipper gave up, while others hold them."""
        self.removed += parameters

    def take_back(self, parameters: Iterable[Tensor]) -> None:
        """Undo `leave_out`."""
        ids = set(map(id, parameters))
        self.removed = [each for each in self.removed if id(each) not in ids]

    def compare_with_modules(self, groups: Sequence[Group]) -> Present | None:
        """Return the parameters that the modules have now, or None if none changed.

        Modules with many members are compared in every few steps.
        """
        self._steps += 1
        if self._members is not None:
            is_due = self._steps % self._interval == 0
            if not is_due or self._members.are_in(self._containers):
                return None
        if not any(map(_follows_module, groups)):
            return None
        candidates = [each for group in read_again(groups) for each in group.parameters]
        present = find_present(groups, self._leave_out_removed(candidates))
        return None if _is_gathered(present) else present

    def compare_with_optimizers(
        self, optimizers: Sequence[Optimizer], groups: Sequence[Group]
    ) -> Present | None:
        """Return the parameters to clip from now on, or None if none changed.

        These are the parameters that the optimizers step. A parameter that they did
        not step before, such as a frozen one, stays in the clipper.
        """
        stepped, before = _list_stepped(optimizers), self._stepped
        if before is not None and before.are_in(stepped):
            return None
        now = Members(stepped)
        before = before or now
        known = {id(each.parameter) for group in groups for each in group.parameters}
        stays = now.ids | (known - before.ids)
        model = next((group.module for group in groups if group.is_of_optimizer), None)
        of_optimizer = [
            group
            for optimizer in optimizers
            if any(_list_stepped([optimizer]))
            for group in read_optimizer_groups(optimizer, model)
        ]
        others = read_again([group for group in groups if not group.is_of_optimizer])
        candidates = [
            each
            for group in [*others, *of_optimizer]
            for each in group.parameters
            if id(each.parameter) in stays
        ]
        candidates = self._leave_out_removed(candidates)
        places = find_places(before, now)
        present = find_present(groups, candidates, of_optimizer, places)
        new = [n for n in present.unknown if id(n.parameter) not in before.ids]
        return present._replace(unknown=new)

    def _leave_out_removed(
        self, candidates: list[NamedParameter]
    ) -> list[NamedParameter]:
        """Return the candidates that the clipper has not given up."""
        present = {id(each.parameter) for each in candidates}
        self.removed = [each for each in self.removed if id(each) in present]
        removed = set(map(id, self.removed))
        return [each for each in candidates if id(each.parameter) not in removed]

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle and deepcopy copy; a copy compares all modules again."""
        none = {"_optimizer": None, "_members": None}
        return {**vars(self), **none, "_containers": ()}


def _follows_module(group: Group) -> bool:
    return group.module is not None and not group.is_of_optimizer


def _list_stepped(optimizers: Sequence[Optimizer]) -> list[list[Tensor]]:
    return [group["params"] for each in optimizers for group in each.param_groups]


def _is_gathered(present: Present) -> bool:
    """Return whether a module holds whole parameters in place of its shards.

    FSDP2 replaces parameters during a forward pass, and may restore them later.
    """
    return any(
        is_sharded(old.parameter) and not is_sharded(each.parameter)
        for group in present.groups
        for each in group.parameters
        if (old := present.predecessors.get(id(each.parameter))) is not None
    )
