"""What a clipper remembers, in variables: those of an optimizer, or its own."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from autoclip_core import Decision, Policy
from autoclip_core.clipper.metrics import Tally, empty_tally
from autoclip_core.history.validation import find_problems

from .tracked import outside_graphs

Make = Callable[[str, np.ndarray[Any, Any]], Any]
"""From a name and an initial value to a variable."""


class Memory(NamedTuple):
    """All that a clipper knows of its run; a tree of arrays, tensors or variables.

    The policy's state comes last, and is written last: a threshold may be the very
    tensor, or variable, that holds it, and has to be written down before it changes.
    """

    decision: Decision
    """The last decision."""
    tally: Tally
    """What the run counted."""
    policy: Any
    """What the policy has learned."""


def nothing_seen(policy: Policy, rows: int) -> Memory:
    """Return the memory before the first step, in NumPy."""
    decision = Decision(
        norm=np.full((rows,), np.nan, np.float32),
        threshold=np.full((rows,), np.inf, np.float32),
        scale=np.ones((rows,), np.float32),
        clipped=np.zeros((rows,), bool),
        finite=np.ones((rows,), bool),
        skipped=np.zeros((rows,), bool),
    )
    return Memory(decision, empty_tally(rows), policy.init(rows))


def check_memory(memory: Memory) -> None:
    """Refuse what no run leaves behind; the memory is in NumPy.

    Raises:
      ValueError: a level is NaN or negative, a count impossible, a window in disorder.
    """
    for fault in find_problems(memory, "memory"):
        raise ValueError(
            f"the memory of a clipper is broken: {fault}; load a file that is whole"
        )


class Store:
    """The variables that hold a memory.

    Args:
      fresh: the memory before the first step.
      make: what makes a variable.
    """

    def __init__(self, fresh: Memory, make: Make) -> None:
        """Make a variable for each array, in order."""
        self._fresh = fresh
        self.variables = [
            make(name, np.asarray(array)) for name, array in _leaves(fresh, "clip")
        ]

    def read(self) -> Memory:
        """Return the memory, as tensors."""
        return self.holding(map(ops.convert_to_tensor, self.variables))

    def holding(self, values: Iterable[Any]) -> Memory:
        """Return the memory of these values, one for each variable."""
        memory: Memory = _refill(self._fresh, iter(values))
        return memory

    def on_host(self) -> Memory:
        """Return the memory, in NumPy."""
        return self.holding(variable.numpy() for variable in self.variables)

    def write(self, memory: Memory) -> None:
        """Let the variables hold a memory."""
        values = (value for _, value in _leaves(memory, "clip"))
        for variable, value in zip(self.variables, values, strict=True):
            variable.assign(value)

    def reset(self) -> None:
        """Forget everything."""
        self.write(self._fresh)


def own_variable(name: str, value: np.ndarray[Any, Any]) -> Any:
    """Return a variable that belongs to no optimizer.

    Under a strategy all replicas see the same gradient, so the first one's memory is
    that of the run; without an aggregation TensorFlow would count once per replica.
    """
    with outside_graphs():
        return keras.Variable(
            initializer=constant(value),
            shape=value.shape,
            dtype=value.dtype.name,
            trainable=False,
            aggregation="only_first_replica",
            name=name,
        )


def constant(value: np.ndarray[Any, Any]) -> Callable[..., Any]:
    """Return the initializer that makes this value."""
    return lambda shape, dtype=None: ops.convert_to_tensor(value, dtype)


def _leaves(tree: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the arrays of nested named tuples, named by their path."""
    if not isinstance(tree, tuple):
        yield name, tree
        return
    for field, part in zip(tree._fields, tree, strict=True):  # type: ignore[attr-defined]
        yield from _leaves(part, f"{name}_{field}")


def _refill(tree: Any, leaves: Iterator[Any]) -> Any:
    """Return the same nested named tuples around other leaves."""
    if not isinstance(tree, tuple):
        return next(leaves)
    return type(tree)(*(_refill(part, leaves) for part in tree))
