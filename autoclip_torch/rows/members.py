"""Compare the members of modules and of optimizers by identity."""

from collections.abc import Iterable, Sequence
from itertools import chain
from operator import is_
from typing import Any

from torch import Tensor


class Members:
    """The members of containers, to be compared by identity with those of later."""

    def __init__(self, containers: Iterable[Iterable[Any]]) -> None:
        """Keep the members: no other object then gets one of their ids."""
        self.lists = [list(container) for container in containers]
        self._sizes = list(map(len, self.lists))
        self._all = list(chain.from_iterable(self.lists))

    @property
    def count(self) -> int:
        """How many members there are."""
        return len(self._all)

    @property
    def ids(self) -> set[int]:
        """The id of each member."""
        return set(map(id, self._all))

    def are_in(self, containers: Sequence[Any]) -> bool:
        """Return whether containers hold the same objects, in the same order."""
        if list(map(len, containers)) != self._sizes:
            return False
        return all(map(is_, self._all, chain.from_iterable(containers)))


def find_places(before: Members, now: Members) -> dict[int, Tensor]:
    """Return the parameter that was at the same place before, by id of the present one.

    A place is an index in a group of an optimizer. If a group has another length than
    before, nothing is known of its places.
    """
    places: dict[int, Tensor] = {}
    if len(before.lists) == len(now.lists):
        for old, new in zip(before.lists, now.lists, strict=True):
            if len(old) == len(new):
                places |= {id(n): o for o, n in zip(old, new, strict=True)}
    return places
