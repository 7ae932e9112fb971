"""Notice a clipper that a loop calls several times for each update of its optimizer."""

import weakref
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from autoclip_tf.gradients.rows import stable_id
from autoclip_tf.state.variables import outside_graphs

from .call_site import (
    count_replicas,
    get_graph,
    is_called_by_optimizer,
    list_in_reach,
)

_INTERVALS = 3
"""So many comparisons in a row show it; other loops may leave out some updates."""

_UPDATES = 10
"""So many updates before the first read show it, if they all have as many calls."""

_WATCHED_CALLS = 32
"""After so many calls outside of a graph, only `metrics` compares the counts."""


class ClipsPerUpdate:
    """Compares the steps of a clipper with the updates of the optimizer.

    That is the only optimizer in reach of the loop that was built for the variables of
    all calls. A clipper whose calls have no variable in common may serve several
    optimizers, so it is not watched.

    Args:
      read_steps: returns the steps of the clipper since the start of the run.
    """

    def __init__(self, read_steps: Callable[[], int]) -> None:
        self._read_steps = read_steps
        self._optimizers: weakref.WeakSet[Any] = weakref.WeakSet()
        self._start: weakref.WeakKeyDictionary[Any, tuple[int, int]] = (
            weakref.WeakKeyDictionary()
        )
        """Steps and updates at the first call, if it was in a graph, by optimizer."""
        self._ids: frozenset[int] = frozenset()
        self._is_watched, self._counts_calls = True, False
        self._calls = self._intervals = 0
        self._last: tuple[int, int] | None = None

    def count_call(self, variables: list[Any]) -> str:
        """Count a call whose result is used; return a message, or "".

        Args:
          variables: those of the gradients.
        """
        ids = frozenset(map(stable_id, variables))
        is_other_part = bool(self._ids) and self._ids.isdisjoint(ids)
        if is_called_by_optimizer() or count_replicas() > 1 or is_other_part:
            self._is_watched = False
        self._ids |= ids
        self._calls += 1
        if not self._is_watched or self._calls > _WATCHED_CALLS:
            if self._counts_calls:
                self._counts_calls, self._last = False, None
            return ""
        is_graph = get_graph() is not None
        if self._find_optimizer() is None:
            self._optimizers.update(list_in_reach(keras.optimizers.Optimizer))
        if is_graph and self._calls == 1:
            for each in self._optimizers:
                self._start[each] = self._read_steps(), _count_updates(each)
        self._counts_calls = keras.backend.backend() != "jax" and not is_graph
        return self._compare(self._calls) if self._counts_calls else ""

    def count_steps(self, steps: float) -> str:
        """Receive the steps that `metrics` has read; return a message, or "".

        Args:
          steps: their number since the start of the run.
        """
        return "" if self._counts_calls else self._compare(int(steps))

    def _compare(self, steps: int) -> str:
        optimizer = self._find_optimizer()
        if optimizer is None:
            return ""
        updates = _count_updates(optimizer)
        last, self._last = self._last, self._last or (steps, updates)
        if last is None:
            return self._compare_with_start(steps, updates, optimizer)
        if updates == last[1]:
            return ""
        self._last = (steps, updates)
        count = (steps - last[0]) / (updates - last[1])
        self._intervals = self._intervals + 1 if count >= 2 else 0
        return self._report(count, optimizer) if self._intervals >= _INTERVALS else ""

    def _compare_with_start(self, steps: int, updates: int, optimizer: Any) -> str:
        """Compare the first read with the first call, which was in a graph.

        A loop that leaves out some updates has another number of calls for each.
        """
        start = self._start.get(optimizer, (steps, updates))
        calls, updates = steps - start[0], updates - start[1]
        if updates < _UPDATES or calls < 2 * updates or calls % updates:
            return ""
        return self._report(calls / updates, optimizer)

    def _report(self, count: float, optimizer: Any) -> str:
        """Return the message, once."""
        self._is_watched = False
        return (
            f"was called {count:.3g} times for each update of "
            f"{type(optimizer).__name__}; if the results are added up, each "
            "micro-batch is clipped and not their sum: add up the gradients first, and "
            "call it once before optimizer.apply(gradients, variables); if each is "
            "clipped on purpose, as those of several tasks, ignore this warning"
        )

    def _find_optimizer(self) -> Any:
        """Return the optimizer of the variables, or None if it is not known."""
        owners = [
            each
            for each in (self._optimizers if self._is_watched else ())
            if each.built and self._ids <= {*map(stable_id, each._trainable_variables)}
        ]
        return owners[0] if len(owners) == 1 else None


def _count_updates(optimizer: Any) -> int:
    with outside_graphs():
        updates = keras.ops.convert_to_numpy(optimizer.iterations)
    return int(np.asarray(updates))
