"""The state of a clipper, in variables of an optimizer or of the clipper itself."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from autoclip_core import Decision, Policy
from autoclip_core.clipper import metrics
from autoclip_core.clipper.metrics import Tally
from autoclip_core.history.validation import find_problems
from autoclip_tf.gradients import namespace

# On TensorFlow `init_scope` makes a variable that outlives the graph it is made in.
outside_graphs: Any = nullcontext
if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    outside_graphs = tf.init_scope

MakeVariable = Callable[[str, np.ndarray[Any, Any]], Any]
"""From a name and an initial value to a variable."""


LATER = ("clip_decision_dropped", "clip_tally_dropped")
"""Variables that earlier versions did not have. They are the last of a clipper, and the
last of an optimizer. So an earlier file is the beginning of a present one."""


class ClipperState(NamedTuple):
    """The whole state of a clipper: a tree of arrays, tensors or variables.

    The names of the fields are part of the variables' names in saved files.
    The policy's state comes last, and is written last. The threshold of a decision can
    be the same tensor or variable, and has to be written before that changes.
    """

    decision: Decision
    """The last decision."""
    tally: Tally
    """The counts of the run."""
    policy: Any
    """The policy's state."""


def check_state(state: ClipperState) -> None:
    """Raise a ValueError if a state (NumPy arrays) is invalid.

    Raises:
      ValueError: a level is NaN or negative, a count is impossible, or a window is not
        in order.
    """
    for problem in find_problems(state, "state"):
        raise ValueError(
            f"the state of a clipper is invalid: {problem}; load a valid file"
        )


class StateVariables:
    """The variables that hold a clipper's state.

    Args:
      policy: the policy with its limits.
      row_count: the number of rows.
      make: makes a variable.
    """

    def __init__(self, policy: Policy, row_count: int, make: MakeVariable) -> None:
        decision = metrics.empty_decision(row_count)
        tally = metrics.empty_tally(row_count)
        self._initial = ClipperState(decision, tally, policy.init(row_count))
        names = [name for name, _ in _leaves(self._initial, "clip")]
        self._order = sorted(range(len(names)), key=lambda index: names[index] in LATER)
        self.variables: list[Any] = []
        self._make_variables(make, len(names) - len(LATER))

    def add_later_variables(self, make: MakeVariable) -> None:
        """Make the variables of `LATER`, which complete the state."""
        self._make_variables(make, len(LATER))

    def _make_variables(self, make: MakeVariable, count: int) -> None:
        leaves, start = list(_leaves(self._initial, "clip")), len(self.variables)
        for index in self._order[start : start + count]:
            name, array = leaves[index]
            self.variables.append(make(name, np.asarray(array)))

    def read(self) -> ClipperState:
        """Return the state as tensors."""
        return self.from_values(map(ops.convert_to_tensor, self.variables))

    def read_numpy(self) -> ClipperState:
        """Return the state in NumPy."""
        return self.from_values(variable.numpy() for variable in self.variables)

    def from_values(self, values: Iterable[Any]) -> ClipperState:
        """Return the state that consists of these values, one for each variable."""
        by_leaf = sorted(zip(self._order, values, strict=False))
        state: ClipperState = _replace_leaves(self._initial, (v for _, v in by_leaf))
        return state

    def write_step(self, decision: Decision, tally: Tally, policy_state: Any) -> None:
        """Count a step, and assign its decision and the new policy state."""
        tally = metrics.count_step(tally, decision, namespace)
        self.write(ClipperState(decision, tally, policy_state))

    def write(self, state: ClipperState) -> None:
        """Assign a state to the variables."""
        values = [value for _, value in _leaves(state, "clip")]
        for variable, index in zip(self.variables, self._order, strict=True):
            variable.assign(values[index])

    def reset(self) -> None:
        """Assign the initial state to the variables."""
        self.write(self._initial)


def make_variable(name: str, value: np.ndarray[Any, Any]) -> Any:
    """Return a variable that belongs to no optimizer.

    Under a strategy all replicas have the same gradient, so the first replica has
    the state of the run. Without an aggregation TensorFlow would count once per
    replica.
    """
    with outside_graphs():
        return keras.Variable(
            initializer=constant_initializer(value),
            shape=value.shape,
            dtype=value.dtype.name,
            trainable=False,
            aggregation="only_first_replica",
            name=name,
        )


def constant_initializer(value: np.ndarray[Any, Any]) -> Callable[..., Any]:
    """Return the initializer that makes this value."""
    return lambda shape, dtype=None: ops.convert_to_tensor(value, dtype)


def _leaves(tree: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the arrays of nested named tuples, named by their path."""
    if not isinstance(tree, tuple):
        yield name, tree
        return
    for field, part in zip(tree._fields, tree, strict=True):  # type: ignore[attr-defined]
        yield from _leaves(part, f"{name}_{field}")


def _replace_leaves(tree: Any, leaves: Iterator[Any]) -> Any:
    """Return the same nested named tuples with other leaves."""
    if not isinstance(tree, tuple):
        return next(leaves)
    return type(tree)(*(_replace_leaves(part, leaves) for part in tree))
