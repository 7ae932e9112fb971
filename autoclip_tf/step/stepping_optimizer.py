"""Find the optimizer that steps with clipped gradients, in the code that clips."""

import dis
import inspect
from collections.abc import Iterable, Iterator
from types import CodeType, FrameType
from typing import Any

import keras

from autoclip_tf.gradients.rows import stable_id

_STEPS = {"apply", "apply_gradients", "stateless_apply"}
"""The methods of an optimizer that take a step."""

_SAME_VALUE = {"CALL", "PRECALL", "PUSH_NULL", "CACHE", "NOP"}
"""Instructions between `ag__.ld(optimizer)` and `.apply`, as AutoGraph writes it."""


def find_stepping_optimizer(
    frames: Iterable[FrameType], variables: Iterable[Any]
) -> Any:
    """Return the optimizer that reads the gradients, or else that the code steps.

    The innermost code that calls the `apply` of an optimizer decides. If it does so for
    several optimizers, the one that was built for the variables is meant.

    Args:
      frames: of the callers, from the inside out.
      variables: those of the clipped gradients.

    Returns:
      An optimizer of Keras 3, or None if the code does not show it.
    """
    for frame in frames:
        owner = frame.f_locals.get("self")
        if isinstance(owner, keras.optimizers.Optimizer):
            return owner
        optimizers = _list_stepped(frame)
        if not optimizers and isinstance(owner, keras.Model):
            optimizers = [getattr(owner, "optimizer", None)]
        if optimizers:
            return _choose(optimizers, {stable_id(v) for v in variables})
    return None


def _choose(optimizers: list[Any], ids: set[int]) -> Any:
    """Return the optimizer of these variables, or None if several may be meant."""
    built = [each for each in optimizers if getattr(each, "built", False)]
    owners = [
        each
        for each in built
        if not ids.isdisjoint(map(stable_id, each._trainable_variables))
    ]
    candidates = owners or [each for each in optimizers if each not in built]
    return candidates[0] if len(candidates) == 1 else None


def _list_stepped(frame: FrameType) -> list[Any]:
    """Return the optimizers whose `apply` the code of a frame calls, each once."""
    values = (_find_value(path, frame) for path in _list_receivers(frame.f_code))
    optimizers = {
        id(value): value
        for value in values
        if isinstance(value, keras.optimizers.Optimizer)
    }
    return list(optimizers.values())


def _find_value(path: list[str], frame: FrameType) -> Any:
    """Return the value of a name and of its attributes, without running any code."""
    root, *attributes = path
    value = frame.f_locals.get(root, frame.f_globals.get(root))
    for name in attributes:
        value = inspect.getattr_static(value, name, None)
    return value


def _list_receivers(code: CodeType) -> Iterator[list[str]]:
    """Yield the dotted names of whose `apply` is called, such as ["self", "sgd"].

    Comprehensions and functions in the code belong to it.
    """
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _list_receivers(constant)
    path: list[str] = []
    for instruction in dis.get_instructions(code) if _STEPS & {*code.co_names} else ():
        kind, value = instruction.opname, instruction.argval
        if kind in ("LOAD_ATTR", "LOAD_METHOD"):
            if value in _STEPS and path:
                yield path
            path = [*path, value] if path else []
        elif kind.startswith("LOAD_") and kind != "LOAD_CONST":
            names = value if isinstance(value, tuple) else (value,)  # two in one
            path = [str(names[-1])]
        elif kind not in _SAME_VALUE:
            path = []
