"""Count the updates of parameters, and check a second one after a clipper's step."""

import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, _global_optimizer_post_hooks

from .global_hook import add_hook
from .learning_rate import changes_nothing
from .open_steps import creates_state, list_open_steps
from .weak_hook import WeakHook


class UpdateCounter(ABC):
    """Counts updates: the steps of the optimizers that step all trained parameters."""

    parameters: Sequence[Tensor] = ()

    def __init__(self) -> None:
        """Start to count."""
        self.updates = 0
        self._first: weakref.ref[Optimizer] | None = None
        self._checks_next = False
        self._follows_step = False
        self._updaters: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._handles: weakref.WeakKeyDictionary[Optimizer, Any]
        self._handles = weakref.WeakKeyDictionary()
        self._known: weakref.WeakKeyDictionary[Optimizer, tuple[int, bool]]
        self._known = weakref.WeakKeyDictionary()
        add_hook(_global_optimizer_post_hooks, WeakHook(self._end_update))

    def __reduce__(self) -> Any:
        """Copy this object as one that starts to count."""
        return type(self), ()

    @abstractmethod
    def _check_update(self) -> None:
        """Act before an update that no step of the clipper precedes."""

    def _end_step(self, *, checks_next: bool) -> None:
        """Expect one update until the next step of the clipper.

        Every rank calls this in the same step. From then on the optimizers keep this
        object until it has checked an update. So all ranks check it, whenever a rank
        deletes its clipper.

        Args:
          checks_next: whether to check a second update. A step that is a part of an
            update cannot be left out.
        """
        self._first, self._follows_step = None, True
        is_inside = any(map(self._steps_all, list_open_steps()))
        self._checks_next = checks_next and not is_inside
        if self._checks_next:
            for each in self._updaters.difference(self._handles):
                handle = each.register_step_pre_hook(self._begin_update)
                self._handles[each] = handle

    def _begin_update(self, optimizer: Optimizer, *_: Any) -> None:
        """Check the second update of the same optimizer.

        Another optimizer may step the same parameters on purpose.
        """
        if torch.compiler.is_compiling() or not self._checks_next:
            return
        is_second = self._first is not None and self._first() is optimizer
        if is_second and not creates_state():
            self._checks_next = False
            self._check_update()

    def _end_update(self, optimizer: Optimizer, *_: Any) -> None:
        """Count an update.

        A rank alone may create the state of an optimizer. After a step of the clipper,
        every update counts: a rank may have no gradients.
        """
        if not self._steps_all(optimizer) or creates_state():
            return
        if not self._follows_step and changes_nothing(optimizer):
            return
        self._follows_step = False
        self.updates += 1
        self._updaters.add(optimizer)
        if self._first is None:
            self._first = weakref.ref(optimizer)
        if not self._checks_next:  # not in `_begin_update`: torch iterates over hooks
            for handle in self._handles.values():
                handle.remove()
            self._handles.clear()

    def _steps_all(self, optimizer: Optimizer) -> bool:
        """Return whether an optimizer steps all parameters that are trained."""
        groups = [group["params"] for group in optimizer.param_groups]
        count = sum(map(len, groups))
        known = self._known.get(optimizer)
        if known is None or known[0] != count:
            stepped = {id(parameter) for group in groups for parameter in group}
            trained = [id(p) for p in self.parameters if p.requires_grad]
            known = count, bool(trained) and stepped.issuperset(trained)
            self._known[optimizer] = known
        return known[1]
