"""The pairs that a clipper returns, and what a training loop does with them."""

import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from .call_site import get_graph, warn_if_unscaled_later
from .check_transformers import Pair
from .clips_per_update import ClipsPerUpdate


class LoopChecks:
    """Warns about a loop that ignores or adds up pairs, or clips other gradients.

    Args:
      name: the class of the clipper.
      read_steps: returns the steps of the clipper since the start of the run.
    """

    def __init__(self, name: str, read_steps: Callable[[], int]) -> None:
        self._name = name
        self._has_used_one = False
        self._per_update = ClipsPerUpdate(read_steps)
        self._unused_in_a_row = 0
        self._ids: set[int] = set()
        self._earlier_ids: set[int] = set()
        self._graph: Any = None
        self._has_parts = False

    def compare_variables(self, ids: set[int]) -> None:
        """Warn once if a step has several calls, each with other variables.

        Variables that return after others show it, and two parts in one graph. Phases
        of a training, such as the head and then the body, do neither.

        Args:
          ids: those of the variables, which share one norm.
        """
        graph, last_ids = get_graph(), self._ids
        is_same_graph = graph is not None and graph == self._graph
        self._graph, self._ids = graph, ids
        if not last_ids or not ids or not last_ids.isdisjoint(ids):
            return
        self._earlier_ids |= last_ids
        is_part = is_same_graph or not self._earlier_ids.isdisjoint(ids)
        if is_part and not self._has_parts:
            self._has_parts = True
            warnings.warn(
                f"{self._name} receives the variables of a step in parts, so "
                "each part counts as a step with a norm of its own, in one history; "
                "pass all variables in one call: "
                "optimizer.apply(gradients, variables)",
                RuntimeWarning,
                stacklevel=4,
            )

    def count_use(self, pairs: list[Pair]) -> None:
        """Count a result that is read; check the reader of the first one."""
        self._unused_in_a_row = 0
        if not self._has_used_one:
            self._has_used_one = True
            warn_if_unscaled_later(self._name)
        text = self._per_update.count_call([variable for _, variable in pairs])
        self._warn(text, stacklevel=4)

    def count_steps(self, steps: float) -> None:
        """Receive the number of steps that `metrics` has read."""
        self._warn(self._per_update.count_steps(steps), stacklevel=5)

    def _warn(self, text: str, stacklevel: int) -> None:
        if text:
            warnings.warn(f"{self._name} {text}", RuntimeWarning, stacklevel=stacklevel)

    def count_unused(self) -> None:
        """Count a result that nothing read; warn about the second in a row.

        A single one can be that of a step that raised an error. The code of a graph
        runs only once.
        """
        self._unused_in_a_row += 1
        if self._unused_in_a_row == (2 if get_graph() is None else 1):
            warnings.warn(
                f"the pairs that {self._name} returned are not used, so the step is "
                "not clipped: it changes nothing in place; write "
                "optimizer.apply_gradients(clipper(pairs)), or let the optimizer clip: "
                "clipper.as_optimizer(optimizer)",
                RuntimeWarning,
                stacklevel=3,
            )


def _reading(name: str) -> Any:
    """Return a method of `list` that counts as a use of the pairs."""
    method: Callable[..., Any] = getattr(list, name)

    def read(self: "ClippedPairs", *arguments: Any) -> Any:
        checks, self._checks = self._checks, None
        if checks is not None:
            checks.count_use(self)
        return method(self, *arguments)

    return read


class ClippedPairs(list[Pair]):
    """A list of pairs that reports whether it was read.

    Args:
      pairs: the pairs.
      checks: receives the report; a copy that `tf.nest` makes has none.
    """

    def __init__(
        self, pairs: Iterable[Pair] = (), checks: LoopChecks | None = None
    ) -> None:
        super().__init__(pairs)
        self._checks = checks

    __iter__ = _reading("__iter__")
    __reversed__ = _reading("__reversed__")
    __getitem__ = _reading("__getitem__")
    __add__ = _reading("__add__")
    __repr__ = _reading("__repr__")  # an interactive session shows it
    copy = _reading("copy")
    pop = _reading("pop")

    def __radd__(self, others: list[Any]) -> list[Any]:
        """Return a list of the others and these."""
        return [*others, *self]

    def __del__(self) -> None:
        """Report if nothing read the pairs, unless the interpreter exits."""
        if self._checks is not None and not sys.is_finalizing():
            self._checks.count_unused()
